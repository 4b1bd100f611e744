"""Waiting that ends: with what was waited for, with a deadlock explained, with the end of the rank waited for, or in time.

A wait that lasts writes on the board, which the ranks of a host share, what it waits for and which nodes could bring it:
the host thread of a rank ("host") or any of its queues that have work ("queues"). A node that is not waiting may still
act. When the waits on the board can only be ended by each other, none of them ever will be: that is a deadlock, and each
of them raises it.

Never a false alarm: a wait counts only while it stands on the board, each of its polls looks again at what it waits for
before it says "still waiting", and a deadlock is believed only after every wait in it has polled twice since it was seen
whole. So nothing was on its way, and nobody was left to send anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from disagg_tt.device.emulator.board import BUSY, Board, Key, Node
from disagg_tt.errors import DeviceError

SPIN_S = 20e-6  # before the first sleep
LONGEST_SLEEP_S = 1e-3
GRACE_S = 0.03  # before a wait is put on the board
CHECK_S = 10e-3  # between two looks at the board, longer in a long wait
POLLS = 2  # of each wait, before a deadlock is believed

_role = threading.local()
_touched: set[int] = set()


def operation_timeout_s() -> float:
    """Return the limit of every wait, in seconds."""
    return float(os.environ.get("TT_METAL_OPERATION_TIMEOUT_SECONDS", "60"))


class Progress:
    """How long a command queue's own thread has been at its work.

    A wait in that work is not counted: it has a limit of its own, and what it raises then says more than whoever waits for
    the queue could. So the host's limit never wins over the reason.
    """

    def __init__(self) -> None:
        self._since = math.inf

    def here(self) -> None:
        """Say that the thread is the calling one."""
        _role.progress = self

    def step(self) -> None:
        """Say that work begins, or goes on after a wait."""
        self._since = time.monotonic()

    def wait(self) -> None:
        """Say that the thread waits, for work or in it."""
        self._since = math.inf

    def standstill_s(self) -> float:
        """Return the seconds since the last step, less than 0 in a wait."""
        return time.monotonic() - self._since


def touch() -> None:
    """Note that the calling thread posts transfers, so that it may end another's wait."""
    _touched.add(threading.get_ident())


def _host_threads() -> int:
    """Return how many threads of the program could still post something: all but queues and daemons that never did."""
    return sum(
        not getattr(t, "is_command_queue", False) and (not t.daemon or t.ident in _touched)
        for t in threading.enumerate()
    )


board = Board(bytearray(Board.bytes_for(1)), 1, 0)
"""The board of this process, until the distributed context shares one."""


def share(memory: Any, ranks: int, me: int, pids: Iterable[int]) -> None:
    """Use a board that the ranks of this host share from now on."""
    global board
    busy = board.get(board.me, BUSY)
    board = Board(memory, ranks, me, pids)
    board.put(BUSY, busy)


def host_of(rank: int) -> list[Node]:
    """Return the host of another rank as what is waited for; [] if it shares no board with this one."""
    return [(rank, "host")] if board.ranks > 1 else []


def end_of_process() -> None:
    """Tell the other ranks that this one ends."""
    error = getattr(sys, "last_value", None)
    board.end("it exited" if error is None else f"it failed with {type(error).__name__}: {error}"[:300])


