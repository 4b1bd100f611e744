"""The decode side: slots that are filled by arriving K and V, and steps that give each slot one token.

1. reserve a slot and its pages, and accept the stream            reserve, receiver.accept
2. take the layers as they arrive                                 receiver.receive_layer
3. take the metadata: length and first token                      start
4. one step: every slot in use gets its next token                step
5. a slot whose answer has ended is free again                    step
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
from disagg_tt.tokens import Sampling, TextStream, sample


@dataclass
class Slot:
    """One request being decoded. `position` is where its next token's K and V go."""

    request: int
    text: TextStream
    prompt_tokens: int
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
        """With `enable_trace`, warm_up captures one step as a ttnn trace, and every step replays it."""
        self.model, self.cache, self.sampling, self.timeline = model, cache, sampling, timeline
        self._enable_trace, self._trace = enable_trace, None
        self.slots: dict[int, Slot] = {}
        self._inputs = model.decode_inputs(cache.slots)
        self._logits: Any = None
        self._stale = True  # slots changed since the inputs were written

    @property
    def running(self) -> int:
        """Slots that have their first token."""
        return sum(bool(slot.tokens) for slot in self.slots.values())

    def reserve(self, request: int, prompt_tokens: int, text: TextStream) -> int:
        """Take a free slot and its pages for `request`; return the slot. Raises StreamError when none is free."""
        free = [s for s in range(self.cache.slots) if s not in self.slots]
        if not free:
            raise StreamError(f"request {request}: all {self.cache.slots} decode slots are in use")
        slot, pages = free[0], self.cache.blocks_per_slot
        if prompt_tokens > pages * BLOCK:
            raise StreamError(f"request {request}: {prompt_tokens} tokens for a slot of {pages * BLOCK}")
        # Each slot owns a region of the pool, in order: neighbours in the sequence are neighbours in memory.
        self.cache.assign(slot, list(range(slot * pages, (slot + 1) * pages)))
        self.slots[slot] = Slot(request, text, prompt_tokens)
        return slot

    def start(self, slot: int, first_token: int) -> Token:
        """Begin decoding `slot`, whose prompt is in the cache, after its first token."""
        entry = self.slots[slot]
        entry.position = entry.prompt_tokens
        self._stale = True
        return self._take(slot, first_token)

    def step(self) -> list[Token]:
        """Decode one token of every running slot and return them; ended slots become free."""
        running = {s: slot for s, slot in self.slots.items() if slot.tokens}
        started = time.monotonic()
        if self._stale or not self.sampling.greedy:
            tokens, positions = [0] * self.cache.slots, [-1] * self.cache.slots
            for s, slot in running.items():
                tokens[s], positions[s] = slot.tokens[-1], slot.position
            self.model.set_decode_inputs(self._inputs, tokens, positions)
            self._stale = False
        if self._trace is None:
            self._run_step()
        else:
            ttnn.execute_trace(self.model.mesh, self._trace, cq_id=0, blocking=False)
        chosen = self._choose(running)
        taken = time.monotonic() - started
        self.timeline.add("decode step", started, started + taken, slots=len(running))
        result = []
        for s, slot in running.items():
            slot.position += 1
            slot.steps.append(taken)
            result.append(self._take(s, chosen[s]))
        return result

    def _run_step(self) -> None:
        """Enqueue one step; a greedy one ends with its tokens in the inputs of the next."""
        self._logits = self.model.decode_step(self._inputs, self.cache)
        if self.sampling.greedy:
            ttnn.copy(self.model.greedy(self._logits), self._inputs.tokens)

    def _choose(self, running: dict[int, Slot]) -> dict[int, int]:
        """Return each running slot's next token."""
        if self.sampling.greedy:
            row = read(self._inputs.tokens, lambda: self._scripted(running))[0].tolist()
            return {s: int(row[s]) for s in running}
        vocab = self.model.config.vocab_size
        values = read(self._logits, lambda: torch.zeros(1, 1, ROWS, vocab))[0, 0].float()
        return {s: sample(values[s], self.sampling, slot.position + 1) for s, slot in running.items()}

    def _scripted(self, running: dict[int, Slot]) -> torch.Tensor:
        """Return what a mock cluster is taken to say: each slot counts up from its first token."""
        ids = torch.zeros(1, ROWS, dtype=torch.int64)
        for s, slot in running.items():
            ids[0, s] = (slot.tokens[-1] + 1) % self.model.config.vocab_size
        return ids

    def _take(self, s: int, token: int) -> Token:
        slot = self.slots[s]
        if not 0 <= token < self.model.config.vocab_size:
            raise StreamError(
                f"request {slot.request}: token {token}; the vocabulary has 0..{self.model.config.vocab_size - 1}"
            )
        slot.tokens.append(token)
        text = slot.text.push(token)
        reason = slot.text.finished
        if reason is None and slot.position >= self.cache.blocks_per_slot * BLOCK:
            reason, text = "length", text + slot.text.flush()
        if reason is not None:
            del self.slots[s]
            self._stale = True
        return Token(slot.request, token, text, reason)

    def warm_up(self) -> None:
        """Compile a step with every slot in use, and capture it if asked; it writes to pages that no request has yet."""
        mesh, slots = self.model.mesh, self.cache.slots
        self.model.set_decode_inputs(self._inputs, [0] * slots, [0] * slots)
        self._run_step()
        ttnn.synchronize_device(mesh)
        if self._enable_trace:
            self._trace = ttnn.begin_trace_capture(mesh, cq_id=0)
            self._run_step()
            ttnn.end_trace_capture(mesh, self._trace, cq_id=0)
        self._stale = True

    def close(self) -> None:
        """Release the trace."""
        if self._trace is not None:
            ttnn.release_trace(self.model.mesh, self._trace)
            self._trace = None
