"""What carries a socket's transfers between its two ends: memory of one process, memory of one host, or MPI (mpi_channel).

Every transfer is a head (number, flags, description) and the values of its shards. The sender runs ahead as far as there is
room; the receiver says which transfers it has taken. Either end says why it failed, and the other one raises that.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from disagg_tt.device.emulator import shm, waits, wire
from disagg_tt.device.emulator.board import Node
from disagg_tt.device.emulator.slabs import UNIT, Slabs
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError

UNDEFINED, REPLICATED = 1, 2  # flags: no values follow; the values of one chip, for all
HEAD_BYTES = 1024
_HEAD = struct.Struct(
    "<QIIQ"
)  # number, flags, bytes of the description, 1 + where the slab of values begins or 0
_FAILURE_BYTES = 4096

Head = tuple[int, int, bytes]
Rooms = Sequence[torch.Tensor]


class Channel(Protocol):
    """One end. `what` says what a wait is for; `number` counts a socket's transfers from 1.

    The sender's `shards` are [shards, *shape], the receiver's `rooms` as many tensors of one axis.
    """

    def post(self, number: int) -> None: ...
    def run(self, number: int) -> None: ...
    def write(self, head: Head, shards: torch.Tensor, dtype: DataType, what: Callable[[], str]) -> None: ...
    def taken(self) -> int: ...
    def read_head(self, number: int, what: Callable[[], str]) -> Head: ...
    def keep(self, count: int, dtype: DataType) -> torch.Tensor | None: ...
    def read(self, rooms: Rooms, dtype: DataType, what: Callable[[], str]) -> None: ...
    def done(self, number: int) -> None: ...
    def fail(self, error: str) -> None: ...
    def check(self) -> None: ...
    def leave(self) -> None: ...
    def unread(self) -> bool: ...
    def until(
        self, ready: Callable[[], bool], number: Callable[[], int], what: Callable[[], str]
    ) -> None: ...


# Words that both ends see, each on a cache line of its own: [sender's, receiver's] or only one's.
_POSTED, _RUNNING, _LEFT, _SENT, _WRITTEN, _TAKEN, _READ, _FAILED = 1, 3, 5, 7, 8, 9, 10, 11
_WORDS = 16


class _Paired:
    """An end that shares words with the other: 0 sends, 1 receives, and `peer` is the other end's rank."""

    def __init__(self, words: memoryview, end: int, peer: int):
        self._words, self._end, self._peer = words, end, peer

    def _get(self, word: int) -> int:
        return self._words[8 * word]

    def _set(self, word: int, value: int) -> None:
        self._words[8 * word] = value

    def post(self, number: int) -> None:
        """Say that transfer `number` is enqueued here."""
        self._set(_POSTED + self._end, number)

    def keep(self, count: int, dtype: DataType) -> torch.Tensor | None:
        """Return the `count` values of the head that was read, one axis, in memory to be kept; None: `read` them."""
        return None

    def run(self, number: int) -> None:
        """Say that transfer `number` runs here now, 0: none."""
        self._set(_RUNNING + self._end, number)

    def done(self, number: int) -> None:
        """Say that transfer `number` has been received."""
        self._set(_TAKEN, number)

    def taken(self) -> int:
        """Return the number of the newest transfer that has been received."""
        return self._get(_TAKEN)

    def leave(self) -> None:
        """Say that this end is closed."""
        self._set(_LEFT + self._end, 1)

    def unread(self) -> bool:
        """Return whether something was sent that has not been received."""
        return self._get(_SENT) > self._get(_TAKEN)

    def nodes(self, number: int) -> list[Node]:
        """Return who can bring the other end's transfer `number`, [] while that is running."""
        other = 1 - self._end
        if self._get(_RUNNING + other) == number or self._peer >= waits.board.ranks:
            return []
        return [(self._peer, "queues" if self._get(_POSTED + other) >= number else "host")]

    def check(self) -> None:
        """Raise what the other end failed with."""
        if self._get(_FAILED):
            raise DeviceError(self._failure())

    def _failure(self) -> str:
        raise NotImplementedError

    def until(self, ready: Callable[[], bool], number: Callable[[], int], what: Callable[[], str]) -> None:
        """Wait for the other end's transfer `number`, which one may change in the wait."""

        def look() -> bool:
            if ready():
                return True
            self.check()
            if self._get(_LEFT + self._end):
                raise DeviceError(f"{what()}: the mesh was closed meanwhile")
            if self._get(_LEFT + 1 - self._end) and not ready():
                raise DeviceError(f"{what()}: the other end of the socket is closed; on hardware this hangs")
            return False

        waits.until(look, what, lambda: self.nodes(number()), fix=FIX)


FIX = (
    "Post the matching receive (or send) on the other rank, in the same order on both, before waiting for anything "
    "that comes after it; a FIFO holds only its own size"
)


class LocalChannel(_Paired):
    """Both ends in one process: values are handed over as they are, and must not be written again."""

    def __init__(self, shared: LocalPair, end: int):
        super().__init__(shared.words, end, waits.board.me)
        self._shared = shared

    def write(self, head: Head, shards: torch.Tensor, dtype: DataType, what: Callable[[], str]) -> None:
        self.check()
        self._shared.transfers.append((head, shards))
        self._set(_SENT, head[0])

    def read_head(self, number: int, what: Callable[[], str]) -> Head:
        transfers = self._shared.transfers
        self.until(lambda: bool(transfers), lambda: number, what)
        return transfers[0][0]

    def read(self, rooms: Rooms, dtype: DataType, what: Callable[[], str]) -> None:
        _, shards = self._shared.transfers.popleft()
        for shard, room in zip(shards, rooms, strict=True):
            room.copy_(shard.reshape(-1))

    def fail(self, error: str) -> None:
        self._shared.failure = self._shared.failure or error
        self._set(_FAILED, 1)

    def _failure(self) -> str:
        return self._shared.failure


