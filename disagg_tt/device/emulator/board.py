"""What the ranks of a host do and wait for, in memory that they share: see waits.

A rank writes only its own part, but for the verdict on a wait of another. A record is a wait; its epoch, 0 while nobody waits
there, is written last, so that who reads the same epoch before and after has read one wait.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Iterable
from typing import Any

Node = tuple[int, str]
Key = tuple[int, int]  # rank, record

# Words of a rank on the board, then its records, then its text.
STATE, COLLECTIVES, BUSY, SENDING_TO, RECEIVING_FROM = range(5)
ENDED = 2
_WORDS, _RECORDS, _RECORD_BYTES, _TEXT_BYTES = 16, 24, 1024, 4096
_EPOCH, _POLLS, _VERDICT, _LENGTH = range(4)
_HEAD_BYTES = 32
RANK_BYTES = 8 * _WORDS + _RECORDS * _RECORD_BYTES + _TEXT_BYTES
_FIRST = 64  # the segment's own head


class Board:
    """What each rank does and waits for, in `memory` of `bytes_for(ranks)` that every rank sees."""

    def __init__(self, memory: Any, ranks: int, me: int, pids: Iterable[int] = ()):
        self.ranks, self.me = ranks, me
        self._bytes = memoryview(memory).cast("B")
        self._words = self._bytes.cast("Q")
        self._free = list(range(_RECORDS))
        self._lock = threading.Lock()
        self._epochs = 0
        self._alive: list[int | None] = [_watch(pid) if r != me else None for r, pid in enumerate(pids)]
        self.put(STATE, 1)

    @staticmethod
    def bytes_for(ranks: int) -> int:
        return _FIRST + ranks * RANK_BYTES

    def _base(self, rank: int) -> int:
        return _FIRST + rank * RANK_BYTES

    def get(self, rank: int, word: int) -> int:
        return self._words[self._base(rank) // 8 + word]

    def put(self, word: int, value: int) -> None:
        self._words[self._base(self.me) // 8 + word] = value

    def add(self, word: int, change: int) -> int:
        """Add to one of this rank's own words; return it."""
        with self._lock:
            value = self.get(self.me, word) + change
            self.put(word, value)
        return value

    # ---- texts

    def _text_at(self, rank: int) -> int:
        return self._base(rank) + 8 * _WORDS + _RECORDS * _RECORD_BYTES

    def _put_text(self, at: int, room: int, text: str) -> None:
        data = text.encode()[: room - 8]
        self._bytes[at + 8 : at + 8 + len(data)] = data
        self._words[at // 8] = len(data)

    def _get_text(self, at: int) -> str:
        length = min(self._words[at // 8], _TEXT_BYTES)
        return bytes(self._bytes[at + 8 : at + 8 + length]).decode(errors="replace")

    # ---- ends

    def end(self, how: str) -> None:
        """Say that this rank ends now."""
        self._put_text(self._text_at(self.me), _TEXT_BYTES, how)
        self.put(STATE, ENDED)

    def ended(self, rank: int) -> str:
        """Return how another rank ended, "" if it lives."""
        if rank == self.me:
            return ""
        if self.get(rank, STATE) == ENDED:
            return self._get_text(self._text_at(rank))
        watch = self._alive[rank] if rank < len(self._alive) else None
        return "its process was killed or crashed" if watch is not None and _has_ended(watch) else ""

    # ---- waits

    def _at(self, key: Key) -> int:
        return self._base(key[0]) + 8 * _WORDS + key[1] * _RECORD_BYTES

    def open_record(self) -> int | None:
        with self._lock:
            return self._free.pop() if self._free else None

    def close_record(self, record: int) -> None:
        self._words[self._at((self.me, record)) // 8 + _EPOCH] = 0
        with self._lock:
            self._free.append(record)

    def write_record(self, record: int, content: str) -> int:
        """Put a wait on the board; return its epoch. Every change of its content is a new epoch."""
        at = self._at((self.me, record))
        data = content.encode()[: _RECORD_BYTES - _HEAD_BYTES]
        with self._lock:
            self._epochs += 1
            epoch = self._epochs
        self._words[at // 8 + _EPOCH] = 0
        self._bytes[at + _HEAD_BYTES : at + _HEAD_BYTES + len(data)] = data
        self._words[at // 8 + _LENGTH] = len(data)
        self._words[at // 8 + _POLLS] = 0
        self._words[at // 8 + _VERDICT] = 0
        self._words[at // 8 + _EPOCH] = epoch
        return epoch

    def still_waiting(self, record: int) -> None:
        self._words[self._at((self.me, record)) // 8 + _POLLS] += 1

    def verdict(self, record: int, epoch: int) -> str:
        """Return the deadlock that another wait found this one to be in, "" if none."""
        found = self._words[self._at((self.me, record)) // 8 + _VERDICT]
        return self._get_text(self._text_at(self.me)) if found == epoch else ""

    def condemn(self, key: Key, epoch: int, text: str) -> None:
        self._put_text(self._text_at(key[0]), _TEXT_BYTES, text)
        self._words[self._at(key) // 8 + _VERDICT] = epoch

    def waiting(self) -> dict[Key, tuple[int, int, dict[str, Any]]]:
        """Return (epoch, polls, content) of every wait on the board."""
        found = {}
        for rank in range(self.ranks):
            for record in range(_RECORDS):
                at = self._at((rank, record))
                epoch = self._words[at // 8 + _EPOCH]
                if not epoch:
                    continue
                polls, length = self._words[at // 8 + _POLLS], self._words[at // 8 + _LENGTH]
                data = bytes(self._bytes[at + _HEAD_BYTES : at + _HEAD_BYTES + length])
                if self._words[at // 8 + _EPOCH] == epoch:  # else it changed while it was read
                    found[rank, record] = epoch, polls, json.loads(data)
        return found

    def deadlocked(self, waits: dict[Key, tuple[int, int, dict[str, Any]]]) -> set[Key]:
        """Return those of `waits` that nothing outside them can end."""
        stuck = set(waits)

        def may_act(rank: int, kind: str) -> bool:
            mine = [waits[k][2] for k in stuck if k[0] == rank and waits[k][2]["is"] == kind]
            if kind == "host":
                return len(mine) < max((w["threads"] for w in mine), default=1)
            return len(mine) < max(self.get(rank, BUSY), 1)

        while True:
            freed = {
                key
                for key in stuck
                if (all if waits[key][2]["every"] else any)(may_act(*node) for node in waits[key][2]["nodes"])
            }
            if not freed:
                return stuck
            stuck -= freed


def _watch(pid: int) -> int | None:
    """Return a file descriptor that can be read once the process has ended, None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _has_ended(watch: int) -> bool:
    poller = select.poll()  # a new one: two threads cannot poll with the same
    poller.register(watch, select.POLLIN)
    return bool(poller.poll(0))
