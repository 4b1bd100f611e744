"""Where requests go: to living ranks, by the mode's rule or the lower estimate, and conversations to their cache."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from disagg_tt.blocks import chain
from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import InputError, OverloadError, PeerError
from disagg_tt.serving.conversations import BRANCHES, Conversations
from disagg_tt.serving.ranks import Worker
from disagg_tt.serving.router import Router

STATEFUL = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # a loaded machine
)
PROMPT = list(range(100, 200))


def router(mode: str = "auto", prefill: int = 1, decode: int = 1, **options) -> Router:
    """Prefill ranks p0, p1, ... and decode ranks d0, d1, ... of 4 slots; measured: 1 ms a token; steps of 20 ms."""
    made = Router(mode, **options)
    for role, count in ((PREFILL, prefill), (DECODE, decode)):
        for i in range(count):
            made.join(worker := Worker(f"{role[0]}{i}", role, 4, 64))
            worker.prefill.observe(100, 100.0)
    return made


def turn(made: Router, id: str, tokens, cached=None, answer=(7,) * 40, conversation=None):
    """A whole request; the decode rank has cached what the router believes, unless told otherwise."""
    name, why = made.choose_decode(id, tokens, conversation)
    request = made.requests[id]
    route = made.choose_prefill(
        id, request.decode.cached_tokens(request.reusable) if cached is None else cached
    )
    made.prefilled(id, len(tokens), float(len(tokens)))
    made.finished(id, list(answer), now=1.0)
    return route, why


def begin(made: Router, id: str, tokens=PROMPT) -> str:
    """A request that runs and stays; returns its decode rank."""
    name, _ = made.choose_decode(id, tokens)
    made.choose_prefill(id, 0)
    made.prefilled(id, len(tokens), float(len(tokens)))
    return name


def test_pd_always_goes_over_a_prefill_rank():
    made = router("pd")
    for i in range(3):
        route, _ = turn(made, str(i), PROMPT + [7] * 40 * i)
        assert (route.kind, route.prefill, route.decode, route.reason) == ("pd", "p0", "d0", "mode pd")


def test_ppd_computes_later_turns_where_their_history_is():
    made = router("ppd")
    first, _ = turn(made, "1", PROMPT)
    second, _ = turn(made, "2", PROMPT + [7] * 40 + [5] * 30)
    other, _ = turn(made, "3", [9] * 100)
    assert [(r.kind, r.reason) for r in (first, second, other)] == [
        ("pd", "first turn"),
        ("ppd", "later turn"),
        ("pd", "first turn"),
    ]


@pytest.mark.parametrize("cached", [0, 32])
def test_ppd_with_the_history_evicted_goes_over_a_prefill_rank(cached):
    made = router("ppd")
    turn(made, "1", PROMPT)
    route, _ = turn(made, "2", PROMPT + [7] * 40 + [5] * 30, cached=cached)
    assert (route.kind, route.reason) == ("pd", "history not here")
    assert made.workers["d0"].cached_tokens(chain([9] * 64)) == 0


def test_a_shared_system_prompt_makes_no_later_turn():
    made = router("ppd")
    turn(made, "1", PROMPT[:64] + [1] * 20)
    route, _ = turn(made, "2", PROMPT[:64] + [2] * 20)
    assert (route.kind, route.reason) == ("pd", "first turn")
    assert len(made.conversations) == 2


def test_only_prefill_ranks_with_a_link_to_the_decode_rank_are_taken():
    made = router("pd", prefill=2)
    for id, linked in (("1", ["p1"]), ("2", ["p1", "p0"]), ("3", [])):
        made.choose_decode(id, PROMPT)
        route = made.choose_prefill(id, 0, linked)
        assert (route.kind, route.prefill) == {"1": ("pd", "p1"), "2": ("pd", "p0"), "3": ("local", None)}[id]


@pytest.mark.parametrize("mode", ["pd", "ppd", "auto"])
def test_without_a_prefill_rank_the_decode_rank_computes(mode):
    route, _ = turn(router(mode, prefill=0), "1", PROMPT)
    assert (route.kind, route.prefill, route.reason) == ("local", None, "no prefill rank")


def test_auto_takes_the_sooner_first_token():
    made = router()
    first, _ = turn(made, "1", PROMPT)
    assert (first.kind, first.reason) == ("ppd", "cheaper local")  # nothing runs, and a handover costs
    begin(made, "2")
    busy, _ = turn(made, "3", [3] * 100)
    assert (busy.kind, busy.reason) == (
        "pd",
        "cheaper remote",
    )  # between decode steps it would take twice as long
    assert busy.estimates["pd"] < busy.estimates["ppd"]


def test_auto_takes_the_decode_rank_for_what_it_has_cached():
    made = router()
    begin(made, "running", [1] * 100)
    turn(made, "1", PROMPT * 5, answer=[7] * 200)  # which the prefill rank has not seen
    later, _ = turn(made, "2", PROMPT * 5 + [7] * 200 + [5] * 30)
    assert (later.kind, later.reason) == ("ppd", "cheaper local")


def test_running_requests_are_not_delayed_beyond_the_bound():
    made = router(max_delay_steps=16)
    begin(made, "running", [1] * 100)
    for _ in range(30):
        made.transfer.observe(100, 5000.0)  # a slow wire: the local prefill would be sooner
    route, _ = turn(made, "1", [2] * 400)
    assert (route.kind, route.reason) == ("pd", "delay bound")
    assert route.estimates["pd"] > route.estimates["ppd"]
    short, _ = turn(made, "2", [3] * 300)
    assert (short.kind, short.reason) == ("ppd", "cheaper local")  # 300 ms are less than 16 steps of 20 ms


def test_in_a_burst_the_decode_steps_to_come_count_as_those_that_run():
    made = router()
    alone, _ = turn(made, "1", [1] * 100)
    for i in range(2, 6):  # of one moment: nobody has a token yet
        made.choose_decode(f"{i}", [i] * 100)
    burst = made.choose_prefill("2", 0)
    assert not made.workers["d0"].running
    assert burst.estimates["ppd"] == 2 * alone.estimates["ppd"]


def test_a_hopeless_prefill_queue_is_worth_a_delay():
    made = router(max_delay_steps=16)
    begin(made, "running", [1] * 100)
    made.mode = "pd"
    for i in range(10):
        made.choose_decode(f"queued {i}", [i] * 400)
        made.choose_prefill(f"queued {i}", 0)
    made.mode = "auto"
    made.choose_decode("1", [99] * 400)
    route = made.choose_prefill("1", 0)
    assert (route.kind, route.reason) == ("ppd", "prefill queue")


def test_a_way_that_was_never_measured_is_measured():
    made = Router("auto")
    for name, role in (("p0", PREFILL), ("d0", DECODE)):
        made.join(Worker(name, role, 4, 64))
    ways = [turn(made, f"{i}", [i] * 100)[0] for i in range(3)]
    assert [(way.kind, way.reason) for way in ways] == [
        ("ppd", "cheaper local"),
        ("pd", "to measure"),
        ("ppd", "cheaper local"),
    ]


def test_a_way_not_taken_is_tried_again():
    made = router()
    made.workers["d0"].prefill.observe(100, 5000.0)  # an outlier
    kinds = []
    for i in range(200):
        made.choose_decode(str(i), [i] * 100)
        route = made.choose_prefill(str(i), 0)
        kinds.append(route.kind)
        made.prefilled(str(i), 100, 100.0)
        made.ended(str(i))
    assert kinds[0] == "pd" and kinds[-1] == "ppd"


def test_the_prefill_rank_with_the_shorter_way_is_taken():
    made = router("pd", prefill=2)
    made.choose_decode("1", PROMPT)
    assert made.choose_prefill("1", 0).prefill == "p0"
    made.choose_decode("2", [5] * 100)
    assert made.choose_prefill("2", 0).prefill == "p1"  # p0 has something to do
    for id in ("1", "2"):
        made.prefilled(id, 100, 100.0)
    made.choose_decode("3", [5] * 100)
    assert made.choose_prefill("3", 0).prefill == "p1"  # which has computed this before


@pytest.mark.parametrize("mode", ["pd", "ppd", "auto"])
def test_a_conversation_stays_where_its_cache_is(mode):
    made = router(mode, decode=3)
    homes = {}
    for i in range(3):
        homes[i] = made.choose_decode(f"{i}", [i] * 100)[0]
        made.choose_prefill(f"{i}", 0)
    assert len(set(homes.values())) == 3  # the least loaded each time
    for i in range(3):
        made.prefilled(f"{i}", 100, 100.0)
        made.finished(f"{i}", [7] * 40, now=0.0)
    for i in (2, 0, 1):
        route, why = turn(made, f"later {i}", [i] * 100 + [7] * 40 + [5] * 10)
        assert (route.decode, why) == (homes[i], "cached here")


def test_a_conversation_stays_at_its_cache_also_where_more_is_running():
    made = router(decode=2)
    home = turn(made, "1", PROMPT)[0].decode
    while made.workers[home].requests < 3:  # of 4 slots
        made.choose_decode(f"more {len(made.requests)}", [len(made.requests)] * 50)
    assert made.choose_decode("2", PROMPT + [7] * 40) == (home, "cached here")


def test_a_cache_counts_also_where_nothing_is_gained_in_time():
    made = router("pd", decode=2)
    home = turn(made, "1", PROMPT)[0].decode
    other = {"d0": "d1", "d1": "d0"}[home]
    made.workers = {name: made.workers[name] for name in ("p0", other, home)}  # not for being the first
    made.transfer.observe(100, 0.0)
    assert made.choose_decode("2", PROMPT + [7] * 40) == (home, "cached here")


def test_a_conversation_leaves_a_decode_rank_that_is_full():
    made = router(decode=2)
    turn(made, "1", PROMPT)
    for i in range(8):
        made.choose_decode(f"{i}", PROMPT)
    assert {w.name: w.requests for w in made.of_role(DECODE)} == {"d0": 4, "d1": 4}


def test_an_evicted_prefix_is_forgotten_once_the_rank_says_so():
    made = router(decode=2)
    turn(made, "1", PROMPT)
    name, why = made.choose_decode("2", PROMPT)
    assert why == "cached here"
    made.choose_prefill("2", 32)  # of 96
    assert made.workers[name].cached_tokens(chain(PROMPT)) == 32


def test_nothing_is_routed_to_a_lost_rank():
    made = router("pd", prefill=2, decode=2)
    first = made.choose_decode("1", PROMPT)[0]
    route = made.choose_prefill("1", 0)
    assert made.lost(route.prefill) == ["1"]
    again = made.choose_prefill("1", 0)
    assert again.prefill not in (None, route.prefill)
    assert made.lost(first) == ["1"] and made.lost(first) == []
    with pytest.raises(PeerError, match="route it anew"):
        made.choose_prefill("1", 0)
    assert made.choose_decode("1", PROMPT)[0] != first
    assert made.choose_prefill("1", 0).kind == "pd"


def test_a_rank_that_comes_back_has_nothing_cached_and_no_load():
    made = router("ppd")
    turn(made, "1", PROMPT)
    begin(made, "2")
    made.join(Worker("d0", DECODE, 4, 64))
    assert [c.decode_worker for c in made.conversations.newest_first()] == [""]
    made.ended("2")
    worker = made.workers["d0"]
    assert (worker.requests, worker.running, worker.cached_tokens(chain(PROMPT))) == (0, 0, 0)
    route, _ = turn(made, "3", PROMPT + [7] * 40 + [5] * 30)
    assert (route.kind, route.reason) == ("pd", "history not here")


def test_overload_says_when_to_come_again():
    made = router(max_waiting=2, decode=0)
    with pytest.raises(OverloadError, match="no decode rank") as refused:
        made.admission()
    assert refused.value.unavailable
    with pytest.raises(OverloadError):
        made.choose_decode("0", PROMPT)
    made.join(Worker("d0", DECODE, 1, 64))
    for i in range(2):
        made.admission()
        made.choose_decode(f"{i}", [i] * 100)
    with pytest.raises(OverloadError, match="2 requests wait") as refused:
        made.admission()
    assert not refused.value.unavailable
    assert refused.value.retry_after_s == pytest.approx(
        2 * 64 * 20 / 1000
    )  # two answers of 64 steps of 20 ms
    made.choose_prefill("0", 0)
    made.prefilled("0", 100, 100.0)
    made.admission()


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="choose one of pd, ppd, auto"):
        Router("fast")
    made = router()
    with pytest.raises(InputError):
        made.mode = ""
    assert made.mode == "auto"


def recognised(conversations: Conversations, tokens, name=None) -> str | None:
    found = conversations.find(name, tokens, chain(tokens))
    return found.id if found else None


@pytest.mark.parametrize("prompt", [1, 5, 31, 32, 33, 63, 64, 100])
@pytest.mark.parametrize("answer", [1, 2, 20, 32, 70])
def test_a_prompt_that_goes_on_is_recognised(prompt, answer):
    known = Conversations()
    tokens = [3] * prompt + [4] * answer
    known.answered("c", tokens, prompt, chain(tokens), "d0", 0.0)
    assert recognised(known, [*tokens, 8, 9]) == "c"
    assert (
        recognised(known, [*tokens[: -(answer // 2)], 8, 9] if answer > 1 else tokens) == "c"
    )  # its end cut
    assert recognised(known, [5, *tokens]) is None
    if answer > 1:
        assert recognised(known, [3] * prompt + [9] * 40) is None  # the same question, another answer


def test_the_longest_of_two_conversations_is_continued():
    known = Conversations()
    for name, tokens in (("short", [1] * 40), ("long", [1] * 90)):
        known.answered(name, tokens, len(tokens) - 2, chain(tokens), "d0", 0.0)
    assert recognised(known, [1] * 100) == "long" and recognised(known, [1] * 60) == "short"
    assert recognised(known, [2], name="short") == "short" and recognised(known, [1] * 100, name="x") is None


def test_a_question_can_be_edited_and_an_answer_asked_for_again():
    known = Conversations()
    tokens: list[int] = []
    states = []
    for turn in range(BRANCHES + 1):
        prompt = len(tokens) + 20
        tokens = [*tokens, *[turn] * 20, *[99] * 10]
        states.append(tokens)
        known.answered("c", tokens, prompt, chain(tokens), "d0", 0.0)
    assert [recognised(known, [*state, 5]) for state in states] == [None] + ["c"] * BRANCHES


def test_of_two_conversations_with_the_same_words_the_later_is_continued():
    known = Conversations(limit=2)
    for name in ("one", "two"):
        known.answered(name, [1] * 50, 40, chain([1] * 50), "d0", 0.0)
    assert recognised(known, [1] * 60) == "two"
    for name in ("three", "two"):
        known.answered(name, [2] * 50, 40, chain([2] * 50), "d0", 0.0)
    assert recognised(known, [1] * 60) == "two" and recognised(known, [2] * 60) == "two"
    assert [c.id for c in known.newest_first()] == ["two", "three"]


def test_what_is_deepest_is_taken_to_be_evicted_first():
    worker = Worker("d0", DECODE, 4, blocks=3)
    worker.learn(chain([1] * 128))
    assert worker.cached_tokens(chain([1] * 128)) == 96


def test_what_a_slow_wire_does_not_hide_counts():
    made = router("pd")
    made.transfer.observe(100, 150.0)
    made.choose_decode("1", PROMPT)
    assert made.choose_prefill("1", 0).estimates["pd"] == pytest.approx(100 + 50 + 5)


def test_conversations_are_bounded_and_the_one_used_longest_ago_goes():
    known = Conversations(limit=3)
    for i in (0, 1, 2, 0, 3):
        known.answered(f"{i}", [i + 1] * 50, 40, chain([i + 1] * 50), "d0", float(i))
    assert [c.id for c in known.newest_first()] == ["3", "0", "2"]
    assert recognised(known, [2] * 60) is None and recognised(known, [1] * 60) == "0"
    assert known.newest_first()[1].turns == 2
    assert known.clear() == 3 and len(known) == 0 and not known._ends and not known._ends_of


class Routing(RuleBasedStateMachine):
    """Requests, ranks and measurements come and go in any order."""

    @initialize(mode=st.sampled_from(["pd", "ppd", "auto"]))
    def start(self, mode):
        self.router = Router(mode, conversations=5, max_waiting=6)
        self.known: list[list[int]] = []  # prompts with their answers
        self.number = 0
        for name in ("p0", "d0", "d1"):
            self.join(name, blocks=8)

    @rule(name=st.sampled_from(["p0", "p1", "p2", "d0", "d1", "d2"]), blocks=st.integers(1, 20))
    def join(self, name, blocks):
        self.router.join(Worker(name, PREFILL if name[0] == "p" else DECODE, 2, blocks))

    @rule(data=st.data())
    def lose(self, data):
        if len(self.router.workers) > 1:
            name = data.draw(st.sampled_from(sorted(self.router.workers)))
            needed = self.router.lost(name)
            for id in needed:
                request = self.router.requests[id]
                assert name in {w.name for w in (request.decode, request.computing) if w}

    @rule(
        data=st.data(),
        more=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        mode=st.sampled_from(["pd", "ppd", "auto", None]),
    )
    def come(self, data, more, mode):
        self.router.mode = mode or self.router.mode
        history = data.draw(st.sampled_from([[], *self.known]))
        self.number += 1
        full = self.router.waiting >= 6
        try:
            self.router.admission()
            name, _ = self.router.choose_decode(
                str(self.number), history + [t for t in more for _ in range(20)]
            )
        except OverloadError as refused:
            error = refused
        else:
            error = None
        assert (error is not None) == (full or not self.router.of_role(DECODE))
        if error is not None:
            assert error.unavailable == (not self.router.of_role(DECODE)) and error.retry_after_s > 0
            return
        chosen = self.router.workers[name]
        equals = [
            worker
            for worker in self.router.of_role(DECODE)
            if (worker.requests, worker.queued) == (chosen.requests - 1, chosen.queued)
            and not worker.prefill.measured
            and not chosen.prefill.measured
        ]
        request = self.router.requests[str(self.number)]
        cached = chosen.cached_tokens(request.reusable)
        assert all(w.cached_tokens(request.reusable) <= cached for w in equals), "equal load, a better cache"

    @rule(data=st.data(), evicted=st.booleans())
    def place(self, data, evicted):
        ids = [id for id, request in self.router.requests.items() if not request.started]
        if ids:
            self.place_one(data.draw(st.sampled_from(ids)), evicted)

    def place_one(self, id, evicted):
        request, mode = self.router.requests[id], self.router.mode
        cached = 0 if evicted else request.decode.cached_tokens(request.reusable)
        if self.router.workers.get(request.decode.name) is not request.decode:
            with pytest.raises(PeerError):
                self.router.choose_prefill(id, cached)
            return
        route = self.router.choose_prefill(id, cached)
        prefills = {w.name for w in self.router.of_role(PREFILL)}
        assert route.decode == request.decode.name
        assert route.prefill in prefills if route.kind == "pd" else route.prefill is None
        assert (route.kind == "local") == (not prefills)
        if route.kind == "local":
            assert route.reason == "no prefill rank"
        elif mode == "pd":
            assert (route.kind, route.reason) == ("pd", "mode pd")
        elif mode == "ppd":
            assert (route.kind == "ppd") == (route.reason == "later turn")
            assert route.kind == "pd" or (
                cached and request.conversation.decode_worker == request.decode.name
            )
        elif route.reason == "delay bound":
            assert route.kind == "pd" and request.decode.running
        elif route.reason != "to measure":
            assert route.estimates[route.kind] == min(route.estimates.values())

    @rule(data=st.data(), ms=st.floats(0, 1e4), cached=st.integers(0, 50))
    def compute(self, data, ms, cached):
        if self.router.requests:
            id = data.draw(st.sampled_from(sorted(self.router.requests)))
            self.router.prefilled(id, max(1, len(self.router.requests[id].tokens) - cached), ms)

    @rule(data=st.data(), answer=st.lists(st.integers(0, 2), min_size=1, max_size=40), fails=st.booleans())
    def end(self, data, answer, fails):
        if not self.router.requests:
            return
        id = data.draw(st.sampled_from(sorted(self.router.requests)))
        tokens = self.router.requests[id].tokens
        if fails:
            self.router.ended(id)
        else:
            self.router.finished(id, answer, now=float(self.number))
            self.known = [*self.known[-4:], [*tokens, *answer]]
        self.router.ended(id)
        assert id not in self.router.requests

    @rule(data=st.data(), ms=st.floats(1, 1e4), length=st.integers(1, 60))
    def serve_the_newest(self, data, ms, length):
        id = str(self.number)
        if id in self.router.requests:
            self.place_one(id, evicted=False)
            request = self.router.requests[id]
            self.router.prefilled(id, len(request.tokens), ms)
            self.router.finished(id, [3] * length, now=float(self.number))
            self.known = [*self.known[-4:], [*request.tokens, *[3] * length]]

    @invariant()
    def load_is_what_is_in_flight_and_memory_is_bounded(self):
        if not hasattr(self, "router"):
            return
        requests = self.router.requests
        for worker in self.router.workers.values():
            own = [request for request in requests.values() if request.decode is worker]
            assert worker.requests == len(own)
            assert worker.running == sum(request.started for request in own)
            assert set(worker.queued) == {id for id, r in requests.items() if r.computing is worker}
            assert all(tokens >= 1 for tokens in worker.queued.values())
            assert len(worker._known) <= worker.blocks
        conversations = self.router.conversations
        assert len(conversations) <= 5
        ends = {
            (parent, rest): id for parent, rests in conversations._ends.items() for rest, id in rests.items()
        }
        of = {end: id for id, own in conversations._ends_of.items() for end in own}
        assert ends == of and len(of) == sum(map(len, conversations._ends_of.values())) <= 5 * BRANCHES
        assert {c.decode_worker for c in conversations.newest_first()} <= {"", *self.router.workers}


TestRouting = Routing.TestCase
TestRouting.settings = STATEFUL
