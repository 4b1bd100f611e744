"""The decode side: slots that are filled by arriving K and V, and steps that give each slot one token.

1. reserve a slot and its pages, and accept the stream            reserve, receiver.accept
2. take the layers as they arrive                                 receiver.receive_layer
3. take the metadata: length and first token                      start
4. one step: every slot in use gets its next token                step
5. a slot whose answer has ended is free again                    step

`Batch` is the device's part of it, which the serving engine uses too; `Decode` keeps a run's slots.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.device import ttnn
from disagg_tt.device.host import read
from disagg_tt.errors import StreamError
from disagg_tt.model.llama import ROWS, Llama
from disagg_tt.perf import Timeline
from disagg_tt.tokens import Choice, Sampling, TextStream, choose


@dataclass
class Row:
    """One slot's part in a step: its last token, where that token's K and V go, and how the next one is chosen.

    logprobs: None, or how many alternatives to report beside each token's own log-probability.
    """

    token: int
    position: int
    sampling: Sampling
    logprobs: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether the device chooses the next token, so that it need not leave it."""
        return self.sampling.greedy and self.logprobs is None


class Batch:
    """The rows of a decode step over `cache.slots` slots, of which any may join or leave between steps."""

    def __init__(self, model: Llama, cache: PagedCache, enable_trace: bool = False):
        """With `enable_trace`, warm_up captures a step as a ttnn trace, and every step replays it."""
        self.model, self.cache = model, cache
        self.rows: dict[int, Row] = {}
        self._enable_trace, self._trace = enable_trace, None
        self._inputs = model.decode_inputs(cache.slots)
        self._logits: Any = None
        self._stale = True  # the rows are no longer what the device holds

    def join(self, slot: int, row: Row) -> None:
        """Let `slot`, whose earlier tokens are in the cache, take part from the next step on."""
        self.rows[slot] = row
        self._stale = True

    def leave(self, slot: int) -> None:
        """Take `slot` out of the steps."""
        del self.rows[slot]
        self._stale = True

    def step(self) -> dict[int, Choice]:
        """Decode one token of every row; return them by slot. Each row moves on to its new token."""
        if self._stale:
            tokens, positions = [0] * self.cache.slots, [-1] * self.cache.slots
            for slot, row in self.rows.items():
                tokens[slot], positions[slot] = row.token, row.position
            self.model.set_decode_inputs(self._inputs, tokens, positions)
            self._stale = False
        self._run()
        chosen = self._choose()
        for slot, row in self.rows.items():
            row.token = chosen[slot].token
            row.position += 1
        return chosen

    def _run(self) -> None:
        """Enqueue one step, as a trace where there is one."""
        if self._trace is None:
            self._enqueue()
        else:
            ttnn.execute_trace(self.model.mesh, self._trace, cq_id=0, blocking=False)

    def _enqueue(self) -> None:
        """Enqueue one step's ops; it ends with the likeliest tokens in the inputs of the next."""
        self._logits = self.model.decode_step(self._inputs, self.cache)
        ttnn.copy(self.model.greedy(self._logits), self._inputs.tokens)

    def _choose(self) -> dict[int, Choice]:
        if all(row.on_device for row in self.rows.values()):
            ids = read(self._inputs.tokens, self._scripted)[0].tolist()
            return {slot: Choice(int(ids[slot])) for slot in self.rows}
        self._stale = True  # what the host chooses has to be written
        vocab = self.model.config.vocab_size
        values = read(self._logits, lambda: torch.zeros(1, 1, ROWS, vocab))[0, 0].float()
        return {s: choose(values[s], r.sampling, r.position + 1, r.logprobs) for s, r in self.rows.items()}

    def _scripted(self) -> torch.Tensor:
        """Return what a mock cluster is taken to say: each slot counts up from its first token."""
        ids = torch.zeros(1, ROWS, dtype=torch.int64)
        for slot, row in self.rows.items():
            ids[0, slot] = (row.token + 1) % self.model.config.vocab_size
        return ids

    def warm_up(self) -> float:
        """Compile a step with every slot in use, capture it if asked, and return what one takes, ms.

        It writes to the first page, which no request has yet.
        """
        mesh, slots = self.model.mesh, self.cache.slots
        self.model.set_decode_inputs(self._inputs, [0] * slots, [0] * slots)
        self._enqueue()
        ttnn.synchronize_device(mesh)
        if self._enable_trace:
            self._trace = ttnn.begin_trace_capture(mesh, cq_id=0)
            self._enqueue()
            ttnn.end_trace_capture(mesh, self._trace, cq_id=0)
        started = time.monotonic()
        self._run()
        ttnn.synchronize_device(mesh)
        self._stale = True
        return (time.monotonic() - started) * 1e3

    def close(self) -> None:
        """Release the trace."""
        if self._trace is not None:
            ttnn.release_trace(self.model.mesh, self._trace)
            self._trace = None


