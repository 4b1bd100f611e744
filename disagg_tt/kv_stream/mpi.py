"""The mpi wire: plain MPI messages between two ranks of a job, or two programs (mpi_programs.py), staged through host memory.

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
from disagg_tt.kv_stream.host_wire import Channel, WireReceiver, WireSender
from disagg_tt.kv_stream.layout import Layout
from disagg_tt.kv_stream.tcp import TcpChannel

FRAME, BYTES = 7001, 7002
BUSY_S = 0.05  # of polling without a pause


class MpiChannel(Channel):
    """Frames and layers to and from rank `peer` of a communicator; `line`, if given, is lost when the other end is."""

    def __init__(self, comm: Any, peer: int, who: str, deadline_s: float, line: TcpChannel | None = None):
        self._comm, self._peer, self.deadline_s, self._line = comm, peer, deadline_s, line
        self._who = f"mpi: the {who} end (rank {peer})"
        self._frame = bytearray(HEADER_BYTES + SMALL_BYTES)
        self._early: list[tuple[Header, bytes]] = []

    def put(self, header: Header, payload: bytes = b"") -> None:
        self.wait(self.post(header, payload), f"taking {header.kind.name}")

    def post(self, header: Header, payload: bytes = b"") -> Any:
        """Start sending a frame; return the request, which keeps its bytes."""
        # after the last frame of a stream a program may end: it must have arrived
        send = self._comm.Issend if header.kind is Kind.TAKEN else self._comm.Isend
        return send(header.encode() + payload, dest=self._peer, tag=FRAME)

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

    def layer(self, form: Any, sends: bool) -> Any:
        """Start sending or receiving a layer's bytes; return the request."""
        return (self._comm.Isend if sends else self._comm.Irecv)(form, self._peer, BYTES)

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
                    if self._over(request, status):
                        return
                    pause = min(pause * 1.5 + 20e-6, 1e-3)
                    time.sleep(pause)
        except MPI.Exception as error:
            raise StreamError(f"{self._who} sends something else while {what}: {error}") from None

    def _over(self, request: Any, status: Any) -> bool:
        """Look whether the line is lost: raises PeerError then, unless the other end's last message was waited for and came."""
        if self._line is None:
            return False
        try:
            self._line.check_failure()
        except PeerError:
            if request.Test(status):
                return True
            request.Cancel()
            self.check_failure()
            raise
        return False

    def close(self) -> None:
        """Close the line; the communicator stays: to leave it, MPI would wait for the other end."""
        if self._line is not None:
            self._line.close()


class _Forms:
    """What both ends make of a layer's pieces: a buffer, or a datatype by which MPI gathers and scatters them."""

    _layouts: dict[Any, Layout]

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        from mpi4py import MPI

        if len(pieces) == 1:
            return [pieces[0].numpy(), MPI.BYTE]
        places = [p.data_ptr() for p in pieces]
        return [MPI.BOTTOM, 1, MPI.BYTE.Create_hindexed([p.numel() for p in pieces], places).Commit()]

    def _forget_layouts(self) -> None:
        for layout in self._layouts.values():
            if len(layout.pieces) > 1:
                layout.form[-1].Free()  # what is still going keeps it
        self._layouts.clear()


class SendsOverMpi(_Forms, WireSender):
    """A prefill end whose channel is an MpiChannel."""

    name = "mpi"

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._going: list[tuple[int, Any, Any]] = []  # layer, its frame, its bytes

    def _send(self, header: Header, layout: Layout) -> None:
        frame = self._channel.post(header)
        self._going.append((header.layer, frame, self._channel.layer(layout.form, sends=True)))

    def _sent(self, layer: int) -> None:
        while self._going and self._going[0][0] <= layer:
            number, frame, going = self._going[0]
            self._channel.wait(frame, f"taking layer {number}", watch=True)
            self._channel.wait(going, f"taking layer {number}", watch=True)
            del self._going[0]


class MpiSender(SendsOverMpi):
    """The prefill rank's end; `peer_rank` is the decode rank in `comm`."""

    def __init__(self, comm: Any, peer_rank: int, *, deadline_s: float = 30.0, verify: bool = True):
        super().__init__(verify=verify)
        self._made = MpiChannel(comm, peer_rank, self.peer, deadline_s)

    def _meet(self) -> MpiChannel:
        return self._made


class ReceivesOverMpi(_Forms, WireReceiver):
    """A decode end whose channel is an MpiChannel."""

    name = "mpi"

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._coming: Any = None  # a layer's bytes, asked for before its header is here

    def _prepare(self, layout: Layout) -> None:
        self._coming = self._channel.layer(layout.form, sends=False)

    def _receive(self, header: Header, payload: bytes, layout: Layout) -> None:
        self._channel.wait(self._coming, f"receiving layer {header.layer}")
        self._coming = None

    def close(self) -> None:
        if self._coming is not None:
            self._coming.Cancel()
            self._coming = None
        super().close()


class MpiReceiver(ReceivesOverMpi):
    """The decode rank's end; `peer_rank` is the prefill rank in `comm`."""

    def __init__(self, comm: Any, peer_rank: int, *, deadline_s: float = 30.0, verify: bool = True):
        super().__init__(verify=verify)
        self._made = MpiChannel(comm, peer_rank, self.peer, deadline_s)

    def _meet(self) -> MpiChannel:
        return self._made
