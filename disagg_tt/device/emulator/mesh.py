"""Meshes of emulated Wormhole chips: opening, submeshes, memory, command queues, fabric."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from disagg_tt.device.emulator.queue import CommandQueue, Event
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.types import (
    BufferType,
    CoreCoord,
    DispatchCoreConfig,
    DispatchCoreType,
    FabricConfig,
    MeshCoordinate,
    MeshShape,
)
from disagg_tt.errors import DeviceError

DRAM_BANKS = 12
# What ttnn.get_memory_view gives on the mock cluster, and how it rounds.
DRAM_BANK_BYTES = 1_072_693_184
L1_CORE_BYTES = 1_393_312
PAGE_ALIGNMENT = {BufferType.DRAM: 32, BufferType.L1: 16}
BANK_ALIGNMENT = 32
HOST_CHIPS = 8
QUEUES = 2

_fabric = FabricConfig.DISABLED
_open_chips: set[int] = set()
_current = threading.local()


class Memory:
    """Bytes in use in each DRAM bank and each core's L1 of a mesh's chips; all chips of a mesh allocate alike."""

    def __init__(self, cores: int):
        self.banks = {BufferType.DRAM: DRAM_BANKS, BufferType.L1: cores}
        self.limit = {BufferType.DRAM: DRAM_BANK_BYTES, BufferType.L1: L1_CORE_BYTES}
        self.used = {BufferType.DRAM: 0, BufferType.L1: 0}
        self.peak = {BufferType.DRAM: 0, BufferType.L1: 0}
        self._sizes: dict[Spec, int] = {}

    def allocate(self, spec: Spec) -> int:
        """Take what a tensor of `spec` needs of every bank and return it; raises DeviceError when it is not there."""
        per_bank = self._sizes.get(spec)
        if per_bank is None:
            per_bank = self._sizes[spec] = self.per_bank(spec)
        self.take(spec.memory_config.buffer_type, per_bank, spec)
        return per_bank

    def take(self, kind: BufferType, per_bank: int, what: object) -> None:
        """Take `per_bank` bytes of every bank; raises DeviceError when they are not there."""
        used = self.used[kind] + per_bank
        if used > self.limit[kind]:
            place = "DRAM bank" if kind is BufferType.DRAM else "core's L1"
            raise DeviceError(
                f"out of {kind.name}: {what} needs {per_bank:,} B of each {place}, {self.limit[kind] - self.used[kind]:,} of "
                f"{self.limit[kind]:,} B are free; free tensors, or use a smaller cache, batch or weight dtype"
            )
        self.used[kind] = used
        if used > self.peak[kind]:
            self.peak[kind] = used

    def release(self, kind: BufferType, per_bank: int) -> None:
        self.used[kind] -= per_bank

    def per_bank(self, spec: Spec) -> int:
        """Return the bytes that a tensor of `spec` takes in each bank: a shard, or whole pages dealt round the banks."""
        kind, shard = spec.memory_config.buffer_type, spec.memory_config.shard_spec
        if shard is not None:
            size = spec.dtype.bytes_of(shard.shape[0] * shard.shape[1])
        else:
            pages = spec.bytes // spec.page if spec.page else 0
            size = -(-pages // self.banks[kind]) * _aligned(spec.page, PAGE_ALIGNMENT[kind])
        return _aligned(size, BANK_ALIGNMENT)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


class MeshDevice:
    """A grid of chips that run the same ops on their own shards."""

    def __init__(
        self,
        shape: MeshShape,
        chips: list[int],
        grid: CoreCoord,
        queues: list[CommandQueue],
        parent: Any = None,
    ):
        self.shape, self._chips, self._grid, self._parent = shape, chips, grid, parent
        self._queues, self.has_several_queues = queues, len(queues) > 1
        self.memory = Memory(grid.x * grid.y)
        self._submeshes: list[MeshDevice] = []
        self._closed = False
        self.trace_region_size = 0  # bytes a chip
        self.traces: dict[int, list[Callable[[], None]]] = {}  # captured work by trace id, see trace.py

    def get_num_devices(self) -> int:
        return len(self._chips)

    def get_device_ids(self) -> list[int]:
        return list(self._chips)

    def compute_with_storage_grid_size(self) -> CoreCoord:
        return self._grid

    def reshape(self, new_shape: MeshShape) -> None:
        """Arrange the same chips in another grid."""
        if MeshShape(new_shape).mesh_size() != len(self._chips):
            raise DeviceError(
                f"reshape: {tuple(new_shape)} holds another number of chips than {len(self._chips)}"
            )
        self.shape = MeshShape(new_shape)

    def get_submeshes(self) -> list[MeshDevice]:
        return list(self._submeshes)

    def create_submesh(self, submesh_shape: MeshShape, offset: MeshCoordinate | None = None) -> MeshDevice:
        """Return the submesh of `submesh_shape` at `offset`; it has its own memory and queues, on this mesh's chips."""
        rows, columns = submesh_shape
        top, left = offset or (0, 0)
        if top + rows > self.shape[0] or left + columns > self.shape[1]:
            raise DeviceError(
                f"create_submesh: {rows}x{columns} at ({top}, {left}) leaves the mesh of {self.shape[0]}x{self.shape[1]} chips"
            )
        chips = [
            self._chips[(top + r) * self.shape[1] + left + c] for r in range(rows) for c in range(columns)
        ]
        queues = [CommandQueue(f"chips {chips} queue {q.name[-1]}", q.timeout_s) for q in self._queues]
        mesh = MeshDevice(MeshShape(rows, columns), chips, self._grid, queues, parent=self)
        mesh.trace_region_size = self.trace_region_size
        self._submeshes.append(mesh)
        return mesh

    def queue(self, cq_id: int | None = None) -> CommandQueue:
        """Return the command queue `cq_id`, by default the one chosen by `command_queue`, else 0."""
        number = getattr(_current, "queue", 0) if cq_id is None else cq_id
        if self._closed:
            raise DeviceError(
                f"the mesh of chips {self._chips} is closed; open it again before using its tensors"
            )
        if not 0 <= number < len(self._queues):
            raise DeviceError(
                f"command queue {number} of a mesh opened with num_command_queues={len(self._queues)}; "
                f"allowed: 0..{len(self._queues) - 1}"
            )
        return self._queues[number]

    def idle(self) -> bool:
        """Return whether all enqueued work is done."""
        return all(queue.idle for queue in self._queues)

    def close(self) -> None:
        """Close the mesh and its submeshes, without waiting for work that is still pending."""
        for mesh in self._submeshes:
            mesh.close()
        for queue in self._queues:
            queue.close()
        if self._parent is None and not self._closed:
            _open_chips.difference_update(self._chips)
        self._closed = True

    def __repr__(self) -> str:
        return f"MeshDevice({self.shape[0]}x{self.shape[1]} grid, chips {self._chips})"


