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
        self.seen: dict[CommandQueue, int] = {}  # how far other queues are known to be, by events waited for
        self.idle = True
        self._pending: deque[tuple[str, Callable[[], None]]] = deque()
        self._running = ""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = False

    def submit(self, name: str, work: Callable[[], None], waits: bool = False) -> int:
        """Enqueue `work`, which `waits` for another rank or not; return its sequence number. Raises what failed before."""
        self.check()
        self.enqueued += 1
        if self.idle and not waits:
            work()
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

    def check(self) -> None:
        """Raise the error of earlier work, if there was one."""
        if self._error is not None:
            raise self._error

    def wait(self, sequence: int | None = None) -> None:
        """Block the host until work number `sequence` (default: all of it) is done; raises its error, or on timeout."""
        target = self.enqueued if sequence is None else sequence
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while self.completed < target and self._error is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeviceError(
                        f"{self.name}: no progress for {self.timeout_s:.0f} s; it is at {self._running or 'its start'} with "
                        f"{len(self._pending)} operations behind it. On hardware this hangs. Check that the other rank posts "
                        "the matching send or receive (TT_METAL_OPERATION_TIMEOUT_SECONDS sets the limit)"
                    )
                self._changed.wait(min(left, 1.0))
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
                    with self._changed:
                        self._error = error
                        self._changed.notify_all()
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


def wait_on_queue(queue: CommandQueue, event: Event) -> None:
    """Make `queue` stall until `event` is reached; what `event` covers may then be used on `queue`."""
    queue.seen[event.queue] = max(queue.seen.get(event.queue, 0), event.sequence)
    if event.queue is not queue and event.queue.completed < event.sequence:
        queue.submit("wait_for_event", lambda: event.queue.wait(event.sequence), waits=True)
