"""From the tokens of a backend to the text of answers: one request's answers, as they come, however many it asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from disagg_tt.config import Message
from disagg_tt.errors import PeerError
from disagg_tt.serving.generation import Account, Backend, Generation, Logprob, NewToken, Stream
from disagg_tt.serving.metrics import Metrics
from disagg_tt.tokens import TextStream

AHEAD = 16  # pieces that wait for the client


class Tokenizer(Protocol):
    """What the server needs of a tokenizer; prompt.Tokenizer is one."""

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: list[Message]) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by: text, and the log-probabilities of the tokens since the piece before."""

    index: int
    text: str
    logprobs: list[tuple[int, Logprob]]
    finish_reason: str | None


@dataclass
class Answer:
    """One answer, turned from tokens into text. `push` takes its tokens in order."""

    index: int
    wanted: Generation
    account: Account
    text: TextStream
    metrics: Metrics
    tokens: int = 0
    finish_reason: str | None = None
    _first_at: float = 0.0
    _last_at: float = 0.0
    _logprobs: list[tuple[int, Logprob]] = field(default_factory=list)

    def push(self, new: NewToken) -> Piece | None:
        """Take one token; return what there is to show: always for the first one and the last one."""
        self._clock()
        self.tokens += 1
        text = self.text.push(new.token)
        if new.logprob is not None and new.token not in self.wanted.eos_token_ids:
            self._logprobs.append((new.token, new.logprob))
        if new.finish_reason and not self.text.finished:
            text += self.text.flush()
        self.finish_reason = self.text.finished or new.finish_reason
        if text or self.finish_reason:
            logprobs, self._logprobs = self._logprobs, []
            return Piece(self.index, text, logprobs, self.finish_reason)
        return Piece(self.index, "", [], None) if self.tokens == 1 else None

    def _clock(self) -> None:
        now = time.monotonic()
        if self.tokens == 0:
            self._first_at = now
            self.metrics.began(self.account, now - self.wanted.arrived_at)
        else:
            self.metrics.inter_token_latency.observe(now - self._last_at)
        self._last_at = now
        self.metrics.generation_tokens.inc()

    def measure(self) -> None:
        """Count the finished answer and what it cost."""
        assert self.finish_reason is not None
        decode_s = self._last_at - self._first_at
        self.metrics.finished(
            self.account,
            self.finish_reason,
            latency_s=self._last_at - self.wanted.arrived_at,
            s_per_token=decode_s / (self.tokens - 1) if self.tokens > 1 else None,
        )


class Answers:
    """All answers to one request, begun at once: an iterator over what they grow by, as it comes. Close it, always.

    It gives all pieces that have come since, and holds no more than `AHEAD`, so that the answers to a client who reads
    slowly take few writes and little memory here. The first failure of one answer is raised to whoever waits for the next pieces.
    """

    def __init__(
        self,
        backend: Backend,
        wanted: Sequence[Generation],
        tokenizer: Tokenizer,
        stop: Sequence[str],
        metrics: Metrics,
    ):
        self.answers: list[Answer] = []
        self._streams: list[Stream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._backend, self._wanted, self._tokenizer, self._stop = backend, wanted, tokenizer, stop
        self._metrics = metrics
        self._came: asyncio.Queue[Piece | Exception] = asyncio.Queue(AHEAD)
        self._failure: Exception | None = None
        self._closed = False
        self._left = len(wanted)

    async def begin(self) -> list[Piece]:
        """Begin all answers; return the first pieces of whichever is first. OverloadError where not all are taken."""
        for index, wanted in enumerate(self._wanted):
            stream = self._backend.generate(wanted)
            self._streams.append(stream)
            text = TextStream(self._tokenizer, self._stop, wanted.eos_token_ids, wanted.max_new_tokens)
            answer = Answer(index, wanted, stream.account, text, self._metrics)
            self.answers.append(answer)
            self._pumps.append(asyncio.create_task(self._pump(answer, stream)))
        return await self.__anext__()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[Piece]:
        if self._failure is not None:
            raise self._failure
        if self._left == 0:
            raise StopAsyncIteration
        pieces: list[Piece] = []
        while not pieces or not self._came.empty():
            came = await self._came.get()
            if isinstance(came, Exception):
                self._failure = came
                break
            pieces.append(came)
            self._left -= came.finish_reason is not None
        if not pieces and self._failure is not None:
            raise self._failure
        return pieces

    async def _pump(self, answer: Answer, stream: Stream) -> None:
        try:
            async for new in stream:
                if (
                    self._closed
                ):  # before Python 3.12 wait_for loses a cancellation that comes with its result
                    return
                piece = answer.push(new)
                if answer.finish_reason:  # perhaps by a stop string, of which the meshes do not know
                    await stream.aclose()
                    answer.measure()
                if piece is not None:
                    await self._came.put(piece)
                if answer.finish_reason:
                    return
            raise PeerError(f"an answer ended after {answer.tokens} tokens without a reason; ask again")
        except Exception as error:
            await self._came.put(error)
        except asyncio.CancelledError:
            if not self._closed:  # then not by this class, and whoever waits must hear of it
                await self._came.put(PeerError("an answer was given up on the way; ask again"))
            raise

    async def close(self) -> None:
        """End what still runs, on the meshes too; nothing to do where all have finished."""
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in self._streams), return_exceptions=True)
