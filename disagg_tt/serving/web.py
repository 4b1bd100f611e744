"""HTTP beneath the API: who may ask, how much and how slowly, a client who leaves, and the listening server itself."""

from __future__ import annotations

import asyncio
import hmac
import re
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import h11
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from disagg_tt.config import check_number
from disagg_tt.errors import InputError
from disagg_tt.serving.refusal import Refusal

T = TypeVar("T")
REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Gate:
    """Lets a request in: gives it an id, and asks for the API key, where there is one, on all but the `open_paths`.

    A request that another site's page makes in a browser is refused; this API is for programs and its own page.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, open_paths: frozenset[str]):
        self._app, self._key, self._open = app, api_key, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        app = self._app if refusal is None else refusal.response()
        await app(scope, receive, send_with_id)

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return Refusal(
                403, f"Requests from pages of {origin!r:.200} are not allowed.", "origin_not_allowed"
            )
        if self._key is None or path in self._open:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode("latin-1"), self._key.encode()
        ):
            return None
        return Refusal(401, "Give this server's API key: 'Authorization: Bearer KEY'.", "invalid_api_key")


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int, timeout_s: float) -> bytes:
    """Return the body; raises Refusal 413 as soon as it is known to be too long, 408 when it comes too slowly."""
    too_long = Refusal(
        413, f"The body is longer than the {max_bytes} bytes that are allowed.", "request_too_large"
    )
    if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > max_bytes:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        raise Refusal(408, f"The body was not complete after {timeout_s:g} s.", "request_timeout") from None


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Return what `work` returns; raises ClientDisconnect, and cancels it, when the client leaves first.

    The request's body must have been read.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Patience:
    """How long the server bears with a client, in s.

    headers: for a request's headers to be complete. idle: between two requests of a connection. stalled: with a response
    that the client does not read. closing: for responses to end when the server stops.
    """

    headers: float = 30.0
    idle: float = 75.0
    stalled: float = 60.0
    closing: float = 5.0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `host` (a name or address) and `port` (0: any free one); raises InputError."""
    check_number("--port", port, 0, 65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host} --port {port} is no address ({error}); give one of this host's"
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host} port {port} ({error.strerror}); give another --port, or end what holds it"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn inside a program that has signal handlers of its own."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.ready = asyncio.Event()

    def capture_signals(self) -> Any:
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, patience: Patience = Patience()
) -> AsyncIterator[None]:
    """Serve `app` on `listener`, which is closed in the end, while the context lasts; then end what is in flight."""
    _allow_many_connections()

    class Protocol(_PatientProtocol):
        bears = patience

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        log_config=None,
        log_level="critical",  # what fails in the app is logged there
        access_log=False,
        timeout_keep_alive=patience.idle,  # type: ignore[arg-type] # it goes to call_later, which takes any number
        timeout_graceful_shutdown=patience.closing,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    ready = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # raises why it could not start
        yield
    finally:
        ready.cancel()
        server.should_exit = True
        await task
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)  # cancelled after `closing`
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # one that takes nothing would never be empty
        listener.close()


def _allow_many_connections() -> None:
    """Raise the limit of open files to what this process may have: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _PatientProtocol(H11Protocol):
    """uvicorn's connection, which bears with an idle client, and here also not for ever with a slow one.

    It is cut when its request's headers do not end, or it takes nothing of its response while more is to be written.
    """

    bears: Patience
    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        self._expect_headers()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._cancel_headers_due()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reading_due()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_due()
        self._cancel_reading_due()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._headers_due is None and self.conn.their_state is h11.IDLE:
            self._headers_due = self.loop.call_later(self.bears.headers, self.transport.abort)

    def _expect_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading_due = self.loop.call_later(self.bears.stalled, self._has_read, left)

    def _has_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._expect_reading()
        else:
            self.transport.abort()

    def _cancel_headers_due(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _cancel_reading_due(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
