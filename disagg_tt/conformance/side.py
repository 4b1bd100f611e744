"""One side of the comparison: a process that makes calls, started when needed and again after a crash."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from disagg_tt.conformance.case import Case
from disagg_tt.device import mock
from disagg_tt.errors import InputError
from disagg_tt.processes import tied

CASE_SECONDS = 60.0  # a call that takes longer counts as crashed
START_SECONDS = 120.0
STARTS = 2  # tries
LIFE = 1500  # cases after which a worker is replaced: the real one keeps every program it has made
# A worker is given cases before its answers are read, so that it never waits, and fewer bytes than a pipe holds (one large
# case excepted, which it reads), so that giving never waits for it.
AHEAD, AHEAD_BYTES = 16, 32_000

WORKER = (sys.executable, "-m", "disagg_tt.conformance.worker")

Result = dict[str, Any]


class Side:
    """Makes cases on "ttnn" or "emulator" with a mesh of one shape. A context manager: leaving it ends the process."""

    def __init__(
        self,
        name: str,
        mesh: tuple[int, int],
        command: Sequence[str] = WORKER,
        case_seconds: float = CASE_SECONDS,
        start_seconds: float = START_SECONDS,
    ):
        """`command` runs worker.py or what talks like it; the mesh's shape is its last argument."""
        self.name, self.shape = name, "x".join(map(str, mesh))
        self._command = [*command, self.shape]
        self._case_seconds, self._start_seconds = case_seconds, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, __exit__ closes it
        self._buffer = b""

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._errors.close()

    def start(self) -> None:
        """Start the process, if none runs, without waiting for it."""
        if self._process is not None:
            return
        environment = {**os.environ, "DISAGG_TT_DEVICE": self.name, "OMP_NUM_THREADS": "1"}
        if self.name == "ttnn":
            environment |= mock.environment()
        self._errors.seek(0)
        self._errors.truncate()
        self._buffer = b""
        self._process = subprocess.Popen(
            tied(self._command, signal.SIGKILL),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def stop(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._ready = None, False

    def results(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield the result of each case, in order; {"outcome": "crashed", "error"} for one that ended the process.

        A crash is the first unanswered case's, though an earlier one may have been its cause. Raises InputError when the
        process does not start.
        """
        waiting: deque[bytes] = deque()  # given to the process, or to be given first; not yet answered
        done = first = 0  # answers; those before this process's
        while done < len(cases):
            if done - first >= LIFE:
                self.stop()
            if not self._ready:
                self._start_ready()
                first = done
                for line in waiting:
                    self._send(line)
            while done + len(waiting) < len(cases) and len(waiting) < AHEAD:
                if sum(map(len, waiting)) > AHEAD_BYTES:
                    break
                waiting.append(json.dumps(cases[done + len(waiting)].as_json()).encode() + b"\n")
                self._send(waiting[-1])
            answer = self._answer(self._case_seconds)
            if answer is None:
                answer = {"outcome": "crashed", "error": self._last_words(self._case_seconds)}
                self.stop()
            waiting.popleft()
            done += 1
            yield answer

    def _start_ready(self) -> None:
        for _ in range(STARTS):
            self.start()
            if self._answer(self._start_seconds) is not None:
                self._ready = True
                return
            words = self._last_words(self._start_seconds)
            self.stop()
        raise InputError(f"the {self.name} worker did not open a mesh of {self.shape}: {words}")

    def _send(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has crashed at an earlier case, which its missing answer tells

    def _answer(self, seconds: float) -> Result | None:
        """Return the next answer, None when the process has ended or takes longer."""
        assert self._process is not None and self._process.stdout is not None
        stdout, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stdout], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(stdout, 1 << 16) if ready else b""
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: Result = json.loads(line)
        return answer

    def _last_words(self, seconds: float) -> str:
        """Return why no answer came: the last lines of its stderr."""
        assert self._process is not None
        try:
            self._process.wait(1.0)  # its stdout may end before its stderr does
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:g} s"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-6:])[-1000:] or f"no message, exit status {self._process.returncode}"
