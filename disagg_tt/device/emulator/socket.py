"""MeshSockets: what one mesh sends, another receives, chip by chip, in order.

send_recv.py has the operations; here are the ends, and how those of two ranks meet.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from typing import Any

from disagg_tt.device.emulator import distributed, shm, waits
from disagg_tt.device.emulator.channel import Channel, LocalChannel, LocalPair, RingChannel
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.mpi_channel import MpiChannel
from disagg_tt.device.emulator.socket_config import (
    MeshCoreCoord,
    SocketConfig,
    SocketConnection,
    SocketEndpoint,
    check_config,
)
from disagg_tt.device.emulator.types import BufferType, MeshCoordinate
from disagg_tt.errors import DeviceError, NotEmulatedError

HANDSHAKE_S = 10.0  # ttnn's own, fixed
CONTROL_BYTES = 64  # of L1 on each core of either end, for counters
_ALIGNMENT = 32


class MeshSocket:
    """One end of a connection between two meshes. Creating it meets the other end, within 10 s.

    The receiving end holds the FIFO in L1 of its cores or in DRAM, as its memory config says. `bytes_written` counts the
    packed payload that this end sent.
    """

    def __init__(
        self, device: MeshDevice, config: SocketConfig, *, end: tuple[bool, Channel, str] | None = None
    ):
        self._mesh, self._config = device, config
        self._taken: list[tuple[BufferType, int]] = []
        self._next = 0  # number of the newest transfer
        self._unsettled: deque[tuple[int, int]] = deque()  # (number, bytes of FIFO) not known to be received
        self.bytes_written = 0
        ends = None if end else _ends(config)
        self._sends = end[0] if end else ends == (_me(), ends[1])  # type: ignore[index]
        check_config(config, device, self._sends)
        memory = config._memory
        self._take(BufferType.L1, CONTROL_BYTES)
        if not self._sends:
            self._take(memory.socket_storage_type, -(-memory.fifo_size // _ALIGNMENT) * _ALIGNMENT)
        self._channel, self._peer = end[1:] if end else _meet(config, ends, self._sends)  # type: ignore[arg-type]
        self._plans: dict[Any, Any] = {}  # send_recv's, by spec and mode

    def _take(self, kind: BufferType, size: int) -> None:
        self._mesh.memory.take(kind, size, "a MeshSocket")
        self._taken.append((kind, size))

    def __del__(self) -> None:
        for kind, size in getattr(self, "_taken", ()):
            self._mesh.memory.release(kind, size)

    def fail(self, error: str) -> None:
        """Tell the other end that nothing more will come from here."""
        self._channel.fail(error)

    def leave(self) -> None:
        """Tell the other end that this one is closed."""
        self._channel.leave()

    def check(self) -> None:
        """Raise what the other end failed with, or that something was sent here which nobody received."""
        self._channel.check()
        if not self._sends and self._channel.unread():
            raise DeviceError(
                f"a mesh is closed with transfer number {self._next + 1} from {self._peer} not received; on hardware it stays in "
                "the FIFO and the next program reads it. Receive what is sent before closing"
            )

    def get_mesh_device(self) -> MeshDevice:
        return self._mesh

    def get_socket_endpoint_type(self) -> SocketEndpoint:
        return SocketEndpoint.SENDER if self._sends else SocketEndpoint.RECEIVER

    def get_connection_config(self) -> list[SocketConnection]:
        return list(self._config._connections)

    def get_active_cores(self) -> list[MeshCoreCoord]:
        """Return this end's cores."""
        return [c.sender_core if self._sends else c.receiver_core for c in self._config._connections]

    def get_config_buffer_address(self) -> int:
        raise NotEmulatedError(
            "get_config_buffer_address: the emulator does not have device addresses; it has get_active_cores, "
            "get_connection_config, get_mesh_device and get_socket_endpoint_type"
        )

    def get_fabric_node_id(self, endpoint: SocketEndpoint, coord: MeshCoordinate) -> Any:
        raise NotEmulatedError(
            f"get_fabric_node_id({endpoint}, {coord}): the emulator does not have fabric nodes; use get_connection_config"
        )