class Wait:
    """One wait, as a context; call `pause` after each look at the condition that found it not true.

    Args:
        what: what is waited for, for messages; a function is called only when it is needed.
        nodes: returns who could bring it now; [] while it is on its way already.
        every: all of the nodes are needed, not any of them.
        fix: what to do about a deadlock.
        gives_up: on hardware too this wait ends by itself after a while, so a deadlock ends it and not the others.
        progress: of the queue that is waited for; then only time at one piece of its work, without its waits, counts.
    """

    def __init__(
        self,
        what: str | Callable[[], str],
        nodes: Callable[[], list[Node]],
        limit_s: float | None = None,
        every: bool = False,
        fix: str = "",
        gives_up: bool = False,
        progress: Progress | None = None,
    ):
        self._what, self._nodes, self._every, self._fix = what, nodes, every, fix
        self._gives_up, self._progress = gives_up, progress
        self._mine: Progress | None = getattr(_role, "progress", None)  # that of the queue which waits
        self.limit_s = operation_timeout_s() if limit_s is None else limit_s
        self._began = time.monotonic()
        self._sleep, self._next_check = SPIN_S, min(GRACE_S, self.limit_s)
        self._record: int | None = None
        self._content, self._epoch = "", 0
        self._suspect: dict[Key, tuple[int, int]] = {}
        self._gone = ""

    def __enter__(self) -> Wait:
        if self._mine is not None:
            self._mine.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._withdraw()
        if self._mine is not None and error is None:  # else the queue is about to say so
            self._mine.step()

    def what(self) -> str:
        return self._what if isinstance(self._what, str) else self._what()

    def pause(self) -> None:
        """Give way: a short spin, then sleeps that grow; raises DeviceError when the wait is vain or too long."""
        spent = time.monotonic() - self._began
        if spent < SPIN_S:
            time.sleep(0)
            return
        time.sleep(self._sleep)
        self._sleep = min(self._sleep * 1.5, LONGEST_SLEEP_S)
        if spent > self._next_check:
            self.check()

    def check(self) -> None:
        """Look at the board; raises DeviceError when the wait is vain or has lasted too long."""
        spent = time.monotonic() - self._began
        self._next_check = spent + min(CHECK_S + spent / 20, 5 * CHECK_S)
        nodes = self._nodes()
        if nodes:
            self._look_for_ended(nodes)
            self._publish(nodes)
            self._look_for_deadlock()
        else:
            self._withdraw()
        still = spent if self._progress is None else min(spent, self._progress.standstill_s())
        if still > self.limit_s:
            raise DeviceError(f"{self.what()} did not happen within {self.limit_s:g} s")

    def _look_for_ended(self, nodes: list[Node]) -> None:
        ends = [(rank, board.ended(rank)) for rank, _ in nodes]
        if not (any if self._every else all)(how for _, how in ends):
            return
        if self._gone:  # the condition was looked at once more since
            raise DeviceError(self._gone)
        rank, how = next(end for end in ends if end[1])
        self._gone = f"{self.what()}: rank {rank} has ended ({how}); on hardware this hangs"

    def _publish(self, nodes: list[Node]) -> None:
        queue = self._mine is not None
        if not queue:
            touch()
        content = {
            "is": "queues" if queue else "host",
            "what": self.what()[:480],
            "fix": self._fix[:220],
            "nodes": nodes,
            "every": self._every,
            "gives_up": self._gives_up,
            "threads": 0 if queue else _host_threads(),
        }
        text = json.dumps(content)
        if self._record is None:
            self._record = board.open_record()
        if self._record is None:
            return
        if text != self._content:
            self._content, self._epoch = text, board.write_record(self._record, text)
            self._suspect = {}
        else:
            board.still_waiting(self._record)

    def _withdraw(self) -> None:
        if self._record is not None:
            board.close_record(self._record)
            self._record, self._content, self._suspect = None, "", {}

    def _look_for_deadlock(self) -> None:
        if self._record is None:
            return
        verdict = board.verdict(self._record, self._epoch)
        if verdict:
            raise DeviceError(verdict)
        me = (board.me, self._record)
        waits = board.waiting()
        stuck = board.deadlocked(waits)
        if me not in stuck or me != min(stuck):  # one of them speaks for all
            self._suspect = {}
            return
        if {k: e for k, (e, _) in self._suspect.items()} != {k: waits[k][0] for k in stuck}:
            self._suspect = {k: (waits[k][0], waits[k][1]) for k in stuck}
            return
        if any(waits[k][1] < polls + POLLS for k, (_, polls) in self._suspect.items()):
            return
        text = _explain({k: waits[k][2] for k in sorted(stuck)})
        ended = {k for k in stuck if waits[k][2]["gives_up"]} or stuck
        for key in ended - {me}:
            board.condemn(key, waits[key][0], text)
        if me in ended:
            raise DeviceError(text)


def _explain(waits: dict[Key, dict[str, Any]]) -> str:
    places = {"host": "the host", "queues": "a queue"}
    lines = [f"{places[w['is']]} of rank {rank} waits for {w['what']}" for (rank, _), w in waits.items()]
    fixes = list(dict.fromkeys(w["fix"] for w in waits.values() if w["fix"]))
    return "; ".join(
        [f"deadlock, on hardware this hangs: {lines[0]}", *lines[1:], "nothing is on its way", *fixes]
    )


@contextlib.contextmanager
def marked(word: int, value: int) -> Iterator[None]:
    """Have `value` in one of this rank's words on the board inside the block."""
    board.put(word, value)
    try:
        yield
    finally:
        board.put(word, 0)


def until(
    ready: Callable[[], Any],
    what: str | Callable[[], str],
    nodes: Callable[[], list[Node]] = list,
    limit_s: float | None = None,
    every: bool = False,
    fix: str = "",
    gives_up: bool = False,
) -> None:
    """Wait until `ready()`; see Wait."""
    if ready():
        return
    with Wait(what, nodes, limit_s, every, fix, gives_up) as wait:
        while not ready():
            wait.pause()
