"""The two endpoints that generate: from a request's bytes to its response, whole or as a stream of events.

A request is checked, its prompts become tokens, and the backend begins an answer for each choice. The response's status
waits for the first token, so that a generation that fails before it is an error and no empty answer; what fails later is
an error event in a stream. Whoever leaves, at any moment, ends the generation on the meshes.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from loguru import logger
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from disagg_tt.errors import CheckpointError, InputError, PromptError
from disagg_tt.serving.answers import Answers, Piece, Tokenizer
from disagg_tt.serving.api import ChatRequest, CompletionRequest, parse
from disagg_tt.serving.generation import Account, Backend, Generation
from disagg_tt.serving.metrics import Metrics
from disagg_tt.serving.refusal import Refusal, refusal_of
from disagg_tt.serving.shapes import ChatShape, CompletionShape, Shape
from disagg_tt.serving.web import read_body, unless_gone
from disagg_tt.tokens import Sampling

LONG_TEXT = 2000  # characters that are tokenised on the event loop; more would hold up running streams
SEED_END = 2**63  # seeds are below


@dataclass(frozen=True)
class Served:
    """What is served, and to whom.

    model: the name that clients give. max_seq_len: tokens of a prompt and its answer together. vocab_size, eos_token_ids:
    the model's. api_key: None lets everybody in. body_timeout_s: for a request's body to be complete.
    """

    model: str
    max_seq_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 60.0


class Completions:
    """Answers requests to both endpoints."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, served: Served, metrics: Metrics):
        self._backend, self._tokenizer, self._served, self._metrics = backend, tokenizer, served, metrics

    def check_model(self, name: str) -> None:
        """Raise Refusal (404) for another model than the one that is here."""
        if name != self._served.model:
            message = f"The model {name!r:.200} does not exist; this server has {self._served.model!r}."
            raise Refusal(404, message, "model_not_found", "model")

    async def respond(self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        """The response, when its first token is there or, not streamed, when it is whole; or the error."""
        arrived_at = time.monotonic()
        answers: Answers | None = None
        try:
            body = await read_body(
                request.receive, request.headers, self._served.max_body_bytes, self._served.body_timeout_s
            )
            asked = await asyncio.to_thread(parse, kind, body) if len(body) > LONG_TEXT else parse(kind, body)
            self.check_model(asked.model)
            shape: Shape = (
                ChatShape(asked, self._tokenizer)
                if isinstance(asked, ChatRequest)
                else CompletionShape(asked, self._tokenizer)
            )
            prompts = await self._encode(asked)
            wanted = self._wanted(asked, prompts, shape.id, arrived_at)
            answers = Answers(self._backend, wanted, self._tokenizer, asked.stop, self._metrics)
            first = await unless_gone(request.receive, answers.begin())
            headers = _headers(answers.answers[first[0].index].account)
            if asked.stream:
                events = self._events(answers, shape, first)
                response, answers = _EventStream(events, answers, headers, self._metrics), None
                return response
            pieces = [*first, *await unless_gone(request.receive, _all(answers))]
            return JSONResponse(shape.whole(answers.answers, pieces), headers=headers)
        except ClientDisconnect:
            self._metrics.failures.labels("client_gone").inc()
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            refusal = refusal_of(error)
            self._metrics.failures.labels(refusal.code).inc()
            return refusal.response()
        finally:
            if answers is not None:
                await answers.close()

    async def _encode(self, asked: CompletionRequest | ChatRequest) -> list[list[int]]:
        """The token ids of each prompt; on a thread where it may take long."""

        def encode() -> list[list[int]]:
            if isinstance(asked, ChatRequest):
                return [self._tokenizer.encode_chat(asked.template_messages)]
            return [self._tokenizer.encode(p) if isinstance(p, str) else p for p in asked.prompts]

        if isinstance(asked, ChatRequest):
            size = sum(len(message.text) for message in asked.messages)
        else:
            size = sum(len(prompt) for prompt in asked.prompts if isinstance(prompt, str))
        try:
            return await asyncio.to_thread(encode) if size > LONG_TEXT else encode()
        except PromptError as error:  # its own text is for the command line
            message = f"This model's chat template refuses the messages: {error.__cause__}."
            raise Refusal(400, message, "invalid_value", "messages") from error
        except CheckpointError as error:
            logger.error("a chat is refused: {}", error)
            message = "This model's chat template is damaged; use /v1/completions."
            raise Refusal(500, message, "internal_error") from error
        except InputError as error:
            logger.warning("a chat is refused: {}", error)
            message = "This model has no chat template; use /v1/completions."
            raise Refusal(400, message, "unsupported_model", "model") from error

    def _wanted(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        request_id: str,
        arrived_at: float,
    ) -> list[Generation]:
        """One generation a choice, prompt by prompt; raises Refusal for a prompt that cannot be."""
        if isinstance(asked, ChatRequest):
            param, limit = "messages", asked.max_completion_tokens or asked.max_tokens
            logprobs = asked.top_logprobs if asked.logprobs else None
        else:
            param, limit, logprobs = "prompt", asked.max_tokens, asked.logprobs
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        wanted: list[Generation] = []
        for tokens in prompts:
            if not tokens:
                raise Refusal(400, f"'{param}' is empty; it must have a token.", "invalid_value", param)
            if max(tokens) >= self._served.vocab_size:
                message = (
                    f"'{param}' has token {max(tokens)}; this model's are below {self._served.vocab_size}."
                )
                raise Refusal(400, message, "invalid_value", param)
            new = self._new_tokens(len(tokens), limit, param)
            for choice in range(asked.n):
                wanted.append(
                    Generation(
                        id=f"{request_id}-{len(wanted)}",
                        tokens=tuple(tokens),
                        max_new_tokens=new,
                        sampling=Sampling(
                            asked.temperature, asked.top_p, asked.top_k, (seed + choice) % SEED_END
                        ),
                        logprobs=logprobs,
                        eos_token_ids=frozenset() if asked.ignore_eos else self._served.eos_token_ids,
                        conversation=asked.conversation_id,
                        arrived_at=arrived_at,
                    )
                )
        return wanted

    def _new_tokens(self, prompt: int, limit: int | None, param: str) -> int:
        """`limit`, or as many as there is room for; Refusal where there is less."""
        room = self._served.max_seq_len - prompt
        if room < (limit or 1):
            message = (
                f"This model's maximum context length is {self._served.max_seq_len} tokens; {prompt} in '{param}' and "
                f"{limit or 1} for the answer are more. Shorten one of them."
            )
            raise Refusal(400, message, "context_length_exceeded", param)
        return limit or room

    async def _events(self, answers: Answers, shape: Shape, first: list[Piece]) -> AsyncIterator[bytes]:
        """The events of a stream; [DONE] only after a whole answer."""

        def events(pieces: list[Piece]) -> bytes:
            return b"".join(
                _event(chunk) for piece in pieces for chunk in shape.chunks(piece, answers.answers)
            )

        try:
            yield events(first)
            async for pieces in answers:
                yield events(pieces)
        except Exception as error:
            refusal = refusal_of(error)
            self._metrics.failures.labels(refusal.code).inc()
            yield _event(refusal.error)
            return
        yield b"".join(map(_event, shape.last_chunk(answers.answers))) + b"data: [DONE]\n\n"


class _EventStream(Response):
    """Server-sent events, one at a time as fast as the client takes them; closes the answers whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], answers: Answers, headers: dict[str, str], metrics: Metrics
    ):
        super().__init__(headers={"Cache-Control": "no-store", **headers})
        del self.headers["content-length"]
        self._events, self._answers, self._metrics = events, answers, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, send_all())
        except ClientDisconnect:
            self._metrics.failures.labels("client_gone").inc()
        finally:
            await self._answers.close()


async def _all(answers: Answers) -> list[Piece]:
    return [piece async for pieces in answers for piece in pieces]


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _headers(account: Account) -> dict[str, str]:
    """What the way to the first token was: its time, by parts that add up to it, in ms, and the route."""
    budget = ",".join(f"{name}={ms:.3f}" for name, ms in account.budget_ms.items())
    return {"X-Ttft-Ms": f"{account.ttft_ms:.3f}", "X-Time-Budget": budget, "X-Route": account.route}
