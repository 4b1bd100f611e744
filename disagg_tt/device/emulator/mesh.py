"""Meshes of emulated Wormhole chips: submeshes, command queues, fabric."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

from disagg_tt.device.emulator import system
from disagg_tt.device.emulator.memory import DRAM_BANKS, Memory
from disagg_tt.device.emulator.queue import CommandQueue, Event, Trace
from disagg_tt.device.emulator.types import (
    Arch,
    CoreCoord,
    CoreGrid,
    FabricConfig,
    MeshCoordinate,
    MeshCoordinateRange,
    MeshShape,
)
from disagg_tt.errors import DeviceError, NotEmulatedError

_fabric = FabricConfig.DISABLED
_current = threading.local()
_ids = count()


class MeshDevice:
    """A grid of chips that run the same ops on their own shards."""

    def __init__(
        self,
        shape: MeshShape,
        chips: list[int],
        memory: Memory,
        queues: list[CommandQueue],
        parent: MeshDevice | None = None,
    ):
        self.shape, self._chips, self.memory, self._parent = shape, chips, memory, parent
        self._queues, self.has_several_queues = queues, len(queues) > 1
        self._submeshes: list[MeshDevice] = []
        self._closed = False
        self._id = next(_ids)
        self.trace_region_size = 0  # bytes a chip
        self.traces: dict[int, Trace] = {}  # by trace id, see trace.py

    def id(self) -> int:
        """Return a number that no other mesh of this process has."""
        return self._id

    def get_num_devices(self) -> int:
        return len(self._chips)

    def get_device_ids(self) -> list[int]:
        return list(self._chips)

    def get_device_id(self, coord: MeshCoordinate) -> int:
        """Return the id of the chip at `coord`; raises DeviceError for a place outside the mesh."""
        for place, chip in zip(MeshCoordinateRange(self.shape), self._chips, strict=True):
            if place == coord:
                return chip
        raise DeviceError(f"get_device_id: {coord!r} is not in a mesh of {self.shape!r}")

    def arch(self) -> Arch:
        return Arch.WORMHOLE_B0

    @property
    def core_grid(self) -> CoreGrid:
        return CoreGrid(x=self.memory.grid.x, y=self.memory.grid.y)

    def compute_with_storage_grid_size(self) -> CoreCoord:
        return self.memory.grid

    def dram_grid_size(self) -> CoreCoord:
        return CoreCoord(DRAM_BANKS, 1)

    def enable_program_cache(self) -> None:
        """Do nothing: no programs are compiled here, and ttnn's cache is always on."""

    def clear_program_cache(self) -> None:
        """Do nothing: there are no compiled programs."""

    disable_and_clear_program_cache = clear_program_cache

    def set_program_cache_misses_allowed(self, allowed: bool) -> None:
        """Do nothing: there are no compiled programs."""

    def num_program_cache_entries(self) -> int:
        """Return 0: no programs are compiled here."""
        return 0

    def quiesce_devices(self) -> None:
        """Wait until all work of this mesh and its submeshes is done."""
        for mesh in (self, *self._submeshes):
            synchronize_device(mesh)

    def reshape(self, new_shape: MeshShape) -> None:
        """Arrange the same chips in another grid, row by row."""
        if new_shape.mesh_size() != len(self._chips) or new_shape.dims() != 2:
            raise DeviceError(
                f"reshape: {tuple(new_shape)} holds another number of chips than {len(self._chips)}"
            )
        self.shape = new_shape

    def get_submeshes(self) -> list[MeshDevice]:
        return list(self._submeshes)

    def create_submesh(self, submesh_shape: MeshShape, offset: MeshCoordinate | None = None) -> MeshDevice:
        """Return the submesh of `submesh_shape` at `offset`, with queues of its own, on this mesh's chips.

        It allocates memory without knowing of this mesh's tensors: see Memory. Raises DeviceError where it does not fit.
        """
        if not isinstance(submesh_shape, MeshShape):
            raise TypeError(f"create_submesh takes a MeshShape, not a {type(submesh_shape).__name__}")
        rows, columns = submesh_shape
        top, left = offset or (0, 0)
        if not (0 < rows <= self.shape[0] - top and 0 < columns <= self.shape[1] - left):
            raise DeviceError(
                f"create_submesh: {rows}x{columns} at ({top}, {left}) leaves the mesh of {self.shape[0]}x{self.shape[1]} chips"
            )
        chips = [
            self._chips[(top + r) * self.shape[1] + left + c] for r in range(rows) for c in range(columns)
        ]
        queues = [CommandQueue(f"chips {chips} queue {q.name[-1]}", q.timeout_s) for q in self._queues]
        mesh = MeshDevice(MeshShape(rows, columns), chips, self.memory.sibling(), queues, parent=self)
        for other in self._root()._tree():
            if not set(chips).isdisjoint(other._chips):
                mesh.memory.share(other.memory)
        mesh.trace_region_size = self.trace_region_size
        self._submeshes.append(mesh)
        return mesh

    def create_submeshes(self, submesh_shape: MeshShape) -> list[MeshDevice]:
        """Return the submeshes of one shape that cover this mesh, row by row; it must divide the mesh evenly."""
        rows, columns = submesh_shape
        if not rows or not columns or self.shape[0] % rows or self.shape[1] % columns:
            raise DeviceError(
                f"create_submeshes: {rows}x{columns} does not divide the mesh of {self.shape[0]}x{self.shape[1]} chips evenly"
            )
        return [
            self.create_submesh(submesh_shape, MeshCoordinate(top, left))
            for top in range(0, self.shape[0], rows)
            for left in range(0, self.shape[1], columns)
        ]

    def _root(self) -> MeshDevice:
        return self if self._parent is None else self._parent._root()

    def _tree(self) -> Iterator[MeshDevice]:
        """Yield this mesh and what was cut from it, as far as open."""
        if not self._closed:
            yield self
        for mesh in self._submeshes:
            yield from mesh._tree()

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
            system.open_chips.difference_update(self._chips)
        self.memory.leave()
        self._closed = True

    def __getattr__(self, name: str) -> Any:
        if name in _LACKING:
            raise NotEmulatedError(f"MeshDevice.{name}: the emulator does not have it")
        raise AttributeError(f"MeshDevice has no {name}")

    def __repr__(self) -> str:
        return f"MeshDevice({'x'.join(map(str, self.shape))} grid, chips {self._chips})"


