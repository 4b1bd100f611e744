"""What a MeshSocket is made from: connections between cores, the FIFO, and who is at the two ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from disagg_tt.device.emulator.mesh import MeshDevice, get_fabric_config
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.types import BufferType, CoreCoord, FabricConfig, MeshCoordinate
from disagg_tt.errors import DeviceError, NotEmulatedError

LINKS = 2  # fabric links between the two boards, so at most that many connections a chip
PACKET_BYTES = 4352  # of payload that the fabric moves at once
DIRECT_FIFO_BYTES = 64  # what direct transfers need, for their addresses


class SocketEndpoint(Enum):
    SENDER = 0
    RECEIVER = 1


@dataclass(unsafe_hash=True)
class MeshCoreCoord:
    """A core of a chip of a mesh."""

    device_coord: MeshCoordinate
    core_coord: CoreCoord

    def __repr__(self) -> str:
        core = self.core_coord
        return f"MeshCoreCoord(device={list(self.device_coord)}, core=({core.x},{core.y}))"


@dataclass(eq=False)
class SocketConnection:
    """From a core of the sending mesh to a core of the receiving mesh."""

    sender_core: MeshCoreCoord
    receiver_core: MeshCoreCoord


@dataclass(eq=False)
class SocketMemoryConfig:
    """The FIFO: its place (L1 or DRAM) and its bytes for each connection. Sub-devices and per-core FIFOs are refused."""

    socket_storage_type: BufferType
    fifo_size: int
    sender_sub_device: Any = None
    receiver_sub_device: Any = None
    per_core_allocation: bool = False

    def __post_init__(self) -> None:
        if self.fifo_size < 0:
            raise TypeError(f"SocketMemoryConfig: fifo_size={self.fifo_size}; it must be 0 or more bytes")
        for name in ("sender_sub_device", "receiver_sub_device"):
            if getattr(self, name) is not None:
                raise NotEmulatedError(
                    f"SocketMemoryConfig: {name}={getattr(self, name)!r}; the emulator does not have sub-devices in sockets, leave it out"
                )


class SocketConfig:
    """Connections, FIFO, and the ends: `sender_rank` and `receiver_rank`, or `sender_mesh_id` and `receiver_mesh_id`.

    Positional ends are ranks. As in ttnn, a config has no attributes to read.
    """

    def __init__(
        self,
        connections: Sequence[SocketConnection],
        memory_config: SocketMemoryConfig,
        sender_rank: int | None = None,
        receiver_rank: int | None = None,
        *,
        sender_mesh_id: int | None = None,
        receiver_mesh_id: int | None = None,
    ):
        ranks, meshes = (sender_rank, receiver_rank), (sender_mesh_id, receiver_mesh_id)
        if meshes != (None, None) and (None in meshes or ranks != (None, None)):
            raise TypeError(
                "SocketConfig: give sender_rank and receiver_rank, or sender_mesh_id and receiver_mesh_id, both of a kind"
            )
        for end in (*ranks, *meshes):
            if end is not None and not isinstance(end, int):
                raise TypeError(f"SocketConfig: an end is {end!r}; ends are int, convert it with int()")
        self._connections = [SocketConnection(c.sender_core, c.receiver_core) for c in connections]
        self._memory = memory_config
        self._ranks = None if meshes != (None, None) else (sender_rank or 0, receiver_rank or 0)
        self._mesh_ids = (
            None if sender_mesh_id is None or receiver_mesh_id is None else (sender_mesh_id, receiver_mesh_id)
        )

    def _description(self) -> str:
        """Return what the two ends must agree on."""
        memory = self._memory
        cores = [f"{c.sender_core}->{c.receiver_core}" for c in self._connections]
        return f"{memory.socket_storage_type.name} FIFO of {memory.fifo_size} B, {', '.join(cores)}"


def check_config(config: SocketConfig, mesh: MeshDevice, sends: bool) -> None:
    """Raise DeviceError unless `config` can make the sending or receiving end of a socket on `mesh`."""
    if get_fabric_config() is FabricConfig.DISABLED:
        raise DeviceError(
            "MeshSocket without a fabric; call set_fabric_config(FabricConfig.FABRIC_2D) before opening the mesh"
        )
    if not config._connections:
        raise DeviceError("MeshSocket with no connections; give one SocketConnection a chip at least")
    receivers = [c.receiver_core for c in config._connections]
    double = [core for core, count in Counter(receivers).items() if count > 1]
    if double:
        raise DeviceError(
            f"two connections share the receiver core {double[0]}; each needs a core of its own"
        )
    memory = config._memory
    if memory.per_core_allocation:
        raise NotEmulatedError(
            "MeshSocket with per_core_allocation: the emulator does not have ttnn's hybrid allocator; leave it out"
        )
    if memory.socket_storage_type not in (BufferType.L1, BufferType.DRAM):
        raise NotEmulatedError(
            f"MeshSocket with a FIFO in {memory.socket_storage_type.name}: the emulator does not have that; use L1 or DRAM"
        )
    rows, columns = mesh.shape[0], mesh.shape[1]
    grid = mesh.compute_with_storage_grid_size()
    for connection in config._connections:
        core = connection.sender_core if sends else connection.receiver_core
        chip, xy = core.device_coord, core.core_coord
        if len(tuple(chip)) != 2 or chip[0] >= rows or chip[1] >= columns:
            raise DeviceError(
                f"MeshSocket: {core} is not in the mesh of {rows}x{columns} chips; its chips are (0, 0)..({rows - 1}, {columns - 1})"
            )
        if xy.x >= grid.x or xy.y >= grid.y:
            raise DeviceError(f"MeshSocket: {core} is outside the grid of {grid.x}x{grid.y} cores")


def chips(what: str, config: SocketConfig, mesh: MeshDevice, sends: bool) -> list[int]:
    """Return the chips of this end's mesh that take part, in the order of their first connections.

    Raises DeviceError when a chip has more connections than links, or is joined to two chips: the pages of its shard
    are dealt out over its connections, so that neither of them would get a whole shard.
    """
    joins = [
        (tuple(c.sender_core.device_coord), tuple(c.receiver_core.device_coord)) for c in config._connections
    ]
    side = 0 if sends else 1
    most = max(Counter(join[side] for join in joins).values())
    if most > LINKS:
        raise DeviceError(
            f"{what}: {most} connections on one chip; the fabric has {LINKS} links, use at most that many"
        )
    joined = list(dict.fromkeys(joins))
    for end, name in ((0, "sending"), (1, "receiving")):
        chip, count = Counter(join[end] for join in joined).most_common(1)[0]
        if count > 1:
            raise DeviceError(
                f"{what}: the {name} chip {chip} is joined to {count} chips, which would each get a part of the pages; join it to one"
            )
    return [join[side][0] * mesh.shape[1] + join[side][1] for join in joined]


def fifo_bytes(config: SocketConfig, spec: Spec, page: int) -> int:
    """Return what a transfer takes of a connection's FIFO: its pages, packed into packets of the fabric."""
    fifo = config._memory.fifo_size
    most = max(Counter(tuple(c.sender_core.device_coord) for c in config._connections).values())
    pages = -(-spec.bytes // max(spec.page, 1) // most)
    together = max(min(PACKET_BYTES, fifo) // page, 1)
    return -(-pages // together) * together * page
