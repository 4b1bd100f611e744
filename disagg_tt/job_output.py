"""The text that a job prints: ranks' lines are forwarded, the MPI launcher's own notices are kept and understood."""

from __future__ import annotations

import re
import signal
from collections import deque
from typing import TextIO

from loguru import logger

_RULE = re.compile(r"-{60,}")
_NOTICE = re.compile(
    r"(prterun|mpirun|Primary job|A process or daemon)\b"
)  # how a notice between rules begins
_TAG = re.compile(r"^\[\d+,\d+\]<std(?:out|err)>: ?")  # put by tt-run before each line
_KILLED = re.compile(r"process rank (\d+) .*?exited on signal (\d+)")
_LAST_LINES = 10  # kept to say why a launcher ended
_EXITED = re.compile(r"Process name: \[[^]]*,(\d+)\] Exit code: (\d+)")


class JobOutput:
    """Forwards lines to `stream`, holding back the notices that mpirun frames in rules of dashes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = b""
        self._rule: str | None = None  # a rule whose next line tells whether it opens a notice
        self._notice: list[str] | None = None
        self._notices: list[str] = []
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace"))
        self._stream.flush()

    def close(self) -> None:
        """Forward what is incomplete."""
        if self._rest:
            self._line(self._rest.decode(errors="replace"))
        for line in [*([self._rule] if self._rule else []), *(self._notice or [])]:
            self._write(line)
        self._rest, self._rule, self._notice = b"", None, None
        self._stream.flush()

    def _line(self, line: str) -> None:
        if self._notice is not None:
            if not _RULE.fullmatch(line):
                self._notice.append(line)
                return
            text = " ".join(" ".join(self._notice).split())
            self._notices.append(text)
            self._notice = None
            logger.debug(f"launcher: {text}")
            return
        if self._rule is not None:
            rule, self._rule = self._rule, None
            if _NOTICE.match(line):
                self._notice = [line]
                return
            self._write(rule)
        if _RULE.fullmatch(line):
            self._rule = line
            return
        line = _TAG.sub("", line)
        if "[tt-run]" in line:
            logger.debug(line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._last.append(line)

    def last_words(self) -> str:
        """The launcher's last notice, or else the last lines of all output, as one line; "" if there were none."""
        lines = [line for line in self._last if line.strip() and not _RULE.fullmatch(line)]
        return self._notices[-1] if self._notices else " ".join(" ".join(lines).split())

    def first_failure(self) -> tuple[int | None, int, str]:
        """(rank, exit code, reason) of the first rank that failed, as the launcher noticed it; reason "" if unknown."""
        for notice in self._notices:
            if match := _KILLED.search(notice):
                number = int(match[2])
                known = number in {member.value for member in signal.Signals}
                name = signal.Signals(number).name if known else f"signal {number}"
                return int(match[1]), 1, f"rank {match[1]} died of {name}"
            if match := _EXITED.search(notice):
                return int(match[1]), int(match[2]), f"rank {match[1]} ended with exit code {match[2]}"
        return None, 1, ""
