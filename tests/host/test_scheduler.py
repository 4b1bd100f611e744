"""Who gets a slot, what a step does, and that whatever ends gives everything back, once."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg_tt.blocks import BLOCK, BlockPool
from disagg_tt.errors import OverloadError, PromptError
from disagg_tt.serving.scheduler import Scheduler, Sequence, State

EOS = 0
STATEFUL = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # a loaded machine
)


def scheduler(slots: int = 4, blocks: int = 64, **options) -> Scheduler:
    return Scheduler(slots, BlockPool(blocks), **options)


def sequence(name: str, prompt: int = 40, new: int = 8, **more) -> Sequence:
    """A request whose prompt shares nothing with another name's."""
    return Sequence(name, [1000 + ord(name[0])] * prompt, new, frozenset({EOS}), **more)


def running(sched: Scheduler, name: str, **more) -> Sequence:
    """A request that was received and has its first token."""
    wanted = sequence(name, **more)
    sched.add(wanted)
    assert wanted in sched.admit()
    sched.receive(wanted)
    sched.received(wanted, wanted.prompt_tokens - wanted.computed)
    assert sched.start(wanted, 7) is None
    return wanted


def prefilling(sched: Scheduler, name: str, prompt: int) -> Sequence:
    wanted = sequence(name, prompt)
    sched.add(wanted)
    assert wanted in sched.admit()
    sched.prefill(wanted)
    return wanted


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_one():
    sched = scheduler(blocks=8)
    first = running(sched, "a", prompt=100, new=60)  # 5 blocks
    for name, prompt in (("b", 120), ("c", 10)):
        sched.add(sequence(name, prompt))
    assert sched.admit() == []  # b needs 4, 3 are there; c needs 1
    sched.finish(first)
    assert [s.id for s in sched.admit()] == ["b", "c"]


def test_a_running_sequence_has_all_its_blocks_from_the_start():
    sched = scheduler()
    wanted = running(sched, "a", prompt=33, new=64)
    blocks = list(wanted.blocks)
    for step in range(63):
        assert len(wanted.tokens) <= len(blocks) * BLOCK and wanted.blocks == blocks
        assert (sched.advance(wanted, 7) == "length") == (step == 62)
    assert wanted.state is State.ENDED and sched.pool.in_use == 0


def test_a_sequence_longer_than_a_slot_is_refused_however_many_blocks_there_are():
    sched = scheduler(blocks=64, most_blocks=4)
    sched.add(sequence("a", 100, 28))
    with pytest.raises(PromptError, match="1 to 128 fit a slot"):
        sched.add(sequence("b", 100, 29))


def test_an_eos_token_ends_it():
    sched = scheduler()
    wanted = running(sched, "a")
    assert sched.advance(wanted, EOS) == "stop"
    assert wanted.tokens[wanted.prompt_tokens :] == [7, EOS] and not sched.admitted


def test_a_first_token_can_be_the_last():
    sched = scheduler()
    wanted = prefilling(sched, "a", 20)
    sched.prefilled(sched.plan(0).chunk)
    assert sched.start(wanted, EOS) == "stop" and sched.pool.in_use == 0


@pytest.mark.parametrize(("length", "cached"), [(31, 0), (32, 0), (33, 32), (64, 32), (65, 64), (95, 64)])
def test_a_token_of_the_prompt_is_always_left_to_compute(length, cached):
    sched = scheduler()
    sched.finish(running(sched, "a", prompt=100))
    again = prefilling(sched, "a", length)
    assert again.cached == again.computed == cached
    chunk = sched.plan(0).chunk
    assert (chunk.first, chunk.count) == (cached, length - cached)


def test_a_later_turn_finds_the_answer_of_the_one_before_in_cache():
    sched = scheduler()
    wanted = running(sched, "a", prompt=40, new=40)
    while sched.advance(wanted, 7) is None:
        pass
    later = Sequence("later", [*wanted.tokens, 5, 5, 5], 8)  # 80 tokens, the last of them was never fed
    sched.add(later)
    sched.admit()
    assert later.cached == 64


def test_blocks_that_decode_steps_filled_are_found():
    sched = scheduler()
    first = running(sched, "a", prompt=40, new=40)
    while first.state is State.RUNNING:
        sched.advance(first, 7)
    again = Sequence("b", [*first.tokens, 5], 1)
    sched.add(again)
    sched.admit()
    assert again.cached == 64


def test_what_was_only_half_received_is_not_found():
    sched = scheduler()
    wanted = sequence("a", 100)
    sched.add(wanted)
    sched.admit()
    sched.receive(wanted)
    assert sched.cancel("a") is wanted
    assert prefilling(sched, "a", 100).cached == 0


def test_what_has_ended_is_not_found_nor_freed_again():
    sched = scheduler(slots=1)
    old = running(sched, "a")
    assert sched.get("a") is old
    assert sched.cancel("a") is old and sched.cancel("a") is None and not sched.finish(old)
    new = running(sched, "b")
    assert new.slot == old.slot and not sched.finish(old)
    assert sched.get("a") is None and sched.admitted == {new.slot: new}


