"""Command queues: work runs in the order in which it was enqueued, and never ahead of it.

Enqueueing never blocks the host. A queue with nothing pending runs its work at once, on the caller's thread. Work that
may have to wait for another rank (a send, a receive) goes to the queue's own thread, and so does everything enqueued
behind it until the queue has drained, just as a device queue stalls behind a socket kernel. Two queues overlap as far as
they have separate work; a tensor may be used on another queue than its writer's only after an event says it is there.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from disagg_tt.device.emulator import waits
from disagg_tt.device.emulator.board import BUSY, Node
from disagg_tt.errors import DeviceError


class Peer(Protocol):
    """A socket, as the queues see it that its transfers are on."""

    def fail(self, error: str) -> None: ...
    def check(self) -> None: ...
    def leave(self) -> None: ...


class Stretch(list[Callable[[], None]]):
    """Captured work with no transfer in between."""

    def run(self) -> None:
        for work in self:
            work()


class Trace:
    """What a queue captured: stretches of work, each enqueued as one, and transfers, each time enqueued anew."""

    def __init__(self, number: int):
        self.number = number
        self._steps: list[Stretch | Callable[[CommandQueue], None]] = []

    def add(self, work: Callable[[], None]) -> None:
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, Stretch):
            self._steps.append(last := Stretch())
        last.append(work)

    def add_transfer(self, enqueue: Callable[[CommandQueue], None]) -> None:
        self._steps.append(enqueue)

    def enqueue(self, name: str, queue: CommandQueue) -> None:
        """Enqueue on `queue` everything that was captured."""
        for step in self._steps:
            if isinstance(step, Stretch):
                queue.submit(name, step.run)
            else:
                step(queue)


class CommandQueue:
    """One in-order queue of one mesh. `name` appears in messages."""

    def __init__(self, name: str, timeout_s: float):
        self.name, self.timeout_s = name, timeout_s
        self.enqueued = 0  # sequence number of the newest work
        self.completed = 0
        self._seen: dict[CommandQueue, int] = {}  # how far other queues are known to be, by events waited for
        self._host_seen = 0  # how far the host knows this queue to be, by waiting for it
        self.idle = True
        self._pending: deque[tuple[str, Callable[[], None], Peer | None]] = deque()
        self.peers: weakref.WeakSet[Peer] = weakref.WeakSet()  # sockets with transfers on this queue
        self._running = ""
        self._targets: list[int] = []  # sequence numbers that threads wait for: nobody is woken for others
        self._changed = threading.Condition()
        self._progress = waits.Progress()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._captured: Trace | None = None  # the trace that is being captured

    def submit(
        self, name: str, work: Callable[[], None], waits: bool = False, peer: Peer | None = None
    ) -> int:
        """Enqueue `work`, which `waits` for another rank or not; return its sequence number. Raises what failed before.

        `peer` is the socket that the work is a transfer of.
        """
        if self._error is not None:
            raise self._error
        if self._captured is not None:
            if waits:
                self.need_no_capture(name)
            self._captured.add(work)
            return self.enqueued
        self.enqueued += 1
        if self.idle and not waits:
            try:
                work()
            finally:
                self.completed = self.enqueued
            return self.enqueued
        with self._changed:
            self._pending.append((name, work, peer))
            if peer is not None:
                self.peers.add(peer)
            if self.idle:
                self.idle = False
                _count_busy(1)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(torch.get_num_threads(),), daemon=True
                )
                self._thread.is_command_queue = True  # type: ignore[attr-defined]
                self._thread.start()
            self._changed.notify_all()
        return self.enqueued

    def submit_transfer(self, enqueue: Callable[[CommandQueue], None]) -> None:
        """Call `enqueue`, which submits a transfer to the queue it is given; or capture it, to be called at each replay."""
        if self._captured is None:
            enqueue(self)
        else:
            self.check()
            self._captured.add_transfer(enqueue)

    def next_is(self, peer: Peer) -> bool:
        """Return whether the work behind that which runs is a transfer of `peer` too."""
        pending = self._pending
        return bool(pending) and pending[0][2] is peer

    def begin_capture(self, number: int) -> None:
        """From now on keep submitted work for trace `number` instead of running it."""
        if self._captured is not None:
            raise DeviceError(f"{self.name} captures a trace already; end it first")
        self._captured = Trace(number)

    def end_capture(self, number: int) -> Trace:
        """Return what was captured for trace `number`, and run what comes again."""
        captured = self._captured
        if captured is None or captured.number != number:
            seen = "no trace" if captured is None else f"trace {captured.number}"
            raise DeviceError(f"end_trace_capture of {number}: {self.name} captures {seen}")
        self._captured = None
        return captured

    def capturing(self) -> bool:
        """Return whether a trace is being captured."""
        return self._captured is not None

    def need_no_capture(self, what: str) -> None:
        """Raise DeviceError while a trace is captured: `what` cannot be part of one."""
        if self._captured is not None:
            raise DeviceError(
                f"{what} while {self.name} captures a trace; inside one the host cannot write, read or synchronise. Do it "
                "before begin_trace_capture or after end_trace_capture"
            )

    def check(self) -> None:
        """Raise the error of earlier work, if there was one."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Make `error` what every later use of the queue raises, unless it has failed before."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
            peers = list(self.peers)
        for peer in peers:
            peer.fail(f"the other end's queue failed: {error}")

    def knows(self, other: CommandQueue, sequence: int) -> bool:
        """Return whether work of this queue comes after number `sequence` of `other`, by order or by an event."""
        return other is self or self._seen.get(other, 0) >= sequence

    def host_knows(self, sequence: int) -> bool:
        """Return whether the host has waited for work number `sequence`: not whether it happens to be done."""
        return self._host_seen >= sequence

    def wait(self, sequence: int | None = None) -> None:
        """Block the host until work number `sequence` (default: all of it) is done; raises its error, or on timeout."""
        self.need_no_capture("a wait of the host")
        target = self.enqueued if sequence is None else sequence
        self.reach(target)
        with self._changed:  # two threads may wait
            self._host_seen = max(self._host_seen, target)

    def stall(self, event: Event) -> None:
        """Make this queue wait until `event` is reached; what it covers may then be used here."""
        self.need_no_capture("wait_for_event")
        other = event.queue
        self._seen[other] = max(self._seen.get(other, 0), event.sequence)
        if other is not self and other.completed < event.sequence:
            self.submit("wait_for_event", lambda: other.reach(event.sequence), waits=True)

    def reach(self, sequence: int) -> None:
        """Block the calling thread until work number `sequence` is done; raises its error, or on timeout."""
        nodes: list[Node] = [(waits.board.me, "queues")]
        with (
            waits.Wait(self._where, lambda: nodes, self.timeout_s, progress=self._progress) as wait,
            self._changed,
        ):
            self._targets.append(sequence)
            try:
                while self.completed < sequence and self._error is None:
                    if not self._changed.wait(min(waits.GRACE_S, self.timeout_s)) and self._error is None:
                        wait.check()
            finally:
                self._targets.remove(sequence)
        self.check()

    def _where(self) -> str:
        behind = self.enqueued - self.completed - 1
        return f"progress of {self.name} (at {self._running or 'its start'}, {behind} operations behind it)"

    def _work(self, threads: int) -> None:
        self._progress.here()
        torch.set_num_threads(threads)  # a thread's own setting in OpenMP
        with torch.no_grad():
            while True:
                with self._changed:
                    self._progress.wait()
                    while not self._pending and not self._closing:
                        self._changed.wait()
                    if self._closing or self._error is not None:
                        if self._pending:  # for which somebody may wait
                            self._error = self._error or DeviceError(
                                f"{self.name} was closed with work pending"
                            )
                            self._changed.notify_all()
                            _count_busy(-1)
                        return
                    self._running, work, _ = self._pending.popleft()
                    self._progress.step()
                try:
                    work()
                except BaseException as error:
                    self.fail(error)
                    _count_busy(-1)
                    return
                del work
                with self._changed:
                    self.completed += 1
                    self._running = ""
                    if not self._pending:
                        self.idle = True
                        _count_busy(-1)
                    if self._targets and self.completed >= min(self._targets):
                        self._changed.notify_all()

    def finish(self) -> None:
        """Before closing: raise what failed, or what another rank sent here and nobody received."""
        self.check()
        if sys.exc_info()[1] is None:  # else that is what matters
            for peer in list(self.peers):
                peer.check()

    def close(self) -> None:
        """End the queue's thread without waiting for work that is still pending."""
        for peer in list(self.peers):
            peer.leave()
        with self._changed:
            self._closing = True
            self._progress.step()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)


def _count_busy(change: int) -> None:
    """Tell the board that one of this rank's queues has work, or has none any more."""
    waits.board.add(BUSY, change)


class Event:
    """A point in one queue's order, made by record_event."""

    def __init__(self, queue: CommandQueue, mesh: Any):
        self.queue, self.sequence, self.mesh = queue, queue.enqueued, mesh
