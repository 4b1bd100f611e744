"""Command queues: work runs in the order in which it was enqueued, and never ahead of it.

Enqueueing never blocks the host. A queue with nothing pending runs its work at once, on the caller's thread. Work that
may have to wait for another rank (a send, a receive) goes to the queue's own thread, and so does everything enqueued
behind it until the queue has drained, just as a device queue stalls behind a socket kernel. Two queues overlap as far as
they have separate work; a tensor may be used on another queue than its writer's only after an event says it is there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.errors import DeviceError


class CommandQueue:
    """One in-order queue of one mesh. `name` appears in messages."""

    def __init__(self, name: str, timeout_s: float):
        self.name, self.timeout_s = name, timeout_s
        self.enqueued = 0  # sequence number of the newest work
        self.completed = 0
        self._seen: dict[CommandQueue, int] = {}  # how far other queues are known to be, by events waited for
        self._host_seen = 0  # how far the host knows this queue to be, by waiting for it
        self.idle = True
        self._pending: deque[tuple[str, Callable[[], None]]] = deque()
        self._running = ""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._captured: list[Callable[[], None]] | None = None  # work of the trace that is being captured

    def submit(self, name: str, work: Callable[[], None], waits: bool = False) -> int:
        """Enqueue `work`, which `waits` for another rank or not; return its sequence number. Raises what failed before."""
        self.check()
        if self._captured is not None:
            if waits:
                raise DeviceError(
                    f"{name} while {self.name} captures a trace; a trace cannot wait for another rank"
                )
            self._captured.append(work)
            return self.enqueued
        self.enqueued += 1
        if self.idle and not waits:
            try:
                work()
            finally:
                self.completed = self.enqueued
            return self.enqueued
        with self._changed:
            self._pending.append((name, work))
            self.idle = False
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(torch.get_num_threads(),), daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return self.enqueued

    def begin_capture(self) -> None:
        """From now on keep submitted work for a trace instead of running it."""
        if self._captured is not None:
            raise DeviceError(f"{self.name} captures a trace already; end it first")
        self._captured = []

    def end_capture(self) -> list[Callable[[], None]]:
        """Return the captured work and run what comes again."""
        if self._captured is None:
            raise DeviceError(f"{self.name} captures no trace; begin one first")
        captured, self._captured = self._captured, None
        return captured

    def check(self) -> None:
        """Raise the error of earlier work, if there was one."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Make `error` what every later use of the queue raises, unless it has failed before."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def knows(self, other: CommandQueue, sequence: int) -> bool:
        """Return whether work of this queue comes after number `sequence` of `other`, by order or by an event."""
        return other is self or self._seen.get(other, 0) >= sequence

    def host_knows(self, sequence: int) -> bool:
        """Return whether the host has waited for work number `sequence`: not whether it happens to be done."""
        return self._host_seen >= sequence

    def wait(self, sequence: int | None = None) -> None:
        """Block the host until work number `sequence` (default: all of it) is done; raises its error, or on timeout."""
        if self._captured is not None:
            raise DeviceError(
                f"the host waits for {self.name} while it captures a trace; nothing runs until the trace does"
            )
        target = self.enqueued if sequence is None else sequence
        self.reach(target)
        self._host_seen = max(self._host_seen, target)

    def stall(self, event: Event) -> None:
        """Make this queue wait until `event` is reached; what it covers may then be used here."""
        other = event.queue
        self._seen[other] = max(self._seen.get(other, 0), event.sequence)
        if other is not self and other.completed < event.sequence:
            self.submit("wait_for_event", lambda: other.reach(event.sequence), waits=True)

    def reach(self, sequence: int) -> None:
        """Block the calling thread until work number `sequence` is done; raises its error, or on timeout."""
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while self.completed < sequence and self._error is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeviceError(
                        f"{self.name}: no progress for {self.timeout_s:g} s; it is at {self._running or 'its start'} with "
                        f"{len(self._pending)} operations behind it. On hardware this hangs. Check that the other rank posts "
                        "the matching send or receive (TT_METAL_OPERATION_TIMEOUT_SECONDS sets the limit)"
                    )
                self._changed.wait(left)
        self.check()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a thread's own setting in OpenMP
        with torch.no_grad():
            while True:
                with self._changed:
                    while not self._pending and not self._closing:
                        self._changed.wait()
                    if self._closing or self._error is not None:
                        return
                    self._running, work = self._pending.popleft()
                try:
                    work()
                except BaseException as error:
                    self.fail(error)
                    return
                del work
                with self._changed:
                    self.completed += 1
                    self._running = ""
                    self.idle = not self._pending
                    self._changed.notify_all()

    def close(self) -> None:
        """End the queue's thread without waiting for work that is still pending."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)


class Event:
    """A point in one queue's order, made by record_event."""

    def __init__(self, queue: CommandQueue, mesh: Any):
        self.queue, self.sequence, self.mesh = queue, queue.enqueued, mesh
