"""The mpi wire: plain MPI messages between two ranks, staged through host memory.

The frames of `host_wire` travel as messages with tag FRAME, and a layer's bytes as one message with tag BYTES whatever its
extents: MPI gathers and scatters them by a datatype. Waits poll, since MPI's own have no deadline; they poll busily at
first, because only calls make MPI move bytes.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from disagg_tt.errors import PeerError, StreamError
from disagg_tt.kv_stream.frame import HEADER_BYTES, SMALL_BYTES, Header, Kind, parse_header
from disagg_tt.kv_stream.host_wire import Channel, Extents, WireReceiver, WireSender

FRAME, BYTES = 7001, 7002
BUSY_S = 0.05  # of polling without a pause


class MpiChannel(Channel):
    """Frames and layers to and from rank `peer` of a communicator."""

    def __init__(self, comm: Any, peer: int, who: str, deadline_s: float):
        self._comm, self._peer, self.deadline_s = comm, peer, deadline_s
        self._who = f"mpi: the {who} end (rank {peer})"
        self._frame = bytearray(HEADER_BYTES + SMALL_BYTES)
        self._early: list[tuple[Header, bytes]] = []

    def put(self, header: Header, payload: bytes = b"") -> None:
        self.wait(self.post(header, payload), f"taking {header.kind.name}")

    def post(self, header: Header, payload: bytes = b"") -> Any:
        """Start sending a frame; return the request, which keeps its bytes."""
        return self._comm.Isend(header.encode() + payload, dest=self._peer, tag=FRAME)

    def get(self, what: str) -> tuple[Header, bytes]:
        return self._early.pop() if self._early else self._next(what)

    def _next(self, what: str) -> tuple[Header, bytes]:
        from mpi4py import MPI

        status = MPI.Status()
        self.wait(self._comm.Irecv(self._frame, source=self._peer, tag=FRAME), what, status)
        size = status.Get_count(MPI.BYTE)
        header = parse_header(self._frame[: min(size, HEADER_BYTES)])
        payload = bytes(self._frame[HEADER_BYTES:size])
        if header.kind is not Kind.LAYER and header.length != len(payload):
            raise StreamError(f"{self._who} sent {len(payload)} bytes in a frame of {header.length}")
        return header, payload

    def check_failure(self) -> None:
        """Raise PeerError if the other end has said that it failed."""
        if not self._early and self._comm.Iprobe(source=self._peer, tag=FRAME):
            header, payload = self._next("its reason")
            if header.kind is Kind.FAILED:
                raise PeerError(f"{self._who} failed: {payload.decode(errors='replace')}")
            self._early.append((header, payload))

    def layer(self, extents: Extents, sends: bool) -> tuple[Any, Any]:
        """Start sending or receiving a layer's bytes; return what `finished` takes."""
        from mpi4py import MPI

        start = self._comm.Isend if sends else self._comm.Irecv
        if len(extents) == 1:
            return start([extents[0].numpy(), MPI.BYTE], self._peer, BYTES), None
        kind = MPI.BYTE.Create_hindexed(
            [e.numel() for e in extents], [e.data_ptr() for e in extents]
        ).Commit()
        return start([MPI.BOTTOM, 1, kind], self._peer, BYTES), kind

    def finished(self, layer: tuple[Any, Any], what: str, *, watch: bool) -> None:
        """Wait for a layer; with `watch`, also for the other end's failure."""
        request, kind = layer
        self.wait(request, what, watch=watch)
        if kind is not None:
            kind.Free()

    def wait(self, request: Any, what: str, status: Any = None, *, watch: bool = False) -> None:
        """Wait for an MPI request; raises PeerError at the deadline, StreamError for what MPI refuses."""
        from mpi4py import MPI

        try:
            if request.Test(status):
                return
            started, pause = time.monotonic(), 0.0
            while not request.Test(status):
                waited = time.monotonic() - started
                if waited > self.deadline_s:
                    request.Cancel()
                    raise PeerError(
                        f"{self._who} did not move within {self.deadline_s:g} s while {what}; it hangs or is gone"
                    )
                if waited > BUSY_S:
                    if watch:
                        self.check_failure()
                    pause = min(pause * 1.5 + 20e-6, 1e-3)
                    time.sleep(pause)
        except MPI.Exception as error:
            raise StreamError(f"{self._who} sends something else while {what}: {error}") from None

    def close(self) -> None:
        """The communicator is not ours."""


class MpiSender(WireSender):
    """The prefill rank's end; `peer_rank` is the decode rank in `comm`."""

    name = "mpi"
    _channel: MpiChannel

    def __init__(self, comm: Any, peer_rank: int, *, deadline_s: float = 30.0, verify: bool = True):
        super().__init__(verify=verify)
        self._made = MpiChannel(comm, peer_rank, self.peer, deadline_s)
        self._going: list[tuple[int, Any, tuple[Any, Any]]] = []  # layer, its frame, its bytes

    def _meet(self) -> MpiChannel:
        return self._made

    def _send(self, header: Header, pieces: list[torch.Tensor]) -> None:
        frame = self._channel.post(header)
        self._going.append((header.layer, frame, self._channel.layer(pieces, sends=True)))

    def _sent(self, layer: int) -> None:
        while self._going and self._going[0][0] <= layer:
            number, frame, going = self._going[0]
            self._channel.wait(frame, f"taking layer {number}", watch=True)
            self._channel.finished(going, f"taking layer {number}", watch=True)
            del self._going[0]


class MpiReceiver(WireReceiver):
    """The decode rank's end; `peer_rank` is the prefill rank in `comm`."""

    name = "mpi"
    _channel: MpiChannel

    def __init__(self, comm: Any, peer_rank: int, *, deadline_s: float = 30.0, verify: bool = True):
        super().__init__(verify=verify)
        self._made = MpiChannel(comm, peer_rank, self.peer, deadline_s)
        self._coming: Any = None  # a layer's bytes, asked for before its header is here

    def _meet(self) -> MpiChannel:
        return self._made

    def _prepare(self, pieces: list[torch.Tensor]) -> None:
        self._coming = self._channel.layer(pieces, sends=False)

    def _receive(self, header: Header, payload: bytes, pieces: list[torch.Tensor]) -> None:
        self._channel.finished(self._coming, f"receiving layer {header.layer}", watch=False)
        self._coming = None

    def close(self) -> None:
        if self._coming is not None:
            self._coming[0].Cancel()
            self._coming = None
        super().close()
