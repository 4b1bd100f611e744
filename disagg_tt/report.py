"""What a rank says: events to the launcher (tokens, progress, failure) over a zmq PUSH socket, and log lines to stderr.

An event is one JSON object with an "event" name; the reporter adds "role" and "rank". Names that the launcher itself
understands: started (pid), closed, and failed (exit_code, reason). All others go to its on_event handler alone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import zmq
from loguru import logger

ADDRESS_VARIABLE = "DISAGG_TT_EVENTS"
MAX_EVENT_BYTES = 1 << 20
_QUEUED_EVENTS = (
    100_000  # held while the launcher is busy; later ones are dropped, a run never waits for its report
)
_LINGER_MS = 2000  # how long close() may wait for queued events to leave

Event = dict[str, Any]


def in_pieces(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Give `items`, in order, in lists each of which fits an event: a larger one would be dropped."""
    piece: list[Any] = []
    size = 0
    for item in items:
        length = len(json.dumps(item)) + 2
        if piece and size + length > MAX_EVENT_BYTES // 2:
            yield piece
            piece, size = [], 0
        piece.append(item)
        size += length
    if piece:
        yield piece


class Reporter:
    """Sends events to the launcher when `address` is given, else calls `handler`. Safe to use from several threads."""

    def __init__(
        self, role: str, rank: int, address: str | None = None, handler: Callable[[Event], None] | None = None
    ) -> None:
        self.role, self.rank = role, rank
        self._handler = handler
        self._lock = threading.Lock()  # a zmq socket may be used by one thread at a time
        self._socket: zmq.Socket[bytes] | None = None
        self._dropped = 0
        if address:
            self._context = zmq.Context(io_threads=1)
            self._socket = self._context.socket(zmq.PUSH)
            self._socket.setsockopt(zmq.SNDHWM, _QUEUED_EVENTS)
            self._socket.connect(address)
            self.emit({"event": "started", "pid": os.getpid()})

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        role: str = "prefill",
        rank: int = 0,
        handler: Callable[[Event], None] | None = None,
    ) -> Reporter:
        """A reporter to the launcher that DISAGG_TT_EVENTS names, or to `handler` where there is no launcher."""
        return cls(role, rank, environ.get(ADDRESS_VARIABLE), handler)

    def emit(self, event: Event) -> None:
        """Send one event; never blocks. An event over MAX_EVENT_BYTES or beyond a full queue is dropped and counted."""
        event = {**event, "role": self.role, "rank": self.rank}
        with self._lock:
            if self._socket is not None:
                message = json.dumps(event).encode()
                try:
                    if len(message) > MAX_EVENT_BYTES:
                        raise zmq.Again
                    self._socket.send(message, zmq.DONTWAIT)
                except zmq.Again:
                    self._dropped += 1
                return
        if self._handler is not None:
            self._handler(event)

    def failed(self, error: BaseException) -> None:
        """Report the error that ends this rank, with the exit code that the job shall have."""
        reason = str(error) or type(error).__name__
        self.emit({"event": "failed", "exit_code": getattr(error, "exit_code", 1), "reason": reason[:10_000]})

    def close(self) -> None:
        """Deliver what is queued, for at most 2 s, and close. Call it before os._exit, too."""
        self.emit({"event": "closed"})
        with self._lock:
            if self._socket is None:
                return
            if self._dropped:
                logger.warning(f"{self._dropped} events did not reach the launcher")
            self._socket.close(linger=_LINGER_MS)
            self._socket = None
        self._context.term()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decode_event(message: bytes) -> Event | None:
    """The event in a message that the launcher received; None, with a warning, where it is none."""
    if len(message) > MAX_EVENT_BYTES:
        logger.warning(f"dropped an event of {len(message)} bytes; allowed are {MAX_EVENT_BYTES}")
        return None
    try:
        event = json.loads(message)
    except (ValueError, RecursionError):
        event = None
    if not (
        isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("rank"), int)
    ):
        logger.warning(f"dropped a message that is no event: {message[:80]!r}")
        return None
    return event


def configure_logging(role: str, rank: int | None = None, verbose: bool = False) -> None:
    """Log to stderr, one line a message, prefixed with role and rank. Called by commands only, never at import."""
    who = role if rank is None else f"{role} {rank}"
    logger.remove()
    logger.add(
        sys.stderr,
        level="DEBUG" if verbose else "INFO",
        format="<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> " + f"[{who}] " + "{message}",
        backtrace=False,
        diagnose=False,
    )
