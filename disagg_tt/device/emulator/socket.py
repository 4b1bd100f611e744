"""MeshSockets: what one mesh sends, another receives, chip by chip, in order.

A transfer is a header (number, spec, mode), the packed shards, and the receiver's word that it took them. ttnn checks
none of what the header carries: on hardware a receive of another shape, dtype or mode hangs or corrupts. Here it is an
error on both ranks that names both sides.
"""

from __future__ import annotations

import os
import queue as queues
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disagg_tt.device.emulator import distributed
from disagg_tt.device.emulator.channel import Channel, LocalChannel, MpiChannel
from disagg_tt.device.emulator.launch import launch_in_place, reads
from disagg_tt.device.emulator.mesh import MeshDevice, fabric_config
from disagg_tt.device.emulator.numeric import pack, unpack
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import BufferType, CoreCoord, FabricConfig, MeshCoordinate
from disagg_tt.errors import DeviceError

HANDSHAKE_S = 10.0  # ttnn's own, fixed
CONTROL_BYTES = 64  # of L1 on each core of either end, for counters
LINKS = 2  # fabric links between the two boards, so at most that many connections a chip


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


class MeshSocket:
    """One end of a connection between two meshes. Creating it meets the other end, within 10 s.

    The receiving end holds the FIFO in L1 of its cores or in DRAM, as its memory config says. `bytes_written` counts the
    packed payload that this end gave to the transport.
    """

    def __init__(
        self, device: MeshDevice, config: SocketConfig, *, end: tuple[bool, Channel, str] | None = None
    ):
        self._mesh, self._config = device, config
        self._next = 0
        self.bytes_written = 0
        self._taken: list[tuple[BufferType, int]] = []
        _check_config(config)
        self._sends, self._channel, self._peer = end or _meet(config)
        self._take(BufferType.L1, CONTROL_BYTES)
        if not self._sends:
            memory = config.memory_config
            self._take(memory.socket_storage_type, memory.fifo_size)

    def _take(self, kind: BufferType, size: int) -> None:
        self._mesh.memory.take(kind, size, "a MeshSocket")
        self._taken.append((kind, size))

    def __del__(self) -> None:
        for kind, size in getattr(self, "_taken", ()):
            self._mesh.memory.release(kind, size)

    def get_mesh_device(self) -> MeshDevice:
        return self._mesh


_numbers: Counter[tuple[int, int]] = Counter()


def _meet(config: SocketConfig) -> tuple[bool, Channel, str]:
    """Meet the other rank's end; return whether this one sends, the channel between them, and the peer's name."""
    me = distributed.distributed_context_get_rank()
    ends = _ranks(config)
    if me not in ends or ends[0] == ends[1]:
        raise DeviceError(
            f"socket from rank {ends[0]} to rank {ends[1]} made on rank {me}; it must be made on those two"
        )
    sends = me == ends[0]
    peer = ends[1] if sends else ends[0]
    _numbers[ends] += 1
    channel = MpiChannel(peer, _numbers[ends], sends)
    mine = {"connections": len(config.connections), "fifo": config.memory_config.fifo_size}
    late = (
        f"rank {me}: timed out trying to establish a socket connection (make sockets on both ranks before weights and "
        f"compute): rank {peer} making its end"
    )
    channel.put(mine, None)
    theirs = channel.get_note(late, HANDSHAKE_S)
    if theirs != mine:
        raise DeviceError(
            f"socket ends differ: rank {me} has {mine}, rank {peer} has {theirs}; give both the same config"
        )
    channel.put({"met": True}, None)  # without it a late end would believe in one that has given up
    channel.get_note(late, HANDSHAKE_S)
    return sends, channel, f"rank {peer}"


def _check_config(config: SocketConfig) -> None:
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
    name = "the other mesh of this process"
    return (
        MeshSocket(sender, config, end=(True, LocalChannel(back, there), name)),
        MeshSocket(receiver, config, end=(False, LocalChannel(there, back), name)),
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


def _send(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> list[Tensor]:
    mesh, number, mine = _begin(what, tensor, socket, True, direct)
    queue, values, spec = mesh.queue(), tensor._values, tensor.spec
    reads(what, queue, tensor)

    def work() -> None:
        shards = whole(values.data, spec).expand(mesh.get_num_devices(), *spec.shape)
        payload = pack(_padded(shards, spec), spec.dtype)
        socket._channel.put({"number": number, "bytes": payload.numel(), **mine}, payload)
        socket.bytes_written += payload.numel()
        answer = socket._channel.get_note(
            f"{what} number {number} of {mine}: a matching receive on {socket._peer}"
        )
        if answer["error"]:
            raise DeviceError(answer["error"])

    queue.submit(what, work, waits=True)
    return []


def _padded(shards: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return [chips, *padded shape]: what travels is whole pages."""
    grow = [w - h for h, w in zip(reversed(spec.shape), reversed(spec.padded_shape), strict=True)]
    return torch.nn.functional.pad(shards, [n for g in grow for n in (0, g)]) if any(grow) else shards


def _receive(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> list[Tensor]:
    mesh, number, mine = _begin(what, tensor, socket, False, direct)
    spec = tensor.spec

    def receive() -> torch.Tensor:
        theirs = socket._channel.get_note(
            f"{what} number {number} into {mine}: a matching send on {socket._peer}"
        )
        size = theirs.pop("bytes")
        # Taken even if it does not fit: until then a large payload keeps the sender from hearing why.
        payload = socket._channel.get_payload(
            size, f"{what} number {number}: {size} bytes from {socket._peer}"
        )
        expected = {"number": number, **mine}
        if theirs != expected:
            error = (
                f"socket transfer mismatch: {socket._peer} sends {theirs}, this rank receives {expected}; on hardware this hangs "
                "or corrupts memory. Post receives in the order of the sends, with the same shape, dtype, layout and mode"
            )
            socket._channel.put({"error": error}, None)
            raise DeviceError(error)
        shards = unpack(payload, (mesh.get_num_devices(), *spec.padded_shape), spec.dtype)
        socket._channel.put({"error": ""}, None)
        return shards[tuple(slice(0, d) for d in (shards.shape[0], *spec.shape))]

    launch_in_place(what, tensor, receive, waits=True)
    return [tensor]


def send_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue sending each chip's shard through the socket's FIFO; returns no tensors."""
    return _send("send_async", input_tensor, mesh_socket, direct=False)


def recv_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue receiving into a tensor of the sender's spec, and return it."""
    return _receive("recv_async", output_tensor, mesh_socket, direct=False)


def send_direct_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue sending straight into the receiver's tensor; returns no tensors."""
    return _send("send_direct_async", input_tensor, mesh_socket, direct=True)


def recv_direct_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue being written by the sender, and return the tensor."""
    return _receive("recv_direct_async", output_tensor, mesh_socket, direct=True)
