"""A prefill rank: computes prompts, one at a time and in chunks, and streams each chunk's K and V to a decode rank.

1. a prompt comes, with the decode rank that has reserved for it and the tokens which that has    handle
2. what is cached here too is skipped, the rest is computed chunk by chunk                        step
3. each layer of a chunk leaves when it exists; between chunks a cancelled prompt is dropped      _run_chunk
4. the first token goes to the hub at once, then the stream ends with it                          _run_chunk
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from loguru import logger

from disagg_tt.blocks import BlockPool
from disagg_tt.cache import PagedCache
from disagg_tt.core import PREFILL, Request
from disagg_tt.device import ttnn
from disagg_tt.errors import DisaggError, PeerError, RefusedError, StreamError
from disagg_tt.kv_stream.base import Metadata, PrefillTimes, RemoteSender
from disagg_tt.link import Link
from disagg_tt.model.llama import Llama
from disagg_tt.prefill import first_token
from disagg_tt.run import Run
from disagg_tt.serving.connection import Connection
from disagg_tt.serving.protocol import Connect, First, Linked, Message, Prefill
from disagg_tt.serving.rank import CHUNK, Rank, as_message, sequence_of
from disagg_tt.serving.scheduler import Chunk, Scheduler, Sequence


@dataclass
class _Job:
    """Where a prompt's K and V go: to a link, from token `start` on."""

    number: int
    to: str
    start: int
    came_at: float
    started_at: float = 0.0
    waited_s: float = 0.0  # of the time since, for a busy decode rank


PATIENCE_S = 5e-3  # an idle decode rank has answered by then


