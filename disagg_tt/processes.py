"""The processes of a job: tied to the launcher when they start, ended to the last one when it ends. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from loguru import logger

TERMINATE_SECONDS = 3.0  # from SIGTERM to SIGKILL

# Has the kernel send a signal when the parent dies, whatever it died of; argv: signal, program, arguments.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


def tied(command: Sequence[str], on_parent_death: signal.Signals) -> list[str]:
    """The command that runs `command` (its program an absolute path) tied to the life of the process that starts it."""
    return [sys.executable, "-ISc", _TIED, str(int(on_parent_death)), *command]


def start(
    command: list[str], env: Mapping[str, str], *, keep_stdout: bool = False
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start a program in a session of its own; return it and the pipe that carries its output and errors.

    With `keep_stdout` its output goes where this process's goes, and the pipe carries its errors alone. In another
    session, the terminal's Ctrl-C reaches the launcher alone, which then ends the job in order.
    """
    process = subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=None if keep_stdout else subprocess.PIPE,
        stderr=subprocess.PIPE if keep_stdout else subprocess.STDOUT,
        start_new_session=True,
    )
    pipe = process.stderr if keep_stdout else process.stdout
    assert pipe is not None
    return process, pipe


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit(128 + signal), so that the job is ended before this process is."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handlers(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def signals_call(stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP call `stop`, in the main thread between two steps of the program."""
    with _handlers(lambda number, frame: stop(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handlers(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Set signal handlers for a while; in another thread than the main one, where Python allows none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# a second Ctrl-C would leave processes behind; what this encloses is bounded in time
@_handlers(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
def end_session(process: subprocess.Popen[bytes]) -> None:
    """End all processes of the job's session: the launcher in order if it still runs, then whatever is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)  # mpirun and tt-run; ranks have process groups of their own
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            logger.debug("the launcher did not end on SIGTERM")
    until = time.monotonic() + TERMINATE_SECONDS
    while (left := _session_members(process.pid)) and time.monotonic() < until:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    process.wait(TERMINATE_SECONDS)


def _session_members(session: int) -> list[int]:
    """The living processes of a session, from /proc: mpirun gives each rank a process group, but not a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members