@dataclass
class Slot:
    """One request being decoded. `position` is where its next token's K and V go."""

    request: int
    text: TextStream
    prompt_tokens: int
    blocks: list[int]
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Token:
    """One new token of a request, the text that it settled, and why the answer ended, if it did."""

    request: int
    token: int
    text: str
    finish_reason: str | None


class Decode:
    """Decodes up to `cache.slots` requests together."""

    def __init__(
        self,
        model: Llama,
        cache: PagedCache,
        sampling: Sampling,
        timeline: Timeline,
        enable_trace: bool = False,
    ):
        self.cache, self.sampling, self.timeline = cache, sampling, timeline
        self.batch = Batch(model, cache, enable_trace)
        self.slots: dict[int, Slot] = {}
        self._vocabulary = model.config.vocab_size

    @property
    def running(self) -> int:
        """Slots that have their first token."""
        return len(self.batch.rows)

    def reserve(self, request: int, prompt_tokens: int, text: TextStream) -> int:
        """Take a free slot and its pages for `request`; return the slot. Raises StreamError when none is free."""
        free = [s for s in range(self.cache.slots) if s not in self.slots]
        if not free:
            raise StreamError(f"request {request}: all {self.cache.slots} decode slots are in use")
        slot, pages = free[0], self.cache.blocks_per_slot
        if prompt_tokens > pages * BLOCK:
            raise StreamError(f"request {request}: {prompt_tokens} tokens for a slot of {pages * BLOCK}")
        # Each slot owns a region of the pool, in order: neighbours in the sequence are neighbours in memory.
        blocks = list(range(slot * pages, (slot + 1) * pages))
        self.cache.assign(slot, blocks)
        self.slots[slot] = Slot(request, text, prompt_tokens, blocks)
        return slot

    def table_row(self, slot: int) -> Any:
        """Return the page table of one row that names the pages of `slot`, for a receiver or a LocalSender to fill."""
        return self.cache.table_row(self.slots[slot].blocks)

    def start(self, slot: int, first_token: int) -> Token:
        """Begin decoding `slot`, whose prompt is in the cache, after its first token."""
        entry = self.slots[slot]
        entry.position = entry.prompt_tokens
        self.batch.join(slot, Row(first_token, entry.position, self.sampling))
        return self._take(slot, first_token)

    def step(self) -> list[Token]:
        """Decode one token of every running slot and return them; ended slots become free."""
        started = time.monotonic()
        chosen = self.batch.step()
        taken = time.monotonic() - started
        self.timeline.add("decode step", started, started + taken, slots=len(chosen))
        result = []
        for s, choice in chosen.items():
            slot = self.slots[s]
            slot.position += 1
            slot.steps.append(taken)
            result.append(self._take(s, choice.token))
        return result

    def _take(self, s: int, token: int) -> Token:
        slot = self.slots[s]
        if not 0 <= token < self._vocabulary:
            raise StreamError(
                f"request {slot.request}: token {token}; the vocabulary has 0..{self._vocabulary - 1}"
            )
        slot.tokens.append(token)
        text = slot.text.push(token)
        reason = slot.text.finished
        if reason is None and slot.position >= self.cache.blocks_per_slot * BLOCK:
            reason, text = "length", text + slot.text.flush()
        if reason is not None:
            del self.slots[s]
            self.batch.leave(s)
        return Token(slot.request, token, text, reason)

    def warm_up(self) -> None:
        """Compile a step, and capture it if asked."""
        self.batch.warm_up()

    def close(self) -> None:
        """Release the trace."""
        self.batch.close()
