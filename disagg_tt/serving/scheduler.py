"""What a rank does next: who gets a slot, which piece of a prompt is computed, when the running requests step.

             admit            receive                received, start
    WAITING ───────► RESERVED ───────► RECEIVING ──────────────────────► RUNNING ─── advance ───► ENDED
                        │    prefill                prefilled ..., start    ▲                       ▲
                        └────────────► PREFILLING ──────────────────────────┘        finish, cancel ┘ from any state

A sequence waits, first come first served, for a slot and for all blocks that it can ever need, so a running one never
runs out. It is then told where its prompt's K and V come from: from a prefill rank (`receive`), or computed here over
what is cached (`prefill`). Between two decode steps the rank does one other thing, either arriving layers or a piece of
a prompt, and no more of it than takes `stall_ratio` decode steps, as measured: running requests keep their pace.

A prefill rank uses the same: sequences with `max_new_tokens` 0, all of them `prefill`, ended by `finish` once sent.
Pure: no tensor, no clock, one thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from disagg_tt.blocks import BLOCK, BlockPool, chain, extend
from disagg_tt.errors import OverloadError, PromptError
from disagg_tt.serving.pace import Pace


class State(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    RECEIVING = "receiving"
    PREFILLING = "prefilling"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """One request on this rank.

    tokens: the prompt, and what was generated after it. cached: the prompt's tokens found in cache, whole blocks.
    computed: tokens whose K and V are here and valid; `tokens[computed]` is the next to be fed. blocks: in token order,
    the cached ones first. most_cached: tokens of cache that may be used. sampling: the engine's, not read here.
    """

    id: str
    tokens: list[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    sampling: Any = None
    most_cached: float = float("inf")
    state: State = State.WAITING
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    computed: int = 0
    prompt_tokens: int = field(init=False)
    hashes: list[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.hashes = chain(self.tokens)

    @property
    def blocks_needed(self) -> int:
        return -(-(self.prompt_tokens + self.max_new_tokens) // BLOCK)


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt to compute: `count` tokens from `first`, which is a block's first; whole blocks up to the last."""

    sequence: Sequence
    first: int
    count: int


@dataclass(frozen=True)
class Step:
    """What to do before the running requests' next step: take up to `layers` arrived layers, or compute `chunk`."""

    layers: int
    chunk: Chunk | None


