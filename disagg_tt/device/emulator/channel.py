"""What carries a socket's notes and payloads between its two ends, in one process or between two ranks."""

from __future__ import annotations

import json
import queue as queues
from typing import Any, Protocol

import torch

from disagg_tt.device.emulator import distributed
from disagg_tt.errors import DeviceError

MAX_NOTE = 4096


class Channel(Protocol):
    """Moves notes (JSON) and payloads one way and short answers back, in order."""

    def put(self, note: dict[str, Any], payload: torch.Tensor | None) -> None: ...
    def get_note(self, what: str, timeout_s: float | None = None) -> dict[str, Any]: ...
    def get_payload(self, size: int, what: str) -> torch.Tensor: ...


class LocalChannel:
    """Both ends in one process; `back` is the channel of the other direction."""

    def __init__(self, inbox: Any, outbox: Any):
        self._inbox, self._outbox, self._payload = inbox, outbox, None

    def put(self, note: dict[str, Any], payload: torch.Tensor | None) -> None:
        self._outbox.put((note, payload))

    def get_note(self, what: str, timeout_s: float | None = None) -> dict[str, Any]:
        try:
            note, self._payload = self._inbox.get(timeout=timeout_s or distributed.operation_timeout_s())
        except queues.Empty:
            raise DeviceError(f"{what} did not happen in time") from None
        return note

    def get_payload(self, size: int, what: str) -> torch.Tensor:
        assert self._payload is not None
        return self._payload


class MpiChannel:
    """The other end is another rank. Notes and payloads have tags of their own, so they cannot be confused."""

    def __init__(self, peer: int, number: int, sender: bool):
        self._comm, self._peer = distributed.communicator(), peer
        base = 1000 + 4 * number
        self._out, self._in = (base, base + 2) if sender else (base + 2, base)

    def put(self, note: dict[str, Any], payload: torch.Tensor | None) -> None:
        text = json.dumps(note).encode()[:MAX_NOTE]
        requests = [self._comm.Isend(bytearray(text), dest=self._peer, tag=self._out)]
        if payload is not None:
            requests.append(self._comm.Isend(payload.numpy(), dest=self._peer, tag=self._out + 1))
        for request in requests:
            distributed.poll(request.Test, f"rank {self._peer} taking {note}")

    def get_note(self, what: str, timeout_s: float | None = None) -> dict[str, Any]:
        from mpi4py import MPI

        data, status = bytearray(MAX_NOTE), MPI.Status()
        request = self._comm.Irecv(data, source=self._peer, tag=self._in)
        try:
            distributed.poll(lambda: request.Test(status), what, timeout_s)
        except DeviceError:
            request.Cancel()
            raise
        return json.loads(bytes(data[: status.Get_count(MPI.BYTE)]))

    def get_payload(self, size: int, what: str) -> torch.Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        request = self._comm.Irecv(data.numpy(), source=self._peer, tag=self._in + 1)
        distributed.poll(request.Test, what)
        return data
