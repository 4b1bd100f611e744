"""The channel over MPI, for ranks of several hosts: a transfer is a message of the head and one of all its values."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator import distributed, waits, wire
from disagg_tt.device.emulator.board import Node
from disagg_tt.device.emulator.channel import Head, Rooms
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError

_HEAD = struct.Struct("<QIQ")  # number, flags, bytes of the values
_leaving: list[tuple[Any, Any]] = []  # (request, data) that MPI still reads
_leaving_changes = threading.Lock()


class MpiChannel:
    """The other end is another rank, here or on another host. Also what two ends meet through, before there is a ring."""

    def __init__(self, peer: int, number: int, sends: bool):
        self._comm, self._peer, self._sends = distributed.communicator(), peer, sends
        base = 1000 + 4 * number
        self._out, self._in = (base, base + 2) if sends else (base + 2, base)
        self._lock = threading.Lock()
        self._taken, self._payload, self._failure, self._left = 0, 0, "", False

    def put(self, note: dict[str, Any]) -> None:
        """Send a small note."""
        self._send(json.dumps(note).encode(), self._out)

    def get(self, what: str, nodes: Callable[[], list[Node]], limit_s: float, fix: str) -> dict[str, Any]:
        """Return the next small note; raises DeviceError after `limit_s` seconds."""
        found: list[bytes] = []
        waits.until(lambda: self._take(self._in, found), what, nodes, limit_s, fix=fix, gives_up=True)
        note: dict[str, Any] = json.loads(found[0])
        return note

    def _send(self, data: Any, tag: int) -> None:
        """Send without waiting; MPI reads `data` until it has left, even when this channel is gone."""
        with _leaving_changes:
            _leaving[:] = [pending for pending in _leaving if not pending[0].Test()]
            _leaving.append((self._comm.Isend(data, dest=self._peer, tag=tag), data))

    def _take(self, tag: int, found: list[bytes]) -> bool:
        """Append the next message to `found` if it is there. (A receive in advance would outlive this channel.)"""
        from mpi4py import MPI

        status = MPI.Status()
        message = self._comm.Improbe(source=self._peer, tag=tag, status=status)
        if message is None:
            return False
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv(data)
        found.append(bytes(data))
        return True

    def post(self, number: int) -> None: ...

    def run(self, number: int) -> None: ...

    def write(self, head: Head, shards: torch.Tensor, dtype: DataType, what: Callable[[], str]) -> None:
        self.check()
        number, flags, text = head
        cuts = [
            (shard, *cut)
            for shard in shards.unsqueeze(-1).flatten(1)
            for cut in wire.pieces(shard.numel(), dtype)
        ]
        payload = torch.empty(sum(size for *_, size in cuts), dtype=torch.uint8)
        at = 0
        for shard, start, end, size in cuts:
            wire.put(shard[start:end], payload, at, dtype)
            at += size
        self._send(_HEAD.pack(number, flags, at) + text, self._out)
        if at:
            self._send(payload.numpy(), self._out + 1)

    def taken(self) -> int:
        with self._lock:  # the host looks too, before it enqueues
            found: list[bytes] = []
            if self._take(self._in, found):
                answer = json.loads(found[0])
                self._failure = self._failure or answer.get("error", "")
                self._taken = answer.get("taken", self._taken)
            return self._taken

    def read_head(self, number: int, what: Callable[[], str]) -> Head:
        messages: list[bytes] = []
        self.until(lambda: self._take(self._in, messages), lambda: number, what)
        found, flags, self._payload = _HEAD.unpack_from(messages[0])
        text = messages[0][_HEAD.size :]
        if not found:
            raise DeviceError(text.decode(errors="replace"))
        return found, flags, text

    def keep(self, count: int, dtype: DataType) -> torch.Tensor | None:
        return None

    def read(self, rooms: Rooms, dtype: DataType, what: Callable[[], str]) -> None:
        payload, at = self._drain(what), 0
        for shard in rooms:
            for start, end, size in wire.pieces(shard.numel(), dtype):
                wire.get(payload, at, shard[start:end], dtype)
                at += size

    def _drain(self, what: str | Callable[[], str]) -> torch.Tensor:
        """Receive the payload that the last head announced."""
        size, self._payload = self._payload, 0
        messages: list[bytes] = [] if size else [b""]
        waits.until(lambda: messages or self._take(self._in + 1, messages), what)
        return torch.frombuffer(bytearray(messages[0]), dtype=torch.uint8) if size else torch.empty(0)

    def done(self, number: int) -> None:
        self.put({"taken": number})

    def fail(self, error: str) -> None:
        if self._failure:
            return
        self._failure = error
        if self._sends:
            self._send(_HEAD.pack(0, 0, 0) + error.encode()[:2048], self._out)
        else:
            self._drain("a payload of another size")  # until then it keeps the sender from hearing why
            self.put({"error": error[:2048]})

    def check(self) -> None:
        if self._sends:
            self.taken()
        if self._failure:
            raise DeviceError(self._failure)

    def leave(self) -> None:
        self._left = True

    def unread(self) -> bool:
        return False

    def until(self, ready: Callable[[], bool], number: Callable[[], int], what: Callable[[], str]) -> None:
        def look() -> bool:
            if ready():
                return True
            self.check()
            if self._left:
                raise DeviceError(f"{what()}: the mesh was closed meanwhile")
            return False

        waits.until(look, what)
