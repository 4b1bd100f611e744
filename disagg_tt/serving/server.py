"""The HTTP server over any backend: OpenAI's endpoints, and what a person or Prometheus wants to know."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from disagg_tt.serving.answers import Tokenizer
from disagg_tt.serving.api import ChatRequest, CompletionRequest
from disagg_tt.serving.completions import Completions, Served
from disagg_tt.serving.generation import Backend
from disagg_tt.serving.metrics import Metrics
from disagg_tt.serving.refusal import Refusal, refusal_of
from disagg_tt.serving.web import Gate

MODES = ("pd", "ppd", "auto")
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def create_app(backend: Backend, tokenizer: Tokenizer, served: Served) -> FastAPI:
    """Return the server's application over `backend`; web.serving runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(backend)
    answering = Completions(backend, tokenizer, served, metrics)
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
        return await answering.respond(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answering.respond(request, ChatRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        answering.check_model(name)
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

    @app.get("/trace")
    async def trace() -> dict[str, Any]:
        return backend.trace()

    for path, file in PAGE.items():
        app.add_route(path, _page(file), methods=["GET"])
    return app


def _page(file: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files("disagg_tt.serving") / "page" / file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=MEDIA_TYPES[file.split(".")[1]], headers=PAGE_HEADERS)

    return page
