"""MeshSockets: what one mesh sends, another receives, chip by chip, in order.

A transfer is a header (number, spec, mode), the packed shards, and the receiver's word that it took them. ttnn checks
none of what the header carries: on hardware a receive of another shape, dtype or mode hangs or corrupts. Here it is an
error on both ranks that names both sides.
"""

from __future__ import annotations

import json
import os
import queue as queues
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from disagg_tt.device.emulator import distributed
from disagg_tt.device.emulator.mesh import MeshDevice, fabric_config
from disagg_tt.device.emulator.numeric import pack, unpack
from disagg_tt.device.emulator.tensor import Tensor, _check_order, on_device, whole
from disagg_tt.device.emulator.types import BufferType, CoreCoord, FabricConfig, MeshCoordinate, Spec
from disagg_tt.errors import DeviceError

HANDSHAKE_S = 10.0  # ttnn's own, fixed
LINKS = 2  # fabric links between the two boards, so at most that many connections a chip
MAX_NOTE = 4096


@dataclass(frozen=True)
class MeshCoreCoord:
    device_coord: MeshCoordinate
    core_coord: CoreCoord


@dataclass(frozen=True)
class SocketConnection:
    sender_core: MeshCoreCoord
    receiver_core: MeshCoreCoord


@dataclass(frozen=True)
class SocketMemoryConfig:
    socket_storage_type: BufferType
    fifo_size: int


class SocketConfig:
    """Connections, FIFO, and who is at the ends: ranks, or mesh ids (`sender_mesh_id`, `receiver_mesh_id`)."""

    def __init__(
        self,
        connections: Sequence[SocketConnection],
        memory_config: SocketMemoryConfig,
        sender_mesh_id: int | None = None,
        receiver_mesh_id: int | None = None,
        *,
        sender_rank: int | None = None,
        receiver_rank: int | None = None,
    ):
        self.connections, self.memory_config = list(connections), memory_config
        self.sender_mesh_id, self.receiver_mesh_id = sender_mesh_id, receiver_mesh_id
        self.sender_rank, self.receiver_rank = sender_rank, receiver_rank


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
        return note  # type: ignore[no-any-return]

    def get_payload(self, size: int, what: str) -> torch.Tensor:
        assert self._payload is not None
        return self._payload  # type: ignore[no-any-return]


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
        return json.loads(bytes(data[: status.Get_count(MPI.BYTE)]))  # type: ignore[no-any-return]

    def get_payload(self, size: int, what: str) -> torch.Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        request = self._comm.Irecv(data.numpy(), source=self._peer, tag=self._in + 1)
        distributed.poll(request.Test, what)
        return data


_numbers: Counter[tuple[int, int]] = Counter()


class MeshSocket:
    """One end of a connection between two meshes. Creating it meets the other end, within 10 s."""

    def __init__(
        self,
        device: MeshDevice,
        config: SocketConfig,
        *,
        channel: Channel | None = None,
        sender: bool | None = None,
    ):
        self._mesh, self._config = device, config
        self._next = 0
        self.bytes_written = 0  # payload bytes given to the transport, packed
        _check_config(config, device)
        if channel is not None:
            assert sender is not None
            self._sends, self._channel, self._peer = sender, channel, "the other mesh of this process"
            return
        me = distributed.distributed_context_get_rank()
        ends = _ranks(config)
        if me not in ends or ends[0] == ends[1]:
            raise DeviceError(
                f"socket from rank {ends[0]} to rank {ends[1]} made on rank {me}; it must be made on those two"
            )
        self._sends = me == ends[0]
        peer = ends[1] if self._sends else ends[0]
        self._peer = f"rank {peer}"
        _numbers[ends] += 1
        self._channel = MpiChannel(peer, _numbers[ends], self._sends)
        self._meet(me, peer)

    def _meet(self, me: int, peer: int) -> None:
        mine = {"connections": len(self._config.connections), "fifo": self._config.memory_config.fifo_size}
        self._channel.put(mine, None)
        theirs = self._channel.get_note(
            f"rank {me}: timed out trying to establish a socket connection (make sockets on both ranks before weights and "
            f"compute): rank {peer} making its end",
            HANDSHAKE_S,
        )
        if theirs != mine:
            raise DeviceError(
                f"socket ends differ: rank {me} has {mine}, rank {peer} has {theirs}; give both the same config"
            )

    def get_mesh_device(self) -> MeshDevice:
        return self._mesh


def _check_config(config: SocketConfig, mesh: MeshDevice) -> None:
    if fabric_config() is FabricConfig.DISABLED:
        raise DeviceError(
            "MeshSocket without a fabric; call set_fabric_config(FabricConfig.FABRIC_2D) before opening the mesh"
        )
    if not config.connections:
        raise DeviceError("MeshSocket with no connections; give one SocketConnection a chip at least")
    receivers = [c.receiver_core for c in config.connections]
    double = [core for core, count in Counter(receivers).items() if count > 1]
    if double:
        raise DeviceError(
            f"two connections share the receiver core {double[0]}; each needs a core of its own"
        )


def _ranks(config: SocketConfig) -> tuple[int, int]:
    """Return the (sender, receiver) ranks, from the config's ranks or through the ranks' mesh ids."""
    if config.sender_rank is not None and config.receiver_rank is not None:
        return int(config.sender_rank), int(config.receiver_rank)
    if config.sender_mesh_id is None or config.receiver_mesh_id is None:
        raise DeviceError(
            "SocketConfig needs sender_rank and receiver_rank, or sender_mesh_id and receiver_mesh_id"
        )
    ids = distributed.distributed_context_allgather_int(int(os.environ.get("TT_MESH_ID", "-1")))
    for wanted in (config.sender_mesh_id, config.receiver_mesh_id):
        if ids.count(wanted) != 1:
            raise DeviceError(
                f"mesh id {wanted} belongs to {ids.count(wanted)} ranks; the ranks' mesh ids (TT_MESH_ID) are {ids}"
            )
    return ids.index(config.sender_mesh_id), ids.index(config.receiver_mesh_id)