class LocalPair:
    """What the two ends of a LocalChannel share."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(8 * 8 * _WORDS)).cast("Q")
        self.transfers: deque[tuple[Head, torch.Tensor]] = deque()
        self.failure = ""


class RingChannel(_Paired):
    """The other end is another rank of this host; heads and small values go through a ring in shared memory, others in slabs.

    Positions count bytes from the start and never wrap; nothing crosses the end of the ring. WRITTEN is where the sender
    is, READ where the receiver is.
    """

    HEADER = 8 * 8 * _WORDS + _FAILURE_BYTES
    LEAST = 4 << 20  # more is used only for FIFOs that hold more

    def __init__(self, segment: shm.Segment, end: int, peer: int):
        memory = memoryview(segment.memory)
        super().__init__(memory[: 8 * 8 * _WORDS].cast("Q"), end, peer)
        self._text = memory[8 * 8 * _WORDS : self.HEADER]
        self._slabs = Slabs(memory[self.HEADER : self.HEADER + Slabs.BYTES])
        self._bytes = memory[self.HEADER + Slabs.BYTES :]
        self._ring = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._size, self._at = self._ring.numel(), 0

    @classmethod
    def bytes_for(cls, fifo_bytes: int) -> int:
        """Return the size of a segment whose ring can hold all that FIFOs of so many bytes in all can."""
        return cls.HEADER + Slabs.BYTES + cls.LEAST + -(-4 * fifo_bytes // 4096) * 4096

    def _next(self, size: int) -> tuple[int, int]:
        """Return where the next `size` bytes begin: the position, and the offset in the ring."""
        offset = self._at % self._size
        return (self._at, offset) if offset + size <= self._size else (self._at + self._size - offset, 0)

    def _room(self, size: int, what: Callable[[], str]) -> int:
        """Wait until `size` bytes are free; return their offset. `_at` is then behind them."""
        at, offset = self._next(size)
        end = at + size
        if end - self._get(_READ) > self._size:
            self.until(lambda: end - self._get(_READ) <= self._size, lambda: self._get(_TAKEN) + 1, what)
        self._at = end
        return offset

    def _filled(self, size: int, number: int, what: Callable[[], str]) -> int:
        """Wait until the next `size` bytes are there; return their offset. `_at` is then behind them."""
        at, offset = self._next(size)
        end = at + size
        if self._get(_WRITTEN) < end:
            self.until(lambda: self._get(_WRITTEN) >= end, lambda: number, what)
        self._at = end
        return offset

    def write(self, head: Head, shards: torch.Tensor, dtype: DataType, what: Callable[[], str]) -> None:
        self.check()
        number, flags, text = head
        slab = self._fill(shards, dtype)
        offset = self._room(HEAD_BYTES, what)
        _HEAD.pack_into(self._bytes, offset, number, flags, len(text), 0 if slab is None else slab + 1)
        self._bytes[offset + _HEAD.size : offset + _HEAD.size + len(text)] = text
        self._set(_WRITTEN, self._at)
        for shard in shards.unsqueeze(-1).flatten(1) if slab is None else ():
            for start, end, size in wire.pieces(shard.numel(), dtype):
                offset = self._room(size, what)
                wire.put(shard[start:end], self._ring, offset, dtype)
                self._set(_WRITTEN, self._at)
        self._set(_SENT, number)

    def _fill(self, shards: torch.Tensor, dtype: DataType) -> int | None:
        """Copy the shards into a slab, as the receiver's tensor holds them, and return where it is; None without one."""
        form = wire.form(dtype)
        size = form.itemsize * shards.numel() if form.is_floating_point else 0
        slab = self._slabs.take(size) if size >= UNIT else None
        if slab is not None:
            self._slabs.at(slab, shards.shape, form).copy_(shards)
        return slab

    def read_head(self, number: int, what: Callable[[], str]) -> Head:
        offset = self._filled(HEAD_BYTES, number, what)
        found, flags, length, slab = _HEAD.unpack_from(self._bytes, offset)
        text = bytes(self._bytes[offset + _HEAD.size : offset + _HEAD.size + length])
        self._number, self._slab = number, slab - 1 if slab else None
        self._set(_READ, self._at)
        return found, flags, text

    def keep(self, count: int, dtype: DataType) -> torch.Tensor | None:
        if self._slab is None:
            return None
        form = wire.form(dtype)
        return self._slabs.keep(self._slab, count * form.itemsize).view(form)

    def read(self, rooms: Rooms, dtype: DataType, what: Callable[[], str]) -> None:
        kept = self.keep(sum(room.numel() for room in rooms), dtype)
        if kept is not None:
            for room, values in zip(rooms, kept.chunk(len(rooms)), strict=True):
                room.copy_(values)
            return
        for shard in rooms:
            for start, end, size in wire.pieces(shard.numel(), dtype):
                offset = self._filled(size, self._number, what)
                wire.get(self._ring, offset, shard[start:end], dtype)
                self._set(_READ, self._at)

    def fail(self, error: str) -> None:
        if not self._get(_FAILED):
            data = error.encode()[:_FAILURE_BYTES]
            self._text[: len(data)] = data
            self._set(_FAILED, len(data) + 1)

    def _failure(self) -> str:
        return bytes(self._text[: self._get(_FAILED) - 1]).decode(errors="replace")
