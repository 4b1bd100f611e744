"""What prefill and decode ranks have in common: a model, a paged cache with its blocks, and a loop over messages.

The loop never waits while there is work. It ends when the hub says stop; a hub that is gone, or has dropped this rank, is
joined again, with nothing in hand.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq
from loguru import logger

from disagg_tt.blocks import BLOCK
from disagg_tt.cache import PagedCache
from disagg_tt.errors import InputError, OverloadError
from disagg_tt.model.llama import Llama
from disagg_tt.prefill import first_token
from disagg_tt.run import Run
from disagg_tt.serving import protocol
from disagg_tt.serving.connection import Connection, HubLostError
from disagg_tt.serving.meeting import Meeting
from disagg_tt.serving.protocol import Cancel, Failed, Leave, Message, Register, Stop, TokenLogprob, Wanted
from disagg_tt.serving.scheduler import Scheduler, Sequence
from disagg_tt.tokens import Logprob, Sampling

CHUNK = 512  # tokens of a prompt that are computed, and streamed, in one piece
IDLE_MS = 100  # between two looks at what no socket tells of


class Rank(ABC):
    """One rank under a hub. Subclasses say what its messages do and what a step is."""

    role: protocol.Role

    def __init__(self, model: Llama, cache: PagedCache, run: Run, hub: Connection, scheduler: Scheduler):
        self.model, self.cache, self.run = model, cache, run
        self.hub, self.scheduler, self.pool = hub, scheduler, scheduler.pool
        self.meet: Meeting | None = None  # where workers that were started by hand find each other
        self.stopping = False
        self._joining = True
        self._register: Callable[[str], Register]
        self._prefill_ms: list[tuple[int, float]] = []
        self._step_ms = 0.0

    def warm_up(self) -> None:
        """Compile what the rank runs, and measure it; what that writes to the cache no prompt finds."""
        for tokens in (BLOCK, CHUNK):
            self._prefill_ms.append((tokens, second_ms(partial(self._dry_chunk, tokens))))

    def _dry_chunk(self, tokens: int) -> None:
        blocks = [0] * (tokens // BLOCK)
        logits = self.model.prefill_chunk([0] * tokens, 0, self.cache, blocks, lambda layer, k, v: None)
        first_token(self.model, logits, tokens, Sampling())

    def register(self, name: str, settings: dict[str, str], *, in_job: bool) -> None:
        """Join the hub as `name`; raises PeerError or StreamError where that fails."""

        def message(proof: str) -> Register:
            return Register(
                proof=proof,
                name=name,
                role=self.role,
                in_job=in_job,
                digest=self.run.checkpoint.digest(),
                settings=settings,
                slots=self.scheduler.slots,
                blocks=self.pool.blocks,
                max_seq_len=self.cache.blocks_per_slot * BLOCK,
                prefill_ms=self._prefill_ms,
                step_ms=self._step_ms,
            )

        self._register = message
        self.hub.join(message)

    def serve(self) -> None:
        """Work until the hub says stop, or `stop` is called; raises what ends this rank otherwise."""
        self._joining = False
        while not self.stopping:
            try:
                self._take_messages()
                if not self.stopping:
                    self.step()
                self.hub.state = self._state()
            except HubLostError as error:
                self._join_again(error)
        self.leave()

    def stop(self) -> None:
        """End as soon as what is in hand allows; for a signal's handler, so it raises SystemExit where nothing is in hand."""
        if self._joining:
            raise SystemExit(0)
        self.stopping = True

    def _join_again(self, error: HubLostError) -> None:
        """Join the hub anew; raises PeerError when it does not come back in time, or wants this rank no more."""
        if not error.again:
            raise error
        for sequence in self.scheduler.all():
            self.cancel(int(sequence.id))
        self.settle()
        logger.warning("{}; joining again", error)
        self._joining = True
        self.hub.join_again(self._register)
        self._joining = False
        logger.info("joined again")

    def settle(self) -> None:  # noqa: B027 - a prefill rank's chunks are whole between two steps
        """Let what is coming in end."""

    def leave(self) -> None:
        """Say that this rank ends; subclasses let the other ends of the links end well too."""
        try:
            self.hub.send(Leave())
        except HubLostError as error:
            logger.debug("nobody to tell: {}", error)

    def _wait_for(self, sockets: list[Any]) -> None:
        """Wait until one of the sockets has something, or a moment."""
        poller = zmq.Poller()
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        poller.poll(IDLE_MS)

    def _take_messages(self) -> None:
        if not self.busy:
            self._wait_for([*self.hub.sockets, *self.link_sockets()])
        while (message := self.hub.receive()) is not None:
            if isinstance(message, Stop):
                self.stopping = True
                return
            if isinstance(message, Cancel):
                self.cancel(message.number)
            else:
                self.handle(message)
        self.take_links()

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether `step` has something to do without another message."""

    @abstractmethod
    def step(self) -> None:
        """Do the next piece of work, if there is any."""

    @abstractmethod
    def handle(self, message: Message) -> None:
        """Act on a message of the hub's; raises StreamError for one that this role does not get."""

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Free what request `number` holds; it may have ended already, or never have come."""

    def link_sockets(self) -> list[Any]:
        """The sockets of links that have something of their own accord; a prefill rank's have not."""
        return []

    def take_links(self) -> None:  # noqa: B027 - nothing to take is right for a prefill rank
        """Take what the links have."""

    @abstractmethod
    def doing(self) -> str:
        """What the rank is at, for people: a few words."""

    def queue(self, sequence: Sequence, number: int) -> bool:
        """Let `sequence` wait its turn; return False, having told the hub, where it may not."""
        try:
            self.scheduler.add(sequence)
        except (InputError, OverloadError) as error:
            self.fail(number, error)
            return False
        return True

    def fail(self, number: int, error: Exception, *, again: bool = False) -> None:
        """Tell the hub that a request cannot go on here, but might `again`."""
        logger.info("request {}: {}", number, error)
        overload = isinstance(error, OverloadError)
        self.hub.send(Failed(number=number, reason=str(error)[:4000], overload=overload, again=again))

    def _state(self) -> protocol.State:
        return protocol.State(
            in_flight=len(self.scheduler.admitted),
            waiting=len(self.scheduler.waiting),
            blocks_in_use=self.pool.in_use,
            blocks_cached=self.pool.cached,
            doing=self.doing(),
        )


def second_ms(work: Callable[[], None]) -> float:
    """Do `work` twice; return how long the second time took, ms: the first compiles."""
    work()
    started = time.monotonic()
    work()
    return (time.monotonic() - started) * 1e3


def sequence_of(wanted: Wanted, max_new_tokens: int, most_cached: float = float("inf")) -> Sequence:
    """Return `wanted` as a scheduler knows it; its `sampling` is a (Sampling, logprobs)."""
    return Sequence(
        str(wanted.number),
        list(wanted.tokens),
        max_new_tokens,
        frozenset(wanted.eos_token_ids),
        (Sampling(wanted.temperature, wanted.top_p, wanted.top_k, wanted.seed), wanted.logprobs),
        most_cached,
    )


def as_message(found: Logprob | None) -> TokenLogprob | None:
    """Return a log-probability as it travels."""
    return None if found is None else TokenLogprob(logprob=found.logprob, top=list(found.top))