def set_fabric_config(config: FabricConfig) -> None:
    """Choose the fabric; must come before a mesh is opened."""
    global _fabric
    if _open_chips and config is not _fabric:
        raise DeviceError(
            f"set_fabric_config({config.name}) after a mesh was opened; call it before open_mesh_device"
        )
    _fabric = config


def fabric_config() -> FabricConfig:
    return _fabric


def open_mesh_device(
    mesh_shape: MeshShape,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    num_command_queues: int = 1,
    dispatch_core_config: DispatchCoreConfig | None = None,
    offset: MeshCoordinate | None = None,
    physical_device_ids: Any = (),
) -> MeshDevice:
    """Open `mesh_shape` chips. Raises DeviceError for queues that the dispatch cores cannot serve or chips in use."""
    dispatch = (dispatch_core_config or DispatchCoreConfig()).type
    most = 1 if dispatch is DispatchCoreType.WORKER else QUEUES
    if not 1 <= num_command_queues <= most:
        raise DeviceError(
            f"num_command_queues={num_command_queues}; with {dispatch.name} dispatch 1..{most} fit (No more available dispatch cores)"
        )
    chips = list(range(len(_open_chips), len(_open_chips) + MeshShape(mesh_shape).mesh_size()))
    if chips[-1] >= HOST_CHIPS:
        raise DeviceError(
            f"open_mesh_device({tuple(mesh_shape)}): {len(chips)} chips asked, {HOST_CHIPS - len(_open_chips)} of {HOST_CHIPS} are free"
        )
    _open_chips.update(chips)
    timeout = float(os.environ.get("TT_METAL_OPERATION_TIMEOUT_SECONDS", "60"))
    queues = [
        CommandQueue(f"mesh of chips {chips}, command queue {i}", timeout) for i in range(num_command_queues)
    ]
    grid = CoreCoord(8, 7) if dispatch is DispatchCoreType.WORKER else CoreCoord(8, 8)
    mesh = MeshDevice(MeshShape(mesh_shape), chips, grid, queues)
    mesh.trace_region_size = trace_region_size
    return mesh


def close_mesh_device(mesh: MeshDevice) -> None:
    """Close `mesh` and its submeshes; raises what its queues still had to report."""
    try:
        for queue in mesh._queues:
            queue.check()
    finally:
        mesh.close()


@contextlib.contextmanager
def command_queue(cq_id: int) -> Iterator[None]:
    """Choose the command queue of all ops inside the block (of this thread)."""
    before = getattr(_current, "queue", 0)
    _current.queue = cq_id
    try:
        yield
    finally:
        _current.queue = before


def synchronize_device(device: MeshDevice, cq_id: int | None = None) -> None:
    """Wait until all work of `device` (or of one queue) is done; raises what failed."""
    for queue in device._queues if cq_id is None else [device.queue(cq_id)]:
        queue.wait()


def record_event(mesh_device: MeshDevice, cq_id: int | None = None) -> Event:
    """Return an event that completes with all work enqueued on the queue so far."""
    return Event(mesh_device.queue(cq_id), mesh_device)


def wait_for_event(cq_id: int | None, mesh_event: Event) -> None:
    """Make queue `cq_id` of the event's mesh stall until the event."""
    mesh_event.mesh.queue(cq_id).stall(mesh_event)


def event_synchronize(mesh_event: Event) -> None:
    """Block the host until the event is reached."""
    mesh_event.queue.wait(mesh_event.sequence)
