"""Ends the process when a wait on the device passes its deadline: ttnn's own waits have none, and cannot be interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PERIOD_S = 0.25


class Watchdog:
    """Guards blocks of code, one at a time; when one takes longer than `limit_s`, `on_expiry(what)` is called.

    `on_expiry` runs on the watchdog's thread and is expected to end the process.
    """

    def __init__(self, limit_s: float, on_expiry: Callable[[str], None]):
        self._limit_s, self._on_expiry = limit_s, on_expiry
        self._guarded: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Give the block `limit_s` seconds; one within another counts alone, then the outer one goes on."""
        outer = self._guarded
        self._guarded = (what, time.monotonic() + self._limit_s)
        try:
            yield
        finally:
            self._guarded = outer

    def _watch(self) -> None:
        while not self._closed.wait(min(_PERIOD_S, self._limit_s / 4)):
            guarded = self._guarded
            if guarded is not None and time.monotonic() > guarded[1]:
                self._on_expiry(guarded[0])
                return

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=1.0)
