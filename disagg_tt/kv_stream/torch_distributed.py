"""The torch wire: torch.distributed's send and receive, over gloo between host memories or nccl between CUDA devices.

Two processes make a group of their own, meeting at an address. A frame is a tensor of 32 bytes, and a tensor of its
payload where it has one. A layer of several extents is gathered into one staging buffer first, and scattered after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from disagg_tt.errors import InputError, PeerError
from disagg_tt.kv_stream.frame import HEADER_BYTES, Header, Kind, parse_header
from disagg_tt.kv_stream.host_wire import Channel, WireReceiver, WireSender
from disagg_tt.kv_stream.layout import Extents, Layout
from disagg_tt.kv_stream.tcp import listen
from disagg_tt.transfer_config import is_loopback

BACKENDS = ("gloo", "nccl")
FRAME, BYTES = 0, 1  # tags


class TorchChannel(Channel):
    """A process group of two, over which frames and layers go. Rank 0 sends K and V, rank 1 receives."""

    def __init__(self, backend: str, store: Any, rank: int, hosts: tuple[str, int], deadline_s: float):
        import torch.distributed as dist

        self.device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        self._peer, self.deadline_s = 1 - rank, deadline_s
        self._who = "prefill" if rank else "decode"
        limit = timedelta(seconds=deadline_s)
        self._staging = torch.empty(0, dtype=torch.uint8, device=self.device)
        # gloo sends what is asked for, so the next frame's header is asked for before it is due; nccl knows no tags, and would
        # write a layer there
        self._next: tuple[torch.Tensor, Any] | None = None
        with meeting(hosts, deadline_s):
            self._store: Any = store()
            if backend == "nccl":
                nccl = dist.ProcessGroupNCCL.Options()
                nccl._timeout = limit
                self._group: Any = dist.ProcessGroupNCCL(self._store, rank, 2, nccl)
            else:
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._timeout = limit
                near = is_loopback(hosts[0])
                options._devices = [
                    gloo.create_device(hostname="127.0.0.1") if near else gloo.create_default_device()
                ]
                self._group = gloo(self._store, rank, 2, options)

    def put(self, header: Header, payload: bytes = b"") -> None:
        for work in self.post(header, payload):
            self.wait(work, f"taking {header.kind.name}")

    def post(self, header: Header, payload: bytes = b"") -> list[Any]:
        """Start sending a frame; return what `wait` takes, in order."""
        parts = [
            torch.frombuffer(bytearray(part), dtype=torch.uint8)
            for part in (header.encode(), payload)
            if part
        ]
        return [self._group.send([part.to(self.device)], self._peer, FRAME) for part in parts]

    def get(self, what: str) -> tuple[Header, bytes]:
        values, work = self._next or self._ask(HEADER_BYTES)
        self._next = None
        header = parse_header(self._bytes(values, work, what))
        small = header.kind is not Kind.LAYER and header.length
        payload = self._bytes(*self._ask(header.length), what) if small else b""
        if self.device.type == "cpu":
            self._next = self._ask(HEADER_BYTES)
        return header, payload

    def _ask(self, size: int) -> tuple[torch.Tensor, Any]:
        """Start receiving so many bytes of a frame."""
        values = torch.empty(size, dtype=torch.uint8, device=self.device)
        return values, self._group.recv([values], self._peer, FRAME)

    def _bytes(self, values: torch.Tensor, work: Any, what: str) -> bytes:
        self.wait(work, what)
        return values.cpu().numpy().tobytes()

    def stages(self, pieces: Extents) -> bool:
        """Return whether a layer goes through the staging buffer, which is one."""
        return len(pieces) != 1 or pieces[0].device != self.device

    def send(self, pieces: Extents) -> Any:
        """Start sending a layer; return what `wait` takes. What is staged must be sent before the next is."""
        whole = self._whole(pieces)
        if self.stages(pieces):
            for piece, part in zip(pieces, whole.split([p.numel() for p in pieces]), strict=True):
                part.copy_(piece)
        return self._group.send([whole], self._peer, BYTES)

    def receive(self, pieces: Extents) -> Callable[[str], None]:
        """Start receiving a layer; return what waits for it."""
        whole = self._whole(pieces)
        work = self._group.recv([whole], self._peer, BYTES)

        def finish(what: str) -> None:
            self.wait(work, what)
            if self.stages(pieces):
                for piece, part in zip(pieces, whole.split([p.numel() for p in pieces]), strict=True):
                    piece.copy_(part)

        return finish

    def _whole(self, pieces: Extents) -> torch.Tensor:
        """Return the only piece, or as much of the staging buffer as all pieces need."""
        if not self.stages(pieces):
            return pieces[0]
        size = sum(p.numel() for p in pieces)
        if self._staging.numel() < size:
            self._staging = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._staging[:size]

    def wait(self, work: Any, what: str) -> None:
        try:
            work.wait(timedelta(seconds=self.deadline_s))
        except RuntimeError as error:
            raise PeerError(
                f"torch: the {self._who} end is gone, or did not move within {self.deadline_s:g} s, while {what}: "
                f"{str(error)[:200]}"
            ) from None

    def close(self) -> None:
        if self.device.type == "cuda" and self._group is not None:
            self._group.abort()  # else its watchdog takes the process down when the other end has gone
        self._group = self._store = self._next = None
        self._staging = torch.empty(0, dtype=torch.uint8)


@contextmanager
def meeting(address: tuple[str, int], deadline_s: float) -> Iterator[None]:
    """Inside the block, name what torch.distributed raises when nobody comes."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            f"torch: the two ends did not meet at {address[0]}:{address[1]} within {deadline_s:g} s: {error}"
        ) from None


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"torch: backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "nccl" and torch.cuda.device_count() < 2:
        raise InputError(f"torch: nccl needs 2 CUDA devices, {torch.cuda.device_count()} are here; use gloo")


