"""The HTTP server: OpenAI's endpoints, and what a person or Prometheus wants to know, over any backend.

A request is checked, its prompts become tokens, and the backend begins an answer for each choice. The response's status
waits for the first token, so that a generation that fails before it is an error and no empty answer; what fails later is
an error event in a stream. Whoever leaves, at any moment, ends the generation on the meshes.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from loguru import logger
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from disagg_tt.errors import InputError, PromptError
from disagg_tt.serving.answers import Answers, Tokenizer
from disagg_tt.serving.api import MAX_CHOICES, ChatRequest, CompletionRequest, parse
from disagg_tt.serving.generation import Account, Backend, Generation
from disagg_tt.serving.metrics import Metrics
from disagg_tt.serving.refusal import Refusal, refusal_of
from disagg_tt.serving.shapes import ChatShape, CompletionShape, Shape
from disagg_tt.serving.web import Gate, read_body, unless_gone
from disagg_tt.tokens import Sampling

MODES = ("pd", "ppd", "auto")
LONG_TEXT = 2000  # characters that are tokenised on the event loop; more would hold up running streams
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
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


def create_app(backend: Backend, tokenizer: Tokenizer, served: Served) -> FastAPI:
    """Return the server's application over `backend`; web.serving runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(backend)
    openai = _OpenAI(backend, tokenizer, served, metrics)
    app.add_middleware(Gate, api_key=served.api_key, open_paths=frozenset({"/health", *PAGE}))
    created = int(time.time())
    model = {
        "id": served.model,
        "object": "model",
        "created": created,
        "owned_by": "disagg_tt",
        "max_model_len": served.max_seq_len,
    }

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return refusal_of(error).response()

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path!r:.200}: {error.detail}."
        return Refusal(error.status_code, message, "unknown_url").response()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await openai.respond(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await openai.respond(request, ChatRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        openai.check_model(name)
        return model

    @app.get("/health")
    async def health() -> Response:
        health = backend.health()
        return JSONResponse(health, 503 if health["status"] == "unavailable" else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/mode")
    async def mode() -> dict[str, str]:
        return {"mode": backend.mode}

    @app.post("/mode/{mode}")
    async def set_mode(mode: str) -> dict[str, str]:
        if mode not in MODES:
            raise Refusal(400, f"Mode {mode!r:.100} is none of {', '.join(MODES)}.", "invalid_value", "mode")
        backend.mode = mode
        return {"mode": mode}

    @app.get("/conversations")
    async def conversations() -> dict[str, Any]:
        return {"conversations": backend.conversations()}

    @app.post("/conversations/clear")
    async def clear_conversations() -> dict[str, int]:
        return {"cleared": backend.clear_conversations()}

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return {**backend.state()}

    for path, file in PAGE.items():
        app.add_route(path, _page(file), methods=["GET"])
    return app


def _page(file: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files("disagg_tt.serving") / "page" / file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=MEDIA_TYPES[file.split(".")[1]], headers=PAGE_HEADERS)

    return page


class _OpenAI:
    """The two endpoints that generate."""

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
            headers = _headers(answers.answers[first.index].account)
            if asked.stream:
                events = self._events(answers, shape, shape.chunks(first))
                response, answers = _EventStream(events, answers, headers, self._metrics), None
                return response
            pieces = [first, *await unless_gone(request.receive, _all(answers))]
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
        chat = isinstance(asked, ChatRequest)
        param = "messages" if chat else "prompt"
        if len(prompts) * asked.n > MAX_CHOICES:
            message = f"{len(prompts)} prompts times n = {asked.n} are more than {MAX_CHOICES} choices."
            raise Refusal(400, message, "invalid_value", "n")
        if isinstance(asked, ChatRequest):
            limit = asked.max_completion_tokens or asked.max_tokens
            logprobs = asked.top_logprobs if asked.logprobs else None
        else:
            limit, logprobs = asked.max_tokens, asked.logprobs
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

    async def _events(self, answers: Answers, shape: Shape, first: list[Any]) -> AsyncIterator[bytes]:
        """The events of a stream; [DONE] only after a whole answer."""
        for chunk in first:
            yield _event(chunk)
        try:
            async for piece in answers:
                for chunk in shape.chunks(piece):
                    yield _event(chunk)
        except Exception as error:
            refusal = refusal_of(error)
            self._metrics.failures.labels(refusal.code).inc()
            yield _event(refusal.error)
            return
        for chunk in shape.last_chunk(answers.answers):
            yield _event(chunk)
        yield b"data: [DONE]\n\n"


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


async def _all(answers: Answers) -> list[Any]:
    return [piece async for piece in answers]


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _headers(account: Account) -> dict[str, str]:
    """What the way to the first token was: its time, by parts that add up to it, in ms, and the route."""
    budget = ",".join(f"{name}={ms:.3f}" for name, ms in account.budget_ms.items())
    return {"X-Ttft-Ms": f"{account.ttft_ms:.3f}", "X-Time-Budget": budget, "X-Route": account.route}