class Scheduler:
    """The sequences of one rank, its slots, and its blocks."""

    def __init__(
        self,
        slots: int,
        pool: BlockPool,
        *,
        most_blocks: int | None = None,
        max_waiting: int = 256,
        stall_ratio: float = 1.0,
        chunk: int = 512,
    ):
        """`most_blocks`: of one sequence, None for all there are.

        `stall_ratio`: decode steps that other work may take between two; `chunk`: tokens of a piece when none run.
        """
        self.slots, self.pool = slots, pool
        self.most_blocks = pool.blocks if most_blocks is None else min(most_blocks, pool.blocks)
        self.max_waiting, self.stall_ratio, self.chunk = max_waiting, stall_ratio, chunk
        self.waiting: deque[Sequence] = deque()
        self.admitted: dict[int, Sequence] = {}  # by slot, in the order of admission
        self._by_id: dict[str, Sequence] = {}
        self._layers_were_last = False
        # s a token, a layer, a step. Until they are measured: as little as possible between two steps.
        self.prefill_pace, self.layer_pace, self.step_pace = Pace(float("inf")), Pace(float("inf")), Pace(0.0)

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`. PromptError for one that can never fit; OverloadError when too many wait."""
        if sequence.id in self._by_id:
            raise ValueError(f"request {sequence.id} is here already")
        if not sequence.tokens or sequence.blocks_needed > self.most_blocks:
            raise PromptError(
                f"request {sequence.id}: {sequence.prompt_tokens} prompt and {sequence.max_new_tokens} new tokens; "
                f"1 to {self.most_blocks * BLOCK} fit a slot. Shorten the prompt or ask for fewer tokens"
            )
        if len(self.waiting) >= self.max_waiting:
            raise OverloadError(
                f"{len(self.waiting)} requests wait, as many as may; try again later",
                retry_after_s=self.next_slot_s,
            )
        self.waiting.append(sequence)
        self._by_id[sequence.id] = sequence

    @property
    def next_slot_s(self) -> float:
        """How long until a running sequence must have ended, s: the fewest tokens left, at the measured pace."""
        left = [s.prompt_tokens + s.max_new_tokens - len(s.tokens) for s in self.in_state(State.RUNNING)]
        return min(left, default=0) * self.step_pace.each

    def in_state(self, *states: State) -> list[Sequence]:
        """Return the admitted sequences in one of `states`, in the order of admission."""
        return [sequence for sequence in self.admitted.values() if sequence.state in states]

    def all(self) -> list[Sequence]:
        """Return the sequences that have not ended."""
        return [*self._by_id.values()]

    def get(self, id: str) -> Sequence | None:
        """Return the sequence with this id, waiting or admitted."""
        return self._by_id.get(id)

    def admit(self) -> list[Sequence]:
        """Give slots and blocks to those who wait, in order, as far as they go; return them, now RESERVED.

        The head of the queue is never overtaken, so a big request waits for blocks at most as long as those who hold them.
        """
        admitted = []
        while self.waiting and len(self.admitted) < self.slots:
            head = self.waiting[0]
            # at least one token of the prompt is computed: its logits give the first new one
            reusable = head.hashes[: int(min(head.prompt_tokens - 1, head.most_cached)) // BLOCK]
            reserved = self.pool.reserve(reusable, head.blocks_needed)
            if reserved is None:
                break
            self.waiting.popleft()
            head.blocks, matched = reserved
            head.cached = head.computed = matched * BLOCK
            head.slot = next(slot for slot in range(self.slots) if slot not in self.admitted)
            head.state = State.RESERVED
            self.admitted[head.slot] = head
            admitted.append(head)
        return admitted

    def receive(self, sequence: Sequence) -> None:
        """Its prompt's K and V, from token `cached` on, will come from a prefill rank."""
        self._move(sequence, (State.RESERVED,), State.RECEIVING)

    def prefill(self, sequence: Sequence) -> None:
        """Its prompt's K and V, from token `cached` on, are to be computed here."""
        self._move(sequence, (State.RESERVED,), State.PREFILLING)

    def plan(self, arrived_layers: int) -> Step:
        """Say what to do now, `arrived_layers` layers of receiving sequences being there to be taken."""
        if not self.in_state(State.RUNNING):
            soon = bool(
                self.in_state(State.RECEIVING)
            )  # whose client has a token already, and awaits the next
            return Step(arrived_layers, self._next_chunk(self._fitting_chunk() if soon else self.chunk))
        prefilling = any(s.computed < s.prompt_tokens for s in self.in_state(State.PREFILLING))
        self._layers_were_last = bool(arrived_layers) and not (prefilling and self._layers_were_last)
        if self._layers_were_last:
            layers = max(1, min(arrived_layers, int(self._stall_s / self.layer_pace.each)))
            return Step(layers, None)
        return Step(0, self._next_chunk(self._fitting_chunk()))

    @property
    def _stall_s(self) -> float:
        return self.stall_ratio * self.step_pace.each

    def _fitting_chunk(self) -> int:
        """The tokens, whole blocks, that are computed within the stall allowed; one block at least, or nothing would go on."""
        blocks = int(self._stall_s / self.prefill_pace.each) // BLOCK
        return min(max(1, blocks) * BLOCK, self.chunk)

    def _next_chunk(self, size: int) -> Chunk | None:
        """The next piece of the prompt that was admitted first: one after the other, which has the first one out soonest."""
        for sequence in self.in_state(State.PREFILLING):
            if left := sequence.prompt_tokens - sequence.computed:
                return Chunk(sequence, sequence.computed, min(size, left))
        return None

    def prefilled(self, chunk: Chunk) -> None:
        """`chunk` was computed: its K and V are in the cache. With the prompt's last one, `start` follows."""
        sequence = chunk.sequence
        if sequence.state is not State.PREFILLING or chunk.first != sequence.computed:
            raise ValueError(
                f"request {sequence.id} is {sequence.state.value}, {sequence.computed} tokens computed"
            )
        self._complete(sequence, chunk.count)

    def received(self, sequence: Sequence, tokens: int) -> None:
        """Every layer of the prompt's next `tokens` tokens is in the cache, found whole. With the last, `start` follows."""
        if sequence.state is not State.RECEIVING or sequence.computed + tokens > sequence.prompt_tokens:
            raise ValueError(
                f"request {sequence.id} is {sequence.state.value}, {sequence.computed} of {sequence.prompt_tokens} tokens "
                f"are here; {tokens} more cannot be"
            )
        self._complete(sequence, tokens)

    def start(self, sequence: Sequence, token: int) -> str | None:
        """Run it, its prompt being in the cache, after its first token; return as `advance` does."""
        if sequence.computed < sequence.prompt_tokens:
            raise ValueError(
                f"request {sequence.id}: {sequence.computed} of {sequence.prompt_tokens} tokens are here"
            )
        self._move(sequence, (State.RECEIVING, State.PREFILLING), State.RUNNING)
        return self._take(sequence, token)

    def advance(self, sequence: Sequence, token: int) -> str | None:
        """A decode step has put its last token's K and V in the cache, and given `token`.

        Returns None, or why the sequence has ended: "stop" (`token` is an EOS token) or "length".
        """
        if sequence.state is not State.RUNNING:
            raise ValueError(f"request {sequence.id} is {sequence.state.value}, not running")
        self._complete(sequence, 1)
        return self._take(sequence, token)

    def finish(self, sequence: Sequence) -> bool:
        """Free slot and blocks, at once and exactly once, in any state; return whether there was something to free."""
        if self._by_id.get(sequence.id) is not sequence:
            return False
        del self._by_id[sequence.id]
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            del self.admitted[sequence.slot]
            self.pool.release(sequence.blocks)
        sequence.state = State.ENDED
        return True

    def cancel(self, id: str) -> Sequence | None:
        """`finish` the sequence with this id and return it; None where it has ended or never came."""
        sequence = self._by_id.get(id)
        return sequence if sequence is not None and self.finish(sequence) else None

    def _move(self, sequence: Sequence, sources: tuple[State, ...], target: State) -> None:
        if sequence.state not in sources:
            allowed = " or ".join(source.value for source in sources)
            raise ValueError(
                f"request {sequence.id} is {sequence.state.value}; {target.value} follows {allowed}"
            )
        sequence.state = target

    def _complete(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` more have K and V in the cache: their full blocks can be found from now on."""
        before = sequence.computed // BLOCK
        sequence.computed += tokens
        after = sequence.computed // BLOCK
        if after > len(sequence.hashes):
            extend(sequence.hashes, sequence.tokens[: sequence.computed])
        for i in range(before, after):
            self.pool.register(sequence.blocks[i], sequence.hashes[i])

    def _take(self, sequence: Sequence, token: int) -> str | None:
        sequence.tokens.append(token)
        if token in sequence.eos_token_ids:
            reason = "stop"
        elif len(sequence.tokens) - sequence.prompt_tokens >= sequence.max_new_tokens:
            reason = "length"
        else:
            return None
        self.finish(sequence)
        return reason
