"""Traces: the work of one captured stretch of a queue, run again without its host code.

As on hardware, ops between begin and end are captured and not run; their outputs have values after execute_trace. A read
or write by the host, or a wait for another rank, cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.errors import DeviceError

_numbers = count(1)


def begin_trace_capture(mesh_device: MeshDevice, *, cq_id: int | None = None) -> int:
    """Start capturing what is enqueued on the queue; return the trace's id. The mesh needs a trace region."""
    if mesh_device.trace_region_size <= 0:
        raise DeviceError(
            "begin_trace_capture: trace_region_size is 0; open the mesh with one, some 50 MB for an 8B model"
        )
    mesh_device.queue(cq_id).begin_capture()
    return next(_numbers)


def end_trace_capture(mesh_device: MeshDevice, trace_id: int, *, cq_id: int | None = None) -> None:
    """Stop capturing; the trace can then be executed."""
    mesh_device.traces[trace_id] = mesh_device.queue(cq_id).end_capture()


def execute_trace(
    mesh_device: MeshDevice, trace_id: int, *, cq_id: int | None = None, blocking: bool = True
) -> None:
    """Enqueue everything that the trace captured; wait for it if `blocking`."""
    queue, captured = mesh_device.queue(cq_id), _captured(mesh_device, trace_id)

    def run() -> None:
        for work in captured:
            work()

    queue.submit(f"trace {trace_id}", run)
    if blocking:
        queue.wait()


def release_trace(mesh_device: MeshDevice, trace_id: int) -> None:
    """Forget a trace and free its memory."""
    _captured(mesh_device, trace_id)
    del mesh_device.traces[trace_id]


def _captured(mesh: MeshDevice, trace_id: int) -> list[Callable[[], None]]:
    if trace_id not in mesh.traces:
        raise DeviceError(f"trace {trace_id} does not exist on this mesh; it has {sorted(mesh.traces)}")
    return mesh.traces[trace_id]