def test_all_layers_and_large_pieces_when_nobody_runs():
    sched = scheduler()
    long = prefilling(sched, "a", 1000)
    pieces = []
    while (step := sched.plan(9)).chunk:
        assert step.layers == 9
        pieces.append(step.chunk.count)
        sched.prefilled(step.chunk)
    assert pieces == [512, 488] and long.computed == 1000


def test_other_work_takes_no_longer_than_the_stall_allowed():
    sched = scheduler(stall_ratio=2.0)
    running(sched, "a")
    sched.step_pace.observe(1, 0.1)
    sched.prefill_pace.observe(1000, 1.0)
    sched.layer_pace.observe(1, 0.03)
    prefilling(sched, "b", 1000)
    step = sched.plan(0)
    assert step.chunk.count == 192  # of 200 tokens in 0.2 s, whole blocks
    assert [(s.layers, bool(s.chunk)) for s in (sched.plan(50) for _ in range(4))] == [
        (6, False),
        (0, True),
    ] * 2


def test_before_anything_is_measured_as_little_as_possible_is_done_between_steps():
    sched = scheduler()
    running(sched, "a")
    prefilling(sched, "b", 1000)
    assert (sched.plan(0).chunk.count, sched.plan(50).layers) == (32, 1)


def test_small_pieces_while_one_is_about_to_run():
    sched = scheduler()
    wanted = sequence("a")
    sched.add(wanted)
    sched.admit()
    sched.receive(wanted)
    prefilling(sched, "b", 1000)
    step = sched.plan(4)
    assert (step.layers, step.chunk.count) == (4, 32)


def test_prompts_are_computed_one_after_the_other():
    sched = scheduler(chunk=64)
    for name in "ab":
        prefilling(sched, name, 100)
    order = []
    while chunk := sched.plan(0).chunk:
        order.append((chunk.sequence.id, chunk.first, chunk.count))
        sched.prefilled(chunk)
    assert order == [("a", 0, 64), ("a", 64, 36), ("b", 0, 64), ("b", 64, 36)]


def test_a_prefill_rank_holds_the_prompts_blocks_until_they_are_sent():
    sched = scheduler(slots=2, blocks=4)
    prompt = Sequence("a", [7] * 100, 0)
    sched.add(prompt)
    assert sched.admit() == [prompt] and len(prompt.blocks) == 4
    sched.prefill(prompt)
    sched.prefilled(sched.plan(0).chunk)
    assert sched.plan(0).chunk is None and sched.pool.available == 0
    assert sched.finish(prompt) and sched.pool.available == 4 and sched.pool.cached == 3


def test_one_that_can_never_fit_is_refused_and_blocks_nobody():
    sched = scheduler(blocks=4)
    with pytest.raises(PromptError, match="1 to 128 fit"):
        sched.add(sequence("a", 100, 29))
    with pytest.raises(PromptError, match="0 prompt"):
        sched.add(Sequence("b", [], 4))
    sched.add(sequence("a", 100, 28))
    assert len(sched.admit()) == 1


def test_a_full_queue_says_when_to_come_again():
    sched = scheduler(slots=1, max_waiting=1)
    running(sched, "a", new=11)
    sched.step_pace.observe(1, 0.5)
    sched.add(sequence("b"))
    with pytest.raises(OverloadError, match="1 requests wait") as refused:
        sched.add(sequence("c"))
    assert refused.value.retry_after_s == 5.0 and sched.get("c") is None


def test_calls_out_of_order_are_refused():
    sched = scheduler()
    wanted = sequence("a")
    sched.add(wanted)
    with pytest.raises(ValueError, match="here already"):
        sched.add(wanted)
    sched.admit()
    with pytest.raises(ValueError, match="0 of 40 tokens"):
        sched.start(wanted, 7)
    with pytest.raises(ValueError, match="not running"):
        sched.advance(wanted, 7)
    sched.prefill(wanted)
    with pytest.raises(ValueError, match="prefilling; receiving follows reserved"):
        sched.receive(wanted)
    chunk = sched.plan(0).chunk
    sched.prefilled(chunk)
    with pytest.raises(ValueError, match="40 tokens computed"):
        sched.prefilled(chunk)
    sched.start(wanted, 7)
    with pytest.raises(ValueError, match="running; running follows"):
        sched.start(wanted, 7)