_numbers: Counter[tuple[int, int]] = Counter()


def _me() -> int:
    return distributed.rank()


def _ends(config: SocketConfig) -> tuple[int, int]:
    """Return the (sender, receiver) ranks, from the config's ranks or through the ranks' mesh ids; this is one of them."""
    ends = config._ranks
    if config._mesh_ids is not None:
        ids = distributed.distributed_context_allgather_int(int(os.environ.get("TT_MESH_ID", "-1")))
        for wanted in config._mesh_ids:
            if ids.count(wanted) != 1:
                raise DeviceError(
                    f"mesh id {wanted} belongs to {ids.count(wanted)} ranks; the ranks' mesh ids (TT_MESH_ID) are {ids}"
                )
        ends = ids.index(config._mesh_ids[0]), ids.index(config._mesh_ids[1])
    assert ends is not None
    ranks, me = distributed.size(), _me()
    if ends[0] == ends[1] or me not in ends:
        raise DeviceError(
            f"socket from rank {ends[0]} to rank {ends[1]} made on rank {me}; make it on those two, which must be different"
        )
    if not all(0 <= end < ranks for end in ends):
        raise DeviceError(
            f"socket from rank {ends[0]} to rank {ends[1]}; the job has ranks 0..{ranks - 1}, use two of those"
        )
    return ends


def _meet(config: SocketConfig, ends: tuple[int, int], sends: bool) -> tuple[Channel, str]:
    """Meet the other rank's end; return the channel to it and its name."""
    me, peer = ends if sends else ends[::-1]
    _numbers[ends] += 1
    number = _numbers[ends]
    channel = MpiChannel(peer, number, sends)
    mine = config._description()
    there = f"rank {peer} making its end of socket {number} from rank {ends[0]} to rank {ends[1]}"
    fix = "Make each socket on both ranks in the same order: even ranks their sending end first, odd ranks their receiving end"

    def answer(note: dict[str, Any]) -> dict[str, Any]:
        channel.put(note)
        try:
            return channel.get(there, lambda: waits.host_of(peer), HANDSHAKE_S, fix)
        except DeviceError as error:
            raise DeviceError(
                f"rank {me}: timed out trying to establish a socket connection (make sockets on both ranks before weights "
                f"and compute): {error}"
            ) from None

    size = RingChannel.bytes_for(config._memory.fifo_size * len(config._connections))
    made = shm.create(size) if sends else None
    try:
        theirs = answer(
            {
                "config": mine,
                "host": shm.host(),
                "memory": made and [os.getpid(), made.fd, made.cookie],
            }
        )
        if theirs["config"] != mine:
            raise DeviceError(
                f"socket ends differ: rank {me} has {mine}, rank {peer} has {theirs['config']}; give both the same config"
            )
        segment = made
        if not sends and theirs["memory"] and theirs["host"] == shm.host():
            pid, fd, cookie = theirs["memory"]
            segment = shm.attach(pid, fd, cookie, size)
        # Without this second round a late end would believe in one that has given up.
        shared = answer({"shared": segment is not None})["shared"] and segment is not None
    finally:
        if made is not None:
            made.seal()
    if shared and segment is not None:
        return RingChannel(segment, 0 if sends else 1, peer), f"rank {peer}"
    return channel, f"rank {peer}"


def create_socket_pair(
    sender_mesh_device: MeshDevice, receiver_mesh_device: MeshDevice, socket_config: SocketConfig
) -> tuple[MeshSocket, MeshSocket]:
    """Return the two ends of a socket between two meshes of this process; ranks and mesh ids are ignored."""
    pair = LocalPair()
    name = "the other mesh of this process"
    return (
        MeshSocket(sender_mesh_device, socket_config, end=(True, LocalChannel(pair, 0), name)),
        MeshSocket(receiver_mesh_device, socket_config, end=(False, LocalChannel(pair, 1), name)),
    )
