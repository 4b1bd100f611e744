"""One generation on its way, from prompt to last token, over workers that may be lost.

1. the router names a decode rank, which reserves a slot and says what it has cached        Flight._reserve
2. the router says where the rest is computed; that rank, and the decode rank, are told     Flight._prefill
3. the first token comes from whoever computed the prompt, the others from the decode rank  Flight._answer
4. a rank that is lost, or a stream that broke, and the generation is begun anew with the tokens that it has: sampling
   depends on seed and position alone, so they go on as they would have                     Flight._run
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from loguru import logger

from disagg_tt.core import DECODE
from disagg_tt.errors import DisaggError, OverloadError, PeerError
from disagg_tt.serving import protocol
from disagg_tt.serving.generation import Account, Generation, NewToken, RequestState
from disagg_tt.serving.protocol import Cancel, Failed, First, Landed, Message, Prefill, Reserve, Reserved
from disagg_tt.tokens import Logprob

if TYPE_CHECKING:
    from disagg_tt.serving.frontend import Frontend

QUEUE_S = 300.0  # that a request may wait for a slot, and then for its prompt's turn
RESTART_S = 300.0  # that it may wait for lost ranks to come again, weights and compilation included
MOST_RESTARTS = 3


class LostError(Exception):
    """A worker that a flight needs is gone, or its stream broke; the flight may begin anew."""


class Flight:
    """One generation on its way: an asynchronous iterator of its tokens."""

    def __init__(self, frontend: Frontend, wanted: Generation):
        self._frontend, self._wanted = frontend, wanted
        self.account = Account(prompt_tokens=len(wanted.tokens))
        self.inbox: asyncio.Queue[Message | LostError | OverloadError] = asyncio.Queue()
        self._number = -1
        self._out: list[int] = []
        self._began = time.monotonic()
        self._arrived = wanted.arrived_at or self._began
        self._phase = "waiting"
        self._decode = self._prefill_rank = ""
        self._tokens = self._run()

    def __aiter__(self) -> AsyncGenerator[NewToken, None]:
        return self._tokens

    async def aclose(self) -> None:
        """Cancel it everywhere, unless it has ended; what is out is its answer then."""
        if self._number in self._frontend.flights and self._answer_tokens and self._phase != "done":
            self._send_cancel()
            self._finish()
        await self._tokens.aclose()
        self._leave()

    def needs(self, name: str) -> bool:
        """Whether it cannot go on without a worker."""
        return name in (self._decode, self._prefill_rank)

    async def _run(self) -> AsyncGenerator[NewToken, None]:
        """Give the tokens; begin anew, with those that are out, when a worker is lost."""
        try:
            while True:
                try:
                    await self._reserve()
                    self._prefill(await self._event(Reserved, QUEUE_S))
                    async for token in self._answer():
                        yield token
                    return
                except LostError as lost:
                    await self._begin_anew(str(lost))
        finally:
            self._leave()

    async def _begin_anew(self, reason: str) -> None:
        self._leave()
        self.account.restarts += 1
        if self.account.restarts > MOST_RESTARTS:
            raise PeerError(f"{reason}; {MOST_RESTARTS} times in one generation is too often")
        logger.info("a generation begins anew after {} tokens: {}", len(self._out), reason)
        front, until = self._frontend, time.monotonic() + RESTART_S
        self._decode, self._prefill_rank, self._phase = "", "", "waiting"
        front.waiting_for_ranks.add(self)
        try:
            while not front.hub.of_role(DECODE):
                if front.stopping:
                    raise front.ending()
                await asyncio.wait_for(front.joined.wait(), until - time.monotonic())
        except asyncio.TimeoutError:
            raise PeerError(f"{reason}; no decode worker came within {RESTART_S:g} s") from None
        finally:
            front.waiting_for_ranks.discard(self)

    @property
    def _id(self) -> str:
        return str(self._number)

    async def _reserve(self) -> None:
        """Have a decode rank reserve; how long that takes depends on its queue."""
        w, front = self._wanted, self._frontend
        self.inbox = asyncio.Queue()
        self._number = next(front.numbers)
        self._message = protocol.Wanted(
            number=self._number,
            id=w.id,
            tokens=[*w.tokens, *self._out],
            max_new_tokens=w.max_new_tokens - len(self._out),
            temperature=float(w.sampling.temperature),
            top_p=float(w.sampling.top_p),
            top_k=w.sampling.top_k,
            seed=w.sampling.seed,
            logprobs=w.logprobs,
            eos_token_ids=sorted(w.eos_token_ids),
        )
        self._decode, self._prefill_rank, self._phase = "", "", "waiting"
        self._decode, why = front.router.choose_decode(self._id, self._message.tokens, w.conversation)
        front.flights[self._number] = self
        self._asked_at = time.monotonic()
        self._send(self._decode, Reserve(wanted=self._message))
        logger.debug("request {}: {} ({})", self._number, self._decode, why)

    def _prefill(self, reserved: Reserved) -> None:
        """Have the prompt computed where the router says."""
        front, account = self._frontend, self.account
        self._reserved, self._reserved_at = reserved, time.monotonic()
        try:
            linked = front.hub.linked_to(self._decode)
            route = front.router.choose_prefill(self._id, reserved.cached, linked)
        except PeerError as error:
            raise LostError(str(error)) from None
        account.route, account.reason = route.kind, route.reason
        self._prefill_rank, self._phase = route.prefill or "", "prefill"
        estimates = ", ".join(f"{kind} {ms:.0f} ms" for kind, ms in route.estimates.items())
        logger.info(
            "request {}: {} ({}; {}), {} of {} tokens cached on {}",
            self._number, route.kind, route.reason, estimates, reserved.cached, len(self._message.tokens), self._decode,
        )  # fmt: skip
        if route.prefill is None:
            self._send(self._decode, Prefill(number=self._number))
            return
        self._send(self._decode, Prefill(number=self._number, decode=self._decode))
        self._send(
            route.prefill,
            Prefill(number=self._number, wanted=self._message, decode=self._decode, cached=reserved.cached),
        )

    async def _answer(self) -> AsyncGenerator[NewToken, None]:
        """Give the first token when whoever computes the prompt has it, then the decode rank's."""
        first: First | None = None
        early: deque[protocol.Token] = deque()  # that overtook the first one, which another rank sends
        finish: str | None = None
        while finish is None:
            item = await self._event(None, QUEUE_S if first is None else self._frontend.deadline_s)
            if isinstance(item, First):
                first = item
                self._note_first(first)
                finish = self._ended_by(first.token)
                yield self._new(first.token, finish, first.logprob)
            elif isinstance(item, Landed):
                self._phase = "decode"
            elif isinstance(item, protocol.Token):
                early.append(item)
            while first is not None and early and finish is None:
                token = early.popleft()
                finish = token.finish
                yield self._new(token.token, finish, token.logprob)

    def _finish(self) -> None:
        """The answer is whole."""
        self._phase, now = "done", time.monotonic()
        front, arrived = self._frontend, self._arrived
        front.router.finished(self._id, self._answer_tokens, now)
        front.traced.add(self._number, self._wanted.id, self.account, len(self._out), arrived, now)

    @property
    def _answer_tokens(self) -> list[int]:
        """The tokens of this attempt's answer: those before it were its prompt."""
        return self._out[len(self._message.tokens) - len(self._wanted.tokens) :]

    def _ended_by(self, token: int) -> str | None:
        if token in self._wanted.eos_token_ids:
            return "stop"
        return "length" if len(self._out) + 1 >= self._wanted.max_new_tokens else None

    def _new(self, token: int, finish: str | None, logprob: protocol.TokenLogprob | None) -> NewToken:
        self._out.append(token)
        if finish is not None:  # before the token is out: whoever has the last one need not come again
            self._finish()
        found = None if logprob is None else Logprob(logprob.logprob, tuple(logprob.top))
        return NewToken(token, finish, found)

    def _note_first(self, first: First) -> None:
        """Account for the first token: what each part of the way to it took, the last part being the rest."""
        account, now = self.account, time.monotonic()
        prompt, cached = len(self._message.tokens), self._reserved.cached
        self._frontend.router.prefilled(self._id, first.computed, first.prefill_ms)
        self._phase = "transfer" if account.route == "pd" else "decode"
        if account.restarts and self._out:
            return  # the first token was out before
        account.cached_tokens = prompt - first.computed
        account.transferred_tokens = prompt - cached if account.route == "pd" else 0
        account.computed_tokens = 0 if account.route == "pd" else first.computed
        arrived = self._arrived
        parts = {
            "tokenize": (self._began - arrived) * 1e3,
            "restart": (self._asked_at - self._began) * 1e3,
            "queue": self._reserved.waited_ms,
            "reserve": (self._reserved_at - self._asked_at) * 1e3 - self._reserved.waited_ms,
            "prefill_queue": first.waited_ms,
            "prefill": first.prefill_ms,
        }
        account.ttft_ms = (now - arrived) * 1e3
        account.budget_ms = {**parts, "control": account.ttft_ms - sum(parts.values())}

    async def _event(self, kind: type[Message] | None, limit_s: float) -> Any:
        """Return the next event, which must be a `kind`; raises LostError, or what a worker says is wrong."""
        try:
            event = await asyncio.wait_for(self.inbox.get(), limit_s)
        except asyncio.TimeoutError:
            raise PeerError(
                f"request {self._number}: nothing came from {self._decode} {self._prefill_rank} within {limit_s:g} s"
            ) from None
        if isinstance(event, (LostError, OverloadError)):
            raise event
        if isinstance(event, Failed):
            if event.again:
                self._frontend.hub.relink(self._prefill_rank, self._decode)
                raise LostError(event.reason)
            if event.overload:
                raise OverloadError(event.reason, retry_after_s=1.0)
            raise DisaggError(event.reason)
        if kind is not None and not isinstance(event, kind):
            raise DisaggError(f"request {self._number}: {event!r:.200} came out of turn")
        return event

    def _send(self, name: str, message: Message) -> None:
        try:
            self._frontend.hub.send(name, message)
        except PeerError as error:
            raise LostError(str(error)) from None

    def _leave(self) -> None:
        """Take this attempt off the books, and off the ranks if it has not ended there."""
        if self._frontend.flights.pop(self._number, None) is None:
            return
        if self._phase != "done":
            self._send_cancel()
        self._frontend.router.ended(self._id)

    def _send_cancel(self) -> None:
        for name in {self._decode, self._prefill_rank} - {""}:
            if name in self._frontend.hub.workers:
                self._frontend.hub.send(name, Cancel(number=self._number))

    def shown(self, now: float) -> RequestState:
        """Return it as the page shows it."""
        return RequestState(
            id=self._wanted.id,
            conversation=self._wanted.conversation,
            phase=self._phase,
            route=self.account.route,
            prefill_worker=self._prefill_rank,
            decode_worker=self._decode,
            prompt_tokens=len(self._wanted.tokens),
            cached_tokens=self.account.cached_tokens,
            new_tokens=len(self._out),
            age_ms=(now - self._began) * 1e3,
        )
