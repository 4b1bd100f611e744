"""A decode rank: slots that requests join and leave at any step, filled from prefill ranks or by computing here.

1. a prompt comes: it waits for a slot and its blocks, and what is cached of it is found        handle, scheduler.admit
2. the hub says where the rest comes from: a prefill rank streams it, or it is computed here    handle
3. between decode steps, arrived layers are taken, or a piece of a prompt is computed           step
4. with the whole prompt in the cache and its first token known, it joins the batch             _start
5. each step's tokens go to the hub; who has ended leaves, its full blocks stay to be found     _decode
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from disagg_tt.blocks import BLOCK, BlockPool
from disagg_tt.cache import PagedCache
from disagg_tt.core import DECODE
from disagg_tt.decode import Batch, Row
from disagg_tt.device import ttnn
from disagg_tt.errors import PeerError, StreamError
from disagg_tt.link import Link
from disagg_tt.model.llama import Llama
from disagg_tt.prefill import first_token
from disagg_tt.run import Run
from disagg_tt.serving.connection import Connection
from disagg_tt.serving.inlet import Inlet
from disagg_tt.serving.journey import Journey
from disagg_tt.serving.protocol import (
    First,
    Message,
    Open,
    Opened,
    Prefill,
    Reserve,
    Reserved,
    Token,
    Tokens,
)
from disagg_tt.serving.rank import CHUNK, Rank, as_message, sequence_of
from disagg_tt.serving.scheduler import Chunk, Scheduler, Sequence, State


class DecodeRank(Rank):
    """One decode rank, with a link from each prefill rank."""

    role = DECODE  # type: ignore[assignment]

    def __init__(
        self,
        model: Llama,
        cache: PagedCache,
        run: Run,
        hub: Connection,
        *,
        prefix_caching: bool = True,
    ):
        """Without `prefix_caching` nothing that was computed for one request serves another."""
        pool = BlockPool(cache.blocks)
        scheduler = Scheduler(cache.slots, pool, most_blocks=cache.blocks_per_slot, chunk=CHUNK)
        super().__init__(model, cache, run, hub, scheduler)
        self._prefix_caching = prefix_caching
        self.batch = Batch(model, cache, run.options.enable_trace)
        self._inlets: dict[str, Inlet] = {}
        self._journeys: dict[Sequence, Journey] = {}
        self._doomed: set[Sequence] = set()  # cancelled while a chunk of theirs comes in: freed at its end
        self._landing: list[Sequence] = []  # whose handover ends with the next step

    def add_link(self, peer: str, link: Link, offset: float) -> None:
        """Let `peer` stream prompts here."""
        receiver = link.receiver(self.run, self.cache, CHUNK)
        self._inlets[peer] = Inlet(peer, link, receiver, offset)

    def warm_up(self) -> None:
        super().warm_up()
        self._step_ms = self.batch.warm_up()

    # ---------------------------------------------------------------- messages

    def handle(self, message: Message) -> None:
        if isinstance(message, Reserve):
            wanted = message.wanted
            most = float("inf") if self._prefix_caching else 0
            sequence = sequence_of(wanted, wanted.max_new_tokens, most)
            if self.queue(sequence, wanted.number):
                self._journeys[sequence] = Journey(wanted.number, wanted.id, time.monotonic())
                self._admit()
        elif isinstance(message, Prefill):
            found = self.scheduler.get(str(message.number))
            if found is None:
                return  # cancelled meanwhile
            if message.decode:
                self._receive(found)
            else:
                self.scheduler.prefill(found)
                self._journeys[found].started_at = time.monotonic()
        elif isinstance(message, Open) and self.meet is not None:
            self.hub.send(Opened(peer=message.peer, address=self.meet.open(message.peer)))
        else:
            raise StreamError(f"a decode rank got {message!r:.200}")

    def _receive(self, sequence: Sequence) -> None:
        """Its prompt comes over a link: the hub says so, or what it told the prefill rank overtakes it."""
        if sequence.state is State.RESERVED:
            self.scheduler.receive(sequence)

    def cancel(self, number: int) -> None:
        sequence = self.scheduler.get(str(number))
        if sequence is None or sequence in self._doomed:
            return
        if any(inlet.sequence is sequence for inlet in self._inlets.values()):
            self._doomed.add(sequence)
        else:
            self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot in self.batch.rows and sequence.state is State.RUNNING:
            self.batch.leave(sequence.slot)
        self.scheduler.finish(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._journeys[sequence]
        self._doomed.discard(sequence)
        if sequence in self._landing:
            self._landing.remove(sequence)

    def _admit(self) -> None:
        for sequence in self.scheduler.admit():
            self.cache.assign(sequence.slot, sequence.blocks)
            journey = self._journeys[sequence]
            waited = (time.monotonic() - journey.came_at) * 1e3
            self.hub.send(Reserved(number=journey.number, cached=sequence.cached, waited_ms=waited))

    # ---------------------------------------------------------------- links

    def link_sockets(self) -> list[Any]:
        return [socket for inlet in self._inlets.values() for socket in inlet.link.control.sockets]  # type: ignore[attr-defined]

    def take_links(self) -> None:
        for peer, link, offset in self.meet.arrived() if self.meet is not None else ():
            if peer in self._inlets:
                self._lose_link(self._inlets[peer], PeerError("it is made anew"))
            self.add_link(peer, link, offset)
        for inlet in list(self._inlets.values()):
            try:
                if not inlet.poll(self._announced):
                    logger.debug("{} ends", inlet.peer)
                    self._drop_inlet(inlet)
            except (PeerError, StreamError) as error:
                self._lose_link(inlet, error)

    def _announced(self, inlet: Inlet, number: int, tokens: int) -> None:
        """Let a chunk come that continues a prompt which is waited for."""
        sequence = self.scheduler.get(str(number))
        if sequence is not None:
            self._receive(sequence)
        if sequence is None or sequence.state is not State.RECEIVING or self.stopping:
            inlet.refuse(number)
            return
        left = sequence.prompt_tokens - sequence.computed
        if not 0 < tokens <= min(left, CHUNK) or (tokens < left and tokens % BLOCK):
            raise StreamError(
                f"{inlet.peer} announces {tokens} tokens of request {number}; {left} are left to come"
            )
        first = sequence.computed // BLOCK
        blocks = sequence.blocks[first : first + -(-tokens // BLOCK)]
        inlet.accept(sequence, number, tokens, self.cache.table_row(blocks))

    def _take_layers(self, most: int) -> None:
        """Put up to `most` arrived layers, and every chunk whose last one they are, into the cache."""
        for inlet in list(self._inlets.values()):
            try:
                while inlet.pending and (most > 0 or inlet.ended):
                    if inlet.ended:
                        self._end_chunk(inlet)
                    else:
                        inlet.take_layer()
                        most -= 1
            except (PeerError, StreamError) as error:
                self._lose_link(inlet, error)

    def _end_chunk(self, inlet: Inlet) -> None:
        sequence = inlet.sequence
        assert sequence is not None
        journey = self._journeys[sequence]
        with self.run.watchdog.guard(f"K and V of request {journey.number} to arrive"):
            arrived = inlet.end()
        if sequence in self._doomed:
            self._free(sequence)
            return
        journey.add(arrived, inlet.peer)
        self.scheduler.received(sequence, arrived.tokens)
        if sequence.computed == sequence.prompt_tokens:
            self._landing.append(sequence)
            self._start(sequence, arrived.next_token)

    def _lose_link(self, inlet: Inlet, error: Exception) -> None:
        """End a link, and with it the requests that were coming over it; of ranks of one job, whose socket is broken, all."""
        if inlet.link.ranks:
            raise error
        self._drop_inlet(inlet)
        sequence = inlet.sequence
        if sequence is not None:
            number, doomed = self._journeys[sequence].number, sequence in self._doomed
            self._free(sequence)
            if not doomed:
                self.fail(number, error, again=True)

    def _drop_inlet(self, inlet: Inlet) -> None:
        """Forget a link."""
        self._inlets.pop(inlet.peer, None)
        inlet.close()

    def settle(self) -> None:
        self._take_while(lambda inlet: inlet.sequence is not None)

    def leave(self) -> None:
        """Take the chunks that are coming in; prefill ranks of the same job end first, with nothing on its way to nobody."""
        super().leave()
        self._take_while(lambda inlet: inlet.link.ranks or inlet.sequence is not None)

    def _take_while(self, coming: Callable[[Inlet], bool]) -> None:
        """Take what comes over the links until it is `coming` over none; raises PeerError when that takes too long."""
        until = time.monotonic() + self.run.options.deadline_s
        while any(map(coming, self._inlets.values())):
            if time.monotonic() > until:
                raise PeerError(
                    f"{', '.join(self._inlets)} did not end in time (--deadline-s sets the limit)"
                )
            if not any(inlet.pending for inlet in self._inlets.values()):
                self._wait_for(self.link_sockets())
            self.take_links()
            self._take_layers(self.run.config.num_hidden_layers)

    # ---------------------------------------------------------------- steps

    @property
    def busy(self) -> bool:
        return bool(
            self.batch.rows
            or self.scheduler.in_state(State.PREFILLING)
            or any(inlet.pending for inlet in self._inlets.values())
        )

    def step(self) -> None:
        self._admit()
        step = self.scheduler.plan(sum(inlet.layers for inlet in self._inlets.values()))
        started = time.monotonic()
        self._take_layers(step.layers)
        if step.layers:
            self.scheduler.layer_pace.observe(step.layers, time.monotonic() - started)
        if step.chunk is not None:
            self._compute(step.chunk)
        if self.batch.rows:
            self._decode()
        self._admit()  # to the slots of those who have ended
        # After the step, which waited for the device anyway: nothing of a running request's pace is spent on it.
        with self.run.watchdog.guard("K and V to arrive"):
            for inlet in self._inlets.values():
                inlet.note_arrivals()

    def _compute(self, chunk: Chunk) -> None:
        """Compute a piece of a prompt over its cached beginning; the last one gives the first token."""
        sequence, started = chunk.sequence, time.monotonic()
        tokens = sequence.tokens[chunk.first : chunk.first + chunk.count]
        logits = self.model.prefill_chunk(
            tokens, chunk.first, self.cache, sequence.blocks, lambda layer, k, v: None
        )
        journey = self._journeys[sequence]
        sampling, logprobs = sequence.sampling
        last = chunk.first + chunk.count == sequence.prompt_tokens
        with self.run.watchdog.guard(f"a chunk of request {journey.number} to be computed"):
            if last:
                choice = first_token(self.model, logits, sequence.prompt_tokens, sampling, logprobs)
            else:
                ttnn.synchronize_device(self.model.mesh)
        now = time.monotonic()
        journey.computed_s += now - started
        self.scheduler.prefill_pace.observe(chunk.count, now - started)
        self.scheduler.prefilled(chunk)
        if not last:
            return
        self.hub.send(
            First(
                number=journey.number,
                token=choice.token,
                logprob=as_message(choice.logprob),
                computed=sequence.prompt_tokens - sequence.cached,
                # for its turn, and for the decode steps between its pieces
                waited_ms=max(0.0, now - journey.started_at - journey.computed_s) * 1e3,
                prefill_ms=journey.computed_s * 1e3,
            )
        )
        self._start(sequence, choice.token)

    def _start(self, sequence: Sequence, token: int) -> None:
        position = sequence.prompt_tokens
        if self.scheduler.start(sequence, token) is not None:
            if sequence in self._landing:
                self.hub.send(self._journeys[sequence].landed())
            self._forget(sequence)
            return
        sampling, logprobs = sequence.sampling
        self.batch.join(sequence.slot, Row(token, position, sampling, logprobs))

    def _decode(self) -> None:
        """Decode one token of every row, and tell the hub; a handover ends when the step begins."""
        started = time.monotonic()
        for sequence in self._landing:
            self.hub.send(self._journeys[sequence].landed())
        self._landing.clear()
        with self.run.watchdog.guard("a decode step"):
            chosen = self.batch.step()
        taken = time.monotonic() - started
        self.scheduler.step_pace.observe(1, taken)
        items = []
        for slot, choice in chosen.items():
            sequence = self.scheduler.admitted[slot]
            number = self._journeys[sequence].number
            reason = self.scheduler.advance(sequence, choice.token)
            items.append(
                Token(number=number, token=choice.token, finish=reason, logprob=as_message(choice.logprob))
            )
            if reason is not None:
                self.batch.leave(slot)
                self._forget(sequence)
        self.hub.send(Tokens(items=items, step_ms=taken * 1e3))

    def doing(self) -> str:
        parts = {
            "decode": bool(self.batch.rows),
            "receive": bool(self.scheduler.in_state(State.RECEIVING)),
            "prefill": bool(self.scheduler.in_state(State.PREFILLING)),
        }
        return ", ".join(part for part, on in parts.items() if on) or "idle"

    def close(self) -> None:
        """Release the trace, and the links of workers that were started by hand."""
        self.batch.close()
        for inlet in self._inlets.values():
            inlet.close()
