"""Opening and closing meshes and single devices, which are meshes of one chip; the default device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from disagg_tt.device.emulator import system
from disagg_tt.device.emulator.memory import Memory
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.types import (
    Arch,
    CoreCoord,
    DispatchCoreConfig,
    DispatchCoreType,
    MeshCoordinate,
    MeshShape,
)
from disagg_tt.errors import DeviceError

QUEUES = 2

_open: dict[int, MeshDevice] = {}
_default: list[MeshDevice] = []


def open_mesh_device(
    mesh_shape: MeshShape | None = None,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    num_command_queues: int = 1,
    dispatch_core_config: DispatchCoreConfig | None = None,
    offset: MeshCoordinate | None = None,
    physical_device_ids: Any = (),
    worker_l1_size: int = 0,
) -> MeshDevice:
    """Open `mesh_shape` chips, by default all. Sizes are bytes: of L1 a core, of the traces a chip.

    Raises DeviceError for queues that the dispatch cores cannot serve, chips in use, or regions without room.
    """
    if mesh_shape is not None and not isinstance(mesh_shape, MeshShape):
        raise TypeError(f"open_mesh_device takes a MeshShape, not a {type(mesh_shape).__name__}")
    shape = MeshShape(system.system_shape()) if mesh_shape is None else mesh_shape
    dispatch = (dispatch_core_config or DispatchCoreConfig()).type
    most = 1 if dispatch is DispatchCoreType.WORKER else QUEUES
    if not 1 <= num_command_queues <= most:
        raise DeviceError(
            f"num_command_queues={num_command_queues}; with {(dispatch or DispatchCoreType.ETH).name} dispatch 1..{most} fit "
            "(No more available dispatch cores)"
        )
    grid = CoreCoord(8, 7) if dispatch is DispatchCoreType.WORKER else CoreCoord(8, 8)
    memory = Memory(grid, l1_small_size, trace_region_size, worker_l1_size)
    chips = system.choose(tuple(shape), None if offset is None else tuple(offset), list(physical_device_ids))
    system.open_chips.update(chips)
    timeout = float(os.environ.get("TT_METAL_OPERATION_TIMEOUT_SECONDS", "60"))
    queues = [
        CommandQueue(f"mesh of chips {chips}, command queue {i}", timeout) for i in range(num_command_queues)
    ]
    mesh = MeshDevice(shape, chips, memory, queues)
    mesh.trace_region_size = trace_region_size
    return mesh


def close_mesh_device(mesh_device: MeshDevice) -> None:
    """Close a mesh and its submeshes; raises what its queues still had to report."""
    try:
        for queue in mesh_device._queues:
            queue.finish()
    finally:
        mesh_device.close()


@contextlib.contextmanager
def create_mesh_device(*args: Any, **kwargs: Any) -> Iterator[MeshDevice]:
    """Open a mesh as open_mesh_device does, for a `with` block."""
    mesh = open_mesh_device(*args, **kwargs)
    try:
        yield mesh
    finally:
        close_mesh_device(mesh)


def open_device(
    *,
    device_id: int,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    num_command_queues: int = 1,
    dispatch_core_config: DispatchCoreConfig | None = None,
    worker_l1_size: int = 0,
) -> MeshDevice:
    """Open chip `device_id` as a 1x1 mesh; the one that is open already, if there is one."""
    device = _open.get(device_id)
    if device is None or device._closed:
        device = _open[device_id] = open_mesh_device(
            MeshShape(1, 1),
            l1_small_size,
            trace_region_size,
            num_command_queues,
            dispatch_core_config,
            None,
            [device_id],
            worker_l1_size,
        )
    return device


def close_device(device: MeshDevice) -> None:
    """Close a device, or a mesh, as close_mesh_device does."""
    close_mesh_device(device)


@contextlib.contextmanager
def manage_device(device_id: int) -> Iterator[MeshDevice]:
    """Open chip `device_id` for a `with` block."""
    device = open_device(device_id=device_id)
    try:
        yield device
    finally:
        close_device(device)


def CreateDevice(
    device_id: int,
    num_command_queues: int = 1,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    dispatch_core_config: DispatchCoreConfig | None = None,
    *,
    worker_l1_size: int = 0,
) -> MeshDevice:
    """open_device by its older name and order of arguments."""
    return open_device(
        device_id=device_id,
        l1_small_size=l1_small_size,
        trace_region_size=trace_region_size,
        num_command_queues=num_command_queues,
        dispatch_core_config=dispatch_core_config,
        worker_l1_size=worker_l1_size,
    )


def CreateDevices(
    device_ids: list[int],
    num_command_queues: int = 1,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    dispatch_core_config: DispatchCoreConfig | None = None,
    *,
    worker_l1_size: int = 0,
) -> dict[int, MeshDevice]:
    """Open several devices; return them by id."""
    return {
        i: CreateDevice(
            i,
            num_command_queues,
            l1_small_size,
            trace_region_size,
            dispatch_core_config,
            worker_l1_size=worker_l1_size,
        )
        for i in device_ids
    }


def CloseDevices(devices: Mapping[int, MeshDevice]) -> None:
    """Close what CreateDevices opened."""
    for device in devices.values():
        close_device(device)


def SetDefaultDevice(device: MeshDevice | None = None) -> None:
    """Remember a device for GetDefaultDevice; no op of the emulator moves host tensors there by itself."""
    _default[:] = [] if device is None else [device]


def GetDefaultDevice() -> MeshDevice | None:
    return _default[0] if _default else None


def is_wormhole_b0(device: MeshDevice | None = None) -> bool:
    return "wormhole_b0" in system.get_arch_name() if device is None else device.arch() is Arch.WORMHOLE_B0


def is_blackhole(device: MeshDevice | None = None) -> bool:
    return not is_wormhole_b0(device)