_LACKING = {
    "clear_loaded_sub_device_manager",
    "create_sub_device_manager",
    "dram_core_from_logical_core",
    "get_fabric_node_id",
    "get_optimal_dram_bank_to_logical_worker_assignment",
    "get_system_mesh_id",
    "get_view",
    "load_sub_device_manager",
    "logical_core_from_worker_core",
    "remove_sub_device_manager",
    "reset_sub_device_stall_group",
    "set_sub_device_stall_group",
    "sfpu_eps",
    "sfpu_inf",
    "sfpu_nan",
    "worker_core_from_logical_core",
}


def set_fabric_config(config: FabricConfig, *_: Any, **__: Any) -> None:
    """Choose the fabric; must come before a mesh is opened."""
    global _fabric
    if system.open_chips and config is not _fabric:
        raise DeviceError(
            f"set_fabric_config({config.name}) after a mesh was opened; call it before open_mesh_device"
        )
    _fabric = config


def get_fabric_config() -> FabricConfig:
    """Return what set_fabric_config chose."""
    return _fabric


@contextlib.contextmanager
def command_queue(cq_id: int | None) -> Iterator[None]:
    """Choose the command queue of all ops inside the block (of this thread); None leaves it as it is."""
    before = getattr(_current, "queue", 0)
    _current.queue = before if cq_id is None else cq_id
    try:
        yield
    finally:
        _current.queue = before


def synchronize_device(device: MeshDevice, cq_id: int | None = None, sub_device_ids: Any = ()) -> None:
    """Wait until all work of `device` (or of one queue) is done; raises what failed. A mesh is one sub-device here."""
    for queue in device._queues if cq_id is None else [device.queue(cq_id)]:
        queue.wait()


def record_event(
    mesh_device: MeshDevice,
    cq_id: int | None = None,
    sub_device_ids: Any = (),
    device_range: MeshCoordinateRange | None = None,
) -> Event:
    """Return an event that completes with all work enqueued on the queue so far, of all chips. Raises DeviceError."""
    if device_range is not None:
        raise NotEmulatedError(
            "record_event: the emulator does not have events of some chips; leave device_range out"
        )
    queue = mesh_device.queue(cq_id)
    queue.need_no_capture("record_event")
    return Event(queue, mesh_device)


def wait_for_event(cq_id: int | None, mesh_event: Event) -> None:
    """Make queue `cq_id` of the event's mesh stall until the event."""
    mesh_event.mesh.queue(cq_id).stall(mesh_event)


def event_synchronize(mesh_event: Event) -> None:
    """Block the host until the event is reached."""
    mesh_event.queue.wait(mesh_event.sequence)
