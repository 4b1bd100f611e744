"""Traces: the work of one captured stretch of a queue, run again without its host code.

As on hardware, ops between begin and end are captured and not run; their outputs have values after execute_trace. A send
or receive is made anew each time. What the host writes or reads, and events, cannot be captured.
"""

from __future__ import annotations

from itertools import count

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.queue import Trace
from disagg_tt.errors import DeviceError

_numbers = count(1)


def begin_trace_capture(mesh_device: MeshDevice, *, cq_id: int | None = None) -> int:
    """Start capturing what is enqueued on the queue; return the trace's id. The mesh needs a trace region."""
    if mesh_device.trace_region_size <= 0:
        raise DeviceError(
            "begin_trace_capture: trace_region_size is 0; open the mesh with one, some 50 MB for an 8B model"
        )
    number = next(_numbers)
    mesh_device.queue(cq_id).begin_capture(number)
    return number


def end_trace_capture(mesh_device: MeshDevice, trace_id: int, *, cq_id: int | None = None) -> None:
    """Stop capturing; the trace can then be executed."""
    mesh_device.traces[trace_id] = mesh_device.queue(cq_id).end_capture(trace_id)


def execute_trace(
    mesh_device: MeshDevice, trace_id: int, *, cq_id: int | None = None, blocking: bool = True
) -> None:
    """Enqueue everything that the trace captured; wait for it if `blocking`."""
    queue = mesh_device.queue(cq_id)
    _captured(mesh_device, trace_id).enqueue(f"trace {trace_id}", queue)
    if blocking:
        queue.wait()


def release_trace(mesh_device: MeshDevice, trace_id: int) -> None:
    """Forget a trace and free its memory."""
    _captured(mesh_device, trace_id)
    del mesh_device.traces[trace_id]


def is_trace_capture_active(device: MeshDevice) -> bool:
    """Return whether one queue of the mesh captures a trace."""
    return any(queue.capturing() for queue in device._queues)


def _captured(mesh: MeshDevice, trace_id: int) -> Trace:
    if trace_id not in mesh.traces:
        raise DeviceError(f"trace {trace_id} does not exist on this mesh; it has {sorted(mesh.traces)}")
    return mesh.traces[trace_id]
