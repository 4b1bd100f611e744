"""A backend without meshes, whose answers are written down: tokens, failures, and events to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.prompt import Tokenizer
from disagg_tt.serving.completions import Served
from disagg_tt.serving.generation import Account, Generation, Logprob, NewToken, State, TransferState
from disagg_tt.serving.server import create_app
from disagg_tt.serving.web import Patience, listen, serving

MODEL, EOS, LIMIT = "tiny-llama", 4, 512
Step = NewToken | BaseException | asyncio.Event
PATIENCE = Patience(closing=0.5)
Script = Callable[[Generation], Sequence[Step]]


def bundled_tokenizer() -> Tokenizer:
    return Tokenizer(find_checkpoint(None))


class FakeStream:
    """Plays a script; an event in it is waited for. `closed` is set when it is closed before its end or at it."""

    def __init__(self, wanted: Generation, script: Sequence[Step]):
        self.account = Account()
        self.wanted, self.closed, self.played = wanted, asyncio.Event(), 0
        self._steps = self._play(script)

    def __aiter__(self) -> AsyncIterator[NewToken]:
        return self._steps

    async def _play(self, script: Sequence[Step]) -> AsyncIterator[NewToken]:
        for step in script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, BaseException):
                raise step
            else:
                await asyncio.sleep(0)
                if self.played == 0:
                    self._account()
                self.played += 1
                yield step

    def _account(self) -> None:
        prompt = len(self.wanted.tokens)
        self.account.route, self.account.reason = "pd", "first turn"
        self.account.prompt_tokens, self.account.cached_tokens = prompt, prompt // 2
        self.account.transferred_tokens = prompt - prompt // 2
        self.account.budget_ms = {"queue": 1.25, "prefill": 10.5, "sample": 0.25}
        self.account.ttft_ms = 12.0

    async def aclose(self) -> None:
        self.closed.set()
        await self._steps.aclose()


class FakeBackend:
    """`script` says what each generation plays; `refusal` is raised by `generate`."""

    def __init__(self, tokenizer: Tokenizer):
        self.mode = "auto"
        self.streams: list[FakeStream] = []
        self.began = asyncio.Event()
        self.refusal: Exception | None = None
        self.on_transfer: Callable[[TransferState], None] = lambda transfer: None
        self.status = "ok"
        self._tokenizer = tokenizer
        self.script: Script = lambda wanted: self.says("The capital of Peru is Lima.", wanted)

    def says(self, text: str, wanted: Generation) -> list[Step]:
        """The steps of an answer of this text, as the model would end it: by EOS, or at the limit."""
        tokens = [*self._tokenizer.encode(text)[1:], EOS]
        steps: list[Step] = []
        for number, token in enumerate(tokens[: wanted.max_new_tokens], 1):
            logprob = None
            if wanted.logprobs is not None:
                others = tuple((token + i, -0.5 - i) for i in range(wanted.logprobs))
                logprob = Logprob(-0.5, others)
            reason = "length" if number == wanted.max_new_tokens else None
            steps.append(NewToken(token, "stop" if token == EOS else reason, logprob))
        return steps

    def generate(self, wanted: Generation) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(wanted, self.script(wanted))
        self.streams.append(stream)
        self.began.set()
        return stream

    def health(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "workers": [{"name": "prefill-0", "role": "prefill", "status": "idle"}],
        }

    def state(self) -> State:
        empty = {"running": 0, "waiting": 0, "slots_used": 0, "slots_total": 0}
        return {
            "mode": self.mode,
            "workers": [
                {
                    "name": "prefill-0",
                    "role": "prefill",
                    "status": "busy",
                    **empty,
                    "blocks_used": 16,
                    "blocks_cached": 8,
                    "blocks_total": 64,
                },
                {
                    "name": "decode-0",
                    "role": "decode",
                    "status": "idle",
                    **empty,
                    "slots_used": 1,
                    "slots_total": 32,
                    "blocks_used": 8,
                    "blocks_cached": 16,
                    "blocks_total": 256,
                },
            ],
            "requests": [
                {
                    "id": "chatcmpl-1-0",
                    "conversation": None,
                    "phase": "waiting",
                    "route": "pd",
                    "prefill_worker": "",
                    "decode_worker": "decode-0",
                    "prompt_tokens": 100,
                    "cached_tokens": 0,
                    "new_tokens": 0,
                    "age_ms": 12.5,
                }
            ],
            "transfers": [
                {
                    "request": "chatcmpl-0-0",
                    "source": "prefill-0",
                    "target": "decode-0",
                    "age_ms": 900.0,
                    "prefill_ms": 40.0,
                    "layers": [{"sent_ms": 10.0 * i + 8, "arrived_ms": 10.0 * i + 14} for i in range(4)],
                    "tokens": 96,
                    "bytes": 393216,
                    "hidden_ms": 18.0,
                    "exposed_ms": 4.0,
                    "handover_ms": 6.0,
                }
            ],
        }

    def trace(self) -> dict[str, Any]:
        return {"traceEvents": []}

    def conversations(self) -> list[dict[str, Any]]:
        return [{"id": "c1", "turns": 2}]

    def clear_conversations(self) -> int:
        return 1


def served(**changes: Any) -> Served:
    fields = {"model": MODEL, "max_seq_len": LIMIT, "vocab_size": 2048, "eos_token_ids": frozenset({1, EOS})}
    return Served(**{**fields, **changes})


@asynccontextmanager
async def live(
    backend: FakeBackend, tokenizer: Tokenizer, patience: Patience = PATIENCE, **changes: Any
) -> AsyncIterator[tuple[str, int]]:
    """The server over `backend` on a free port of loopback, which is given."""
    listener = listen("127.0.0.1", 0)
    address: tuple[str, int] = listener.getsockname()
    async with serving(create_app(backend, tokenizer, served(**changes)), listener, patience):
        yield address