class TorchSender(WireSender):
    """The prefill end: joins the receiver at `host`:`port` when its first stream begins."""

    name = "torch"
    _channel: TorchChannel

    def __init__(
        self, host: str, port: int, *, backend: str = "gloo", deadline_s: float = 30.0, verify: bool = True
    ):
        super().__init__(verify=verify)
        _check_backend(backend)
        self._backend, self._address, self._deadline_s = backend, (host, port), deadline_s
        self._going: list[tuple[int, list[Any]]] = []  # layer, torch's works

    def _meet(self) -> TorchChannel:
        import torch.distributed as dist

        limit = timedelta(seconds=self._deadline_s)
        store = partial(dist.TCPStore, *self._address, 2, is_master=False, timeout=limit)
        return TorchChannel(self._backend, store, 0, self._address, self._deadline_s)

    def _send(self, header: Header, layout: Layout) -> None:
        pieces = layout.pieces
        if self._channel.stages(pieces):
            self._sent(header.layer - 1)
        works = self._channel.post(header)
        self._going.append((header.layer, [*works, self._channel.send(pieces)]))

    def _sent(self, layer: int) -> None:
        while self._going and self._going[0][0] <= layer:
            number, works = self._going.pop(0)
            for work in works:
                self._channel.wait(work, f"taking layer {number}")


class TorchReceiver(WireReceiver):
    """The decode end: listens at `host`:`port` (0: any; then see `port`)."""

    name = "torch"
    _channel: TorchChannel

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, backend: str = "gloo", deadline_s: float = 30.0,
        verify: bool = True,
    ):  # fmt: skip
        super().__init__(verify=verify)
        _check_backend(backend)
        self._backend, self._host, self._deadline_s = backend, host, deadline_s
        self._listener = listen(host, port)
        self.port: int = self._listener.getsockname()[1]

    def _meet(self) -> TorchChannel:
        import torch.distributed as dist

        address, limit = (self._host, self.port), timedelta(seconds=self._deadline_s)
        listener = self._listener.detach()  # the store closes it
        store = partial(
            dist.TCPStore,
            *address,
            2,
            is_master=True,
            timeout=limit,
            wait_for_workers=True,
            master_listen_fd=listener,
        )
        return TorchChannel(self._backend, store, 1, address, self._deadline_s)

    def _prepare(self, layout: Layout) -> None:
        if self._backend == "gloo":  # nccl knows no tags: it would write the header there
            self._coming = self._channel.receive(layout.pieces)

    def _receive(self, header: Header, payload: bytes, layout: Layout) -> None:
        if self._backend != "gloo":
            self._coming = self._channel.receive(layout.pieces)
        self._coming(f"receiving layer {header.layer}")

    def close(self) -> None:
        super().close()
        self._listener.close()