class PrefillRank(Rank):
    """One prefill rank, with a link to each decode rank."""

    role = PREFILL  # type: ignore[assignment]

    def __init__(
        self, model: Llama, cache: PagedCache, run: Run, hub: Connection, *, prefix_caching: bool = True
    ):
        """Without `prefix_caching` every prompt is computed whole."""
        pool = BlockPool(cache.blocks)
        scheduler = Scheduler(1, pool, most_blocks=cache.blocks_per_slot, max_waiting=1024, chunk=CHUNK)
        super().__init__(model, cache, run, hub, scheduler)
        self._prefix_caching = prefix_caching
        self._links: dict[str, tuple[Link, RemoteSender]] = {}
        self._jobs: dict[Sequence, _Job] = {}

    def add_link(self, peer: str, link: Link) -> None:
        """Let prompts be streamed to `peer`."""
        sender = link.sender(self.run, CHUNK)
        sender.patience_s = PATIENCE_S
        self._links[peer] = (link, sender)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def handle(self, message: Message) -> None:
        if isinstance(message, Connect) and self.meet is not None:
            self._drop_link(message.peer, PeerError("it is made anew"))
            try:
                self.add_link(message.peer, self.meet.connect(message.peer, message.address))
                self.hub.send(Linked(peer=message.peer))
                logger.info("linked with {}", message.peer)
            except DisaggError as error:
                logger.warning("no link to {}: {}", message.peer, error)
            return
        if not isinstance(message, Prefill) or message.wanted is None:
            raise StreamError(f"a prefill rank got {message!r:.200}")
        sequence = sequence_of(message.wanted, 0, message.cached if self._prefix_caching else 0)
        if self.queue(sequence, message.number):
            self._jobs[sequence] = _Job(message.number, message.decode, message.cached, time.monotonic())

    def cancel(self, number: int) -> None:
        sequence = self.scheduler.cancel(str(number))
        if sequence is not None:
            del self._jobs[sequence]

    def step(self) -> None:
        for sequence in self.scheduler.admit():
            self.scheduler.prefill(sequence)
            self._jobs[sequence].started_at = time.monotonic()
        chunk = self.scheduler.plan(0).chunk
        if chunk is None:
            return
        job = self._jobs[chunk.sequence]
        try:
            self._run_chunk(chunk, job)
        except RefusedError as error:
            logger.debug("request {} is not wanted any more: {}", job.number, error)
            self.cancel(job.number)
            self.fail(job.number, error, again=True)
        except (PeerError, StreamError) as error:
            self._drop_link(job.to, error)

    def _run_chunk(self, chunk: Chunk, job: _Job) -> None:
        sequence, first = chunk.sequence, chunk.first
        # A chunk is all sent, or not at all: what the decode rank has already ends one.
        count = min(chunk.count, job.start - first) if first < job.start else chunk.count
        chunk = Chunk(sequence, first, count)
        called = time.monotonic()
        sender = self._announce(chunk, job) if first >= job.start else None
        started = time.monotonic()
        tokens = sequence.tokens[first : first + count]
        on_layer = sender.send_layer if sender is not None else _nowhere
        logits = self.model.prefill_chunk(tokens, first, self.cache, sequence.blocks, on_layer)
        if sender is not None:
            job.waited_s += sender.waited_s
            started += sender.waited_s
        token = 0
        if first + count == sequence.prompt_tokens:
            token = self._tell_first(sequence, job, logits)
        elif sender is not None:
            with self._guard(f"a chunk of request {job.number} to be computed"):
                ttnn.synchronize_device(self.model.mesh)
        computed = time.monotonic()
        self.scheduler.prefill_pace.observe(count, computed - started)
        if sender is not None:
            metadata = Metadata(job.number, count, token, self.model.config.num_hidden_layers)
            with self._guard(f"K and V of request {job.number} to leave"):
                sender.finish(metadata, PrefillTimes(called, started, computed))
        self.scheduler.prefilled(chunk)
        if sequence.computed == sequence.prompt_tokens:
            self.scheduler.finish(sequence)
            del self._jobs[sequence]

    def _announce(self, chunk: Chunk, job: _Job) -> RemoteSender:
        if job.to not in self._links:
            raise PeerError(f"there is no link to {job.to}; linked are {', '.join(self._links) or 'none'}")
        sender = self._links[job.to][1]
        tokens = chunk.sequence.tokens[chunk.first : chunk.first + chunk.count]
        sender.announce(Request(job.number, tuple(tokens), 0))
        return sender

    def _tell_first(self, sequence: Sequence, job: _Job, logits: Any) -> int:
        sampling, logprobs = sequence.sampling
        with self._guard(f"the first token of request {job.number}"):
            choice = first_token(self.model, logits, sequence.prompt_tokens, sampling, logprobs)
        now = time.monotonic()
        self.hub.send(
            First(
                number=job.number,
                token=choice.token,
                logprob=as_message(choice.logprob),
                computed=sequence.prompt_tokens - sequence.cached,
                waited_ms=(job.started_at - job.came_at + job.waited_s) * 1e3,
                prefill_ms=(now - job.started_at - job.waited_s) * 1e3,
            )
        )
        return choice.token

    def _guard(self, what: str) -> AbstractContextManager[None]:
        return self.run.watchdog.guard(what)

    def _drop_link(self, peer: str, error: Exception) -> None:
        """End a link if there is one, and with it the prompts on their way to `peer`; of ranks of one job, whose socket is broken, all."""
        link = self._links.pop(peer, None)
        if link is not None and link[0].ranks:
            raise error
        if link is not None:
            link[0].close()
        for job in list(self._jobs.values()):
            if job.to == peer:
                self.cancel(job.number)
                self.fail(job.number, error, again=True)

    def leave(self) -> None:
        """Tell the decode ranks that nothing comes any more: no chunk is in hand between two steps."""
        super().leave()
        for peer, (link, _) in self._links.items():
            try:
                link.control.send("bye")
            except PeerError as error:
                logger.debug("{} is not told: {}", peer, error)

    def doing(self) -> str:
        return "prefill" if self._jobs else "idle"

    def close(self) -> None:
        """Close the links of workers that were started by hand."""
        for link, _ in self._links.values():
            if not link.ranks:
                link.close()


def _nowhere(layer: int, k: Any, v: Any) -> None:
    """A chunk's K and V stay here."""
