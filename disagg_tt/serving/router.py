"""Which ranks serve a request, and why.

    choose_decode ──► the decode rank reserves, and says how many tokens it has cached ──► choose_prefill ──► Route
                                                                                             prefilled, then finished
                                                                                             or ended, at any point

pd: each prompt is computed on a prefill rank P and its K and V go to the decode rank D. ppd: the first turn of a
conversation so, later turns on D, which computes only what is new. auto: whichever has the first token out sooner, by
this deployment's measured speeds, as long as those whose answers are running on D are not delayed beyond a bound.

The router sees every request begin and end, so it knows each rank's load without asking; what a rank has cached it
guesses (the last blocks that came to be there, as many as the rank has) and is corrected by what ranks say. All times
are ms, except `now`, s. Pure: no I/O, no clock, one thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from disagg_tt.blocks import BLOCK, chain, extend
from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import InputError, OverloadError, PeerError
from disagg_tt.serving.conversations import Conversation, Conversations
from disagg_tt.serving.pace import Line, Pace
from disagg_tt.serving.ranks import Worker

MODES = ("pd", "ppd", "auto")


@dataclass(frozen=True)
class Route:
    """kind: "pd", "ppd", or "local" (computed on the decode rank because there is no other). estimates: ms by kind.

    reason: one of "mode pd", "first turn", "later turn", "history not here", "cheaper local", "cheaper remote",
    "delay bound", "prefill queue", "to measure", "no prefill rank".
    """

    kind: str
    decode: str
    prefill: str | None
    reason: str
    estimates: dict[str, float]


def reusable(tokens: Sequence[int], hashes: list[bytes]) -> list[bytes]:
    """The blocks of a prompt that may be found in cache: its last token is always computed."""
    return hashes[: (len(tokens) - 1) // BLOCK]


@dataclass
class Request:
    """A request in flight: its prompt, the conversation it continues or begins, and where it counts as load."""

    id: str
    tokens: list[int]
    hashes: list[bytes]
    conversation_id: str
    conversation: Conversation | None
    decode: Worker
    computing: Worker | None = None
    started: bool = False

    @property
    def reusable(self) -> list[bytes]:
        return reusable(self.tokens, self.hashes)


class Router:
    """Routes requests over the workers that have joined. `mode` may be changed at any time; it holds from then on."""

    def __init__(
        self,
        mode: str = "auto",
        *,
        max_waiting: int = 256,
        stall_ratio: float = 1.0,
        max_delay_steps: float = 16.0,
        hopeless: float = 4.0,
        conversations: int = 4096,
    ):
        """`max_waiting`: requests without a token yet. `stall_ratio`: the decode ranks' (scheduler.py).

        `max_delay_steps`: decode steps that a local prefill may cost the running requests, in auto; unless the queue for
        a prefill rank alone takes `hopeless` times as long as the local prefill would.
        """
        self.mode, self.max_waiting, self.stall_ratio = mode, max_waiting, stall_ratio
        self.max_delay_steps, self.hopeless = max_delay_steps, hopeless
        self.workers: dict[str, Worker] = {}
        self.requests: dict[str, Request] = {}
        self.conversations = Conversations(conversations)
        self.transfer = Line(0.05)  # ms for so many tokens
        self.handover = Pace(5.0)  # ms from the end of a transfer to the first decode step
        self.answer = Pace(64.0)  # tokens

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise InputError(f"mode {mode!r}; choose one of {', '.join(MODES)}")
        self._mode = mode

    def join(self, worker: Worker) -> None:
        """`worker` serves from now on, with nothing cached; it takes the place of one with its name."""
        self.lost(worker.name)
        self.workers[worker.name] = worker

    def lost(self, name: str) -> list[str]:
        """The worker is gone, and all it had cached; return the ids of the requests that it was needed for."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return []
        self.conversations.lost(name)
        return [id for id, request in self.requests.items() if worker in (request.decode, request.computing)]

    def of_role(self, role: str) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.role == role]

    def _decode_ranks(self) -> list[Worker]:
        if not (workers := self.of_role(DECODE)):
            raise OverloadError("no decode rank serves; try again later", retry_after_s=5.0, unavailable=True)
        return workers

    @property
    def waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(not request.started for request in self.requests.values())

    def admission(self) -> None:
        """Raise OverloadError when one more request cannot even wait: no decode rank serves, or too many wait."""
        decode = self._decode_ranks()
        if self.waiting >= self.max_waiting:
            queue = min(self._queue_ms(worker) for worker in decode)
            computing = min((self._backlog_ms(worker) for worker in self.of_role(PREFILL)), default=0.0)
            raise OverloadError(
                f"{self.waiting} requests wait, as many as may; try again later",
                retry_after_s=max(1.0, (queue + computing) / 1000),
            )

    def choose_decode(
        self, id: str, tokens: Sequence[int], conversation: str | None = None
    ) -> tuple[str, str]:
        """Return the decode rank for a request, and the reason; it counts as load until `finished` or `ended`.

        The one where what is not cached and the queue cost least; then the least loaded. `conversation` is the client's
        name for it. A request that is routed anew, its rank lost, may be asked for again. Raises OverloadError.
        """
        self.ended(id)
        hashes = chain(tokens)
        found = self.conversations.find(conversation, tokens, hashes)
        name = conversation or (found.id if found else id)
        cached = {w: w.cached_tokens(reusable(tokens, hashes)) for w in self._decode_ranks()}

        def cost(worker: Worker) -> tuple[float, float, int]:
            lacking = len(tokens) - cached[worker]
            fetch = self.transfer(lacking) if self.mode == "pd" else self._prefill_ms(worker, lacking)
            return self._queue_ms(worker) + fetch, worker.requests / worker.slots, -cached[worker]

        best = min(cached, key=cost)
        best.requests += 1
        self.requests[id] = Request(id, list(tokens), hashes, name, found, best)
        if len(cached) == 1:
            return best.name, "only decode rank"
        return best.name, "cached here" if cached[best] > min(cached.values()) else "least loaded"

    def choose_prefill(self, id: str, cached_tokens: int, linked: Collection[str] | None = None) -> Route:
        """Return where the prompt is computed, its decode rank having reserved and found `cached_tokens` in its cache.

        `linked`: the prefill ranks that can send to it, None for all. Raises PeerError where the decode rank is lost.
        """
        request = self.requests[id]
        decode = request.decode
        if self.workers.get(decode.name) is not decode:
            raise PeerError(f"request {id}: its decode rank is lost; route it anew")
        self._stop_computing(request)
        decode.unlearn(request.reusable[cached_tokens // BLOCK :])
        lacking = len(request.tokens) - cached_tokens
        estimates = {"ppd": self._local_ms(decode, lacking)}
        able = [w for w in self.of_role(PREFILL) if linked is None or w.name in linked]
        remote = {w: self._remote_ms(w, request, lacking) for w in able}
        prefill = min(remote, key=lambda w: (remote[w], len(w.queued)), default=None)
        if prefill is None:
            kind, reason = "local", "no prefill rank"
        else:
            estimates["pd"] = remote[prefill]
            kind, reason = self._decide(request, decode, prefill, cached_tokens, estimates)
        if prefill is not None and kind == "pd":
            request.computing, cached_tokens = prefill, prefill.cached_tokens(request.reusable)
        else:
            request.computing = decode
        request.computing.queued[id] = len(request.tokens) - cached_tokens
        return Route(kind, decode.name, prefill.name if prefill and kind == "pd" else None, reason, estimates)

    def _decide(
        self, request: Request, decode: Worker, prefill: Worker, cached: int, estimates: dict[str, float]
    ) -> tuple[str, str]:
        if self.mode == "pd":
            return "pd", "mode pd"
        if self.mode == "ppd":
            conversation = request.conversation
            if conversation is None:
                return "pd", "first turn"
            history = min(conversation.prompt_tokens, len(request.tokens)) // BLOCK * BLOCK
            here = conversation.decode_worker == decode.name and 2 * cached >= history
            return ("ppd", "later turn") if here else ("pd", "history not here")
        unknown = [worker for worker in (prefill, decode) if self._line(worker) is None]
        if unknown == [prefill]:
            return "pd", "to measure"
        if estimates["pd"] <= estimates["ppd"] and unknown != [decode]:
            decode.prefill.fade()  # so that a way not taken is measured again some time
            return "pd", "cheaper remote"
        delay = self._backlog_ms(decode) + self._prefill_ms(decode, len(request.tokens) - cached)
        if self._decoding(decode) and delay > self.max_delay_steps * decode.step.each:
            if self._backlog_ms(prefill) > self.hopeless * estimates["ppd"]:
                return "ppd", "prefill queue"
            return "pd", "delay bound"
        if unknown == [decode]:
            return "ppd", "to measure"
        prefill.prefill.fade()
        return "ppd", "cheaper local"

    def _line(self, worker: Worker) -> Line | None:
        """How fast `worker` prefills: as it was measured, else as another of its role was."""
        lines = (w.prefill for w in [worker, *self.of_role(worker.role)] if w.prefill.measured)
        return next(lines, None)

    def _prefill_ms(self, worker: Worker, tokens: int) -> float:
        """`tokens` on `worker`; where its role is not measured, it is taken to be as fast as the other."""
        line = self._line(worker) or next(
            (w.prefill for w in self.workers.values() if w.prefill.measured), worker.prefill
        )
        return line(tokens)

    def _backlog_ms(self, worker: Worker) -> float:
        """What `worker` has to compute already."""
        return sum(self._prefill_ms(worker, tokens) for tokens in worker.queued.values())

    def _local_ms(self, decode: Worker, tokens: int) -> float:
        """Time to a first token that the decode rank computes, between decode steps if any requests run."""
        slower = 1 + 1 / self.stall_ratio if self._decoding(decode) else 1
        return slower * (self._backlog_ms(decode) + self._prefill_ms(decode, tokens))

    def _decoding(self, decode: Worker) -> bool:
        """Whether others than the request in hand run on a decode rank, or will while it is computed there: their K and V come."""
        return bool(decode.running) or decode.requests - len(decode.queued) > 1

    def _remote_ms(self, prefill: Worker, request: Request, lacking: int) -> float:
        """Time until the decode rank has what the prefill rank computes; what is sent meanwhile is hidden."""
        compute = self._prefill_ms(prefill, len(request.tokens) - prefill.cached_tokens(request.reusable))
        exposed = max(0.0, self.transfer(lacking) - compute)
        return self._backlog_ms(prefill) + compute + exposed + self.handover.each

    def _queue_ms(self, decode: Worker) -> float:
        """Time until the decode rank has a slot for one more, and has computed what it is to compute."""
        ahead = max(0, decode.requests + 1 - decode.slots)
        slot_ms = self.answer.each * decode.step.each / decode.slots
        return ahead * slot_ms + self._backlog_ms(decode)

    def prefilled(self, id: str, computed_tokens: int, ms: float) -> None:
        """The first token is out: `computed_tokens` were computed, the others cached.

        `ms`: of computing alone, without the queue, and on a decode rank without the steps between.
        """
        request = self.requests.get(id)
        if request is None or request.computing is None:
            return
        request.computing.prefill.observe(computed_tokens, ms)
        request.computing.learn(request.hashes)
        self._stop_computing(request)
        request.decode.running += not request.started
        request.started = True

    def finished(self, id: str, answer: Sequence[int], now: float) -> None:
        """The answer is complete: its conversation has one more turn, and the decode rank has it cached."""
        request = self.requests.get(id)
        if request is None:
            return
        self.ended(id)
        tokens = [*request.tokens, *answer]
        alive = self.workers.get(request.decode.name) is request.decode
        extend(request.hashes, tokens[:-1])  # the last token was never fed
        if alive:
            request.decode.learn(request.hashes)
        self.answer.observe(1, len(answer))
        name = request.decode.name if alive else ""
        prompt = len(request.tokens)
        self.conversations.answered(request.conversation_id, tokens, prompt, request.hashes, name, now)

    def ended(self, id: str) -> None:
        """The request failed, was cancelled, or is routed anew: it is no load any more. Calling it again does nothing."""
        request = self.requests.pop(id, None)
        if request is None:
            return
        self._stop_computing(request)
        request.decode.requests -= 1
        request.decode.running -= request.started

    def _stop_computing(self, request: Request) -> None:
        if request.computing is not None:
            del request.computing.queued[request.id]
            request.computing = None