class Rank(RuleBasedStateMachine):
    """A rank without a model: what a scheduler asks is done, clients come and go, transfers fail."""

    @initialize(slots=st.integers(1, 4), blocks=st.integers(6, 16), ratio=st.floats(0.1, 4))
    def start(self, slots, blocks, ratio):
        self.sched = scheduler(slots, blocks, stall_ratio=ratio, max_waiting=5)
        self.content: dict[
            int, tuple[int, ...]
        ] = {}  # block: all tokens up to and with it, when it was completed
        self.arrived: dict[Sequence, int] = {}  # layers of three that have come
        self.order: list[str] = []  # of those that were added and are not yet admitted
        self.number, self.layers_waited = 0, 0

    def written(self, seq, start, end):
        for i in range(start // BLOCK, end // BLOCK):
            self.content[seq.blocks[i]] = tuple(seq.tokens[: (i + 1) * BLOCK])

    @rule(letters=st.text("xy", max_size=3), tail=st.integers(1, 40), new=st.integers(1, 50))
    def come(self, letters, tail, new):
        self.number += 1
        tokens = [ord(letter) for letter in letters for _ in range(BLOCK)] + [9] * tail
        wanted = Sequence(str(self.number), tokens, new, frozenset({EOS}))
        try:
            self.sched.add(wanted)
            self.order.append(wanted.id)
        except PromptError:
            assert wanted.blocks_needed > self.sched.pool.blocks
        except OverloadError:
            assert len(self.sched.waiting) == 5

    @rule(data=st.data())
    def go(self, data):
        ids = [s.id for s in [*self.sched.waiting, *self.sched.admitted.values()]]
        if len(ids) < 2:
            return
        gone = self.sched.cancel(data.draw(st.sampled_from(ids)))
        assert gone.state is State.ENDED and self.sched.cancel(gone.id) is None
        assert self.sched.get(gone.id) is None
        self.order = [id for id in self.order if id != gone.id]
        self.arrived.pop(gone, None)

    @rule(remote=st.booleans())
    def admit(self, remote):
        for seq in self.sched.admit():
            assert seq.id == self.order.pop(0)
            assert seq.cached % BLOCK == 0 and seq.cached < seq.prompt_tokens
            for i in range(seq.cached // BLOCK):
                assert self.content[seq.blocks[i]] == tuple(seq.tokens[: (i + 1) * BLOCK])
            for block in seq.blocks[seq.cached // BLOCK :]:
                self.content[block] = ()
            if remote:
                self.sched.receive(seq)
                self.arrived[seq] = 0
            else:
                self.sched.prefill(seq)

    @rule(kind=st.sampled_from(["step_pace", "prefill_pace", "layer_pace"]), time=st.floats(0, 1))
    def measure(self, kind, time):
        getattr(self.sched, kind).observe(1, time)

    @rule(arrivals=st.lists(st.integers(0, 4), min_size=1, max_size=10), token=st.integers(0, 9))
    def steps(self, arrivals, token):
        for more in arrivals:
            self.step(more, token)

    def step(self, more, token):
        coming = sum(3 - n for n in self.arrived.values())
        arrived = min(more, coming)
        before = self.sched.in_state(State.RUNNING)
        step = self.sched.plan(arrived)
        assert step.layers == arrived if not before else 0 <= step.layers <= arrived
        assert not (before and step.layers and step.chunk)
        self.layers_waited = self.layers_waited + 1 if arrived and not step.layers else 0
        assert self.layers_waited <= 1
        if prefilling := [s for s in self.sched.in_state(State.PREFILLING) if s.computed < s.prompt_tokens]:
            assert step.layers or step.chunk
        for _ in range(step.layers):
            seq = next(s for s, n in self.arrived.items() if n < 3)
            self.arrived[seq] += 1
            if self.arrived[seq] == 3:
                del self.arrived[seq]
                self.written(seq, seq.cached, seq.prompt_tokens)
                self.sched.received(seq, seq.prompt_tokens - seq.computed)
                self.sched.start(seq, token)
        if step.chunk:
            seq, end = step.chunk.sequence, step.chunk.first + step.chunk.count
            assert seq is prefilling[0] and step.chunk.first % BLOCK == 0
            assert step.chunk.count % BLOCK == 0 or end == seq.prompt_tokens
            allowed = self.sched.stall_ratio * self.sched.step_pace.each
            if before and step.chunk.count > BLOCK:
                assert step.chunk.count * self.sched.prefill_pace.each <= allowed * 1.001
            self.written(seq, step.chunk.first, end)
            self.sched.prefilled(step.chunk)
            if end == seq.prompt_tokens:
                self.sched.start(seq, token)
        for seq in self.sched.in_state(State.RUNNING):
            self.written(seq, seq.computed // BLOCK * BLOCK, seq.computed + 1)
            self.sched.advance(seq, token)

    @precondition(lambda self: hasattr(self, "sched"))
    @invariant()
    def everything_has_one_owner(self):
        sched, held = self.sched, list(self.sched.admitted.values())
        assert len(held) <= sched.slots and all(sched.admitted[s.slot] is s for s in held)
        assert [s.id for s in sched.waiting] == self.order
        assert sched.pool.in_use == len({block for s in held for block in s.blocks})
        for seq in held:
            assert len(seq.tokens) <= len(seq.blocks) * BLOCK
            others = {block for s in held if s is not seq for block in s.blocks}
            assert not others & set(seq.blocks[seq.computed // BLOCK :]), (
                "a block that is written has one owner"
            )

    def teardown(self):
        if not hasattr(self, "sched"):
            return
        for _ in range(2000):  # whatever the state, those who stay are served, in bounded steps
            if not self.sched.waiting and not self.sched.admitted:
                break
            self.admit(remote=True)
            self.step(more=4, token=5)
        assert not self.sched.waiting and not self.sched.admitted
        assert self.sched.pool.available == self.sched.pool.blocks


TestRank = Rank.TestCase
TestRank.settings = STATEFUL