def create_socket_pair(
    sender: MeshDevice, receiver: MeshDevice, config: SocketConfig
) -> tuple[MeshSocket, MeshSocket]:
    """Return the two ends of a socket between two meshes of this process."""
    there: Any = queues.Queue()
    back: Any = queues.Queue()
    return (
        MeshSocket(sender, config, channel=LocalChannel(back, there), sender=True),
        MeshSocket(receiver, config, channel=LocalChannel(there, back), sender=False),
    )


# ---------------------------------------------------------------- transfers


def _describe(spec: Spec, direct: bool) -> dict[str, Any]:
    mode = "direct" if direct else "fifo"
    return {"shape": list(spec.shape), "dtype": spec.dtype.value, "layout": spec.layout.name, "mode": mode}


def _begin(
    what: str, tensor: Tensor, socket: MeshSocket, sends: bool, direct: bool
) -> tuple[MeshDevice, int, dict[str, Any]]:
    mesh = on_device(what, tensor)
    config = socket._config
    if mesh is not socket._mesh:
        raise DeviceError(f"{what}: tensor on {mesh!r}, socket on {socket._mesh!r}")
    if socket._sends is not sends:
        raise DeviceError(
            f"{what} on the socket's {'sending' if socket._sends else 'receiving'} end; use the other end"
        )
    coords = Counter((c.sender_core if sends else c.receiver_core).device_coord for c in config.connections)
    if max(coords.values()) > LINKS:
        raise DeviceError(
            f"{what}: {max(coords.values())} connections on one chip; the fabric has {LINKS} links, use at most that many"
        )
    if len(coords) != mesh.get_num_devices():
        raise DeviceError(
            f"{what}: the socket connects {len(coords)} of {mesh.get_num_devices()} chips; the others' shards would not move"
        )
    page = -(-tensor.buffer_page_size() // 32) * 32
    if not direct and config.memory_config.fifo_size < page:
        raise DeviceError(
            f"{what}: FIFO of {config.memory_config.fifo_size} B for pages of {page} B; make it {page} B or more"
        )
    socket._next += 1
    return mesh, socket._next, _describe(tensor.spec, direct)


def _send(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> None:
    mesh, number, mine = _begin(what, tensor, socket, True, direct)
    queue, storage, spec = mesh.queue(), tensor._storage, tensor.spec
    _check_order(what, queue, storage)

    def work() -> None:
        values = whole(storage.data, spec).expand(mesh.get_num_devices(), *spec.shape)
        grow = [
            n
            for have, want in zip(reversed(spec.shape), reversed(spec.padded_shape), strict=True)
            for n in (0, want - have)
        ]
        if any(grow):
            values = torch.nn.functional.pad(values, grow)
        payload = pack(values, spec.dtype)
        socket._channel.put({"number": number, "bytes": payload.numel(), **mine}, payload)
        socket.bytes_written += payload.numel()
        answer = socket._channel.get_note(
            f"{what} number {number} of {mine}: a matching receive on {socket._peer}"
        )
        if answer["error"]:
            raise DeviceError(answer["error"])

    sequence = queue.submit(what, work, waits=True)
    storage.readers = [r for r in storage.readers or () if r[0].completed < r[1]] + [(queue, sequence)]


def _receive(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> None:
    mesh, number, mine = _begin(what, tensor, socket, False, direct)
    queue, storage, spec = mesh.queue(), tensor._storage, tensor.spec
    _check_order(what, queue, storage)

    def work() -> None:
        theirs = socket._channel.get_note(
            f"{what} number {number} into {mine}: a matching send on {socket._peer}"
        )
        size = theirs.pop("bytes")
        expected = {"number": number, **mine}
        shape = (mesh.get_num_devices(), *spec.padded_shape)
        if theirs != expected:
            error = (
                f"socket transfer mismatch: {socket._peer} sends {theirs}, this rank receives {expected}; on hardware this hangs "
                "or corrupts memory. Post receives in the order of the sends, with the same shape, dtype, layout and mode"
            )
            socket._channel.put({"error": error}, None)
            raise DeviceError(error)
        payload = socket._channel.get_payload(
            size, f"{what} number {number}: {size} bytes from {socket._peer}"
        )
        values = unpack(payload, shape, spec.dtype)
        storage.data = values[tuple(slice(0, d) for d in (values.shape[0], *spec.shape))]
        storage.memo = None
        socket._channel.put({"error": ""}, None)

    storage.writer = queue
    storage.written = queue.submit(what, work, waits=True)


def send_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> None:
    """Enqueue sending each chip's shard through the socket's FIFO."""
    _send("send_async", input_tensor, mesh_socket, direct=False)


def recv_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> None:
    """Enqueue receiving into a tensor of the sender's spec."""
    _receive("recv_async", output_tensor, mesh_socket, direct=False)


def send_direct_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> None:
    """Enqueue sending straight into the receiver's tensor."""
    _send("send_direct_async", input_tensor, mesh_socket, direct=True)


def recv_direct_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> None:
    """Enqueue being written by the sender."""
    _receive("recv_direct_async", output_tensor, mesh_socket, direct=True)
