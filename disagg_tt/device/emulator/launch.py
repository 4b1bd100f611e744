"""How ops run: what they read and write is checked against other queues, their arithmetic enqueued."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, defined, on_device
from disagg_tt.errors import DeviceError


def reads(what: str, queue: CommandQueue, tensor: Tensor) -> None:
    """Note that the next work of `queue` reads `tensor`; raises DeviceError unless it knows that it was written."""
    values = tensor._values
    writer = values.writer
    if writer is queue or writer is None:
        return
    if not queue.knows(writer, values.written) and not writer.host_knows(values.written):
        raise DeviceError(
            f"{what} on {queue.name} uses a tensor that {writer.name} writes, without waiting for it; on hardware it may "
            "read old data. Record an event after the write and pass it to wait_for_event, or use one queue"
        )
    buffer = tensor._buffer
    assert buffer is not None
    buffer.readers = [r for r in buffer.readers or () if not r[0].host_knows(r[1])] + [
        (queue, queue.enqueued + 1)
    ]


def writes(what: str, queue: CommandQueue, tensor: Tensor) -> None:
    """Note that the next work of `queue` writes `tensor`; raises DeviceError while another queue may be reading it."""
    buffer = tensor._buffer
    assert buffer is not None
    if buffer.viewed and sys.getrefcount(buffer) > 3:  # the tensor's, this function's and the call's
        raise DeviceError(
            f"{what} into {tensor.spec!r}, of which a view is alive; the emulator does not write through views"
        )
    for reader, sequence in buffer.readers or ():
        if reader is not queue and not queue.knows(reader, sequence) and not reader.host_knows(sequence):
            raise DeviceError(
                f"{what} on {queue.name} overwrites a tensor that {reader.name} may still be reading; wait for an event "
                "recorded after the read"
            )
    tensor._values.writer = queue
    tensor._values.written = queue.enqueued + 1


def launch(
    what: str, spec: Spec, compute: Callable[..., torch.Tensor], *tensors: Tensor, as_held: bool = False
) -> Tensor:
    """Enqueue `compute`, given the data of `tensors`, and return the tensor of `spec` that it makes.

    With `as_held` it is given and may return torch.bfloat16 values too (Values.held): for what moves values unchanged.
    """
    mesh = on_device(what, *tensors)
    out = Values()
    result = Tensor(spec, mesh, out)
    _submit(what, mesh, out, compute, tensors, as_held)
    return result


def view(
    what: str,
    spec: Spec,
    compute: Callable[[torch.Tensor], torch.Tensor],
    tensor: Tensor,
    as_held: bool = False,
) -> Tensor:
    """Enqueue `compute` as `launch` does, and return a tensor of `spec` in the memory of `tensor`."""
    mesh = on_device(what, tensor)
    out = Values()
    assert tensor._buffer is not None
    tensor._buffer.viewed = True
    _submit(what, mesh, out, compute, (tensor,), as_held)
    return Tensor(spec, mesh, out, tensor._buffer)


def _submit(
    what: str,
    mesh: MeshDevice,
    out: Values,
    compute: Callable[..., torch.Tensor],
    tensors: tuple[Tensor, ...],
    as_held: bool,
) -> None:
    queue = mesh.queue()
    if mesh.has_several_queues:
        for tensor in tensors:
            reads(what, queue, tensor)
    sources = [t._values for t in tensors]

    def work() -> None:
        data = [s.held for s in sources] if as_held else [s.wide for s in sources]
        for values in data:
            if values is None:  # undefined, or there in the other form only
                data = [s.data for s in sources]
                if any(values is None for values in data):
                    return
                break
        made = compute(*data)
        if as_held:
            out.hold(made)
        else:
            out.wide, out.narrow, out.memo = made, None, None
        for source in sources:
            if source.private and _shares_memory(made, source.held if as_held else source.data):
                source.private = False

    out.writer = queue
    out.written = queue.submit(what, work)


def _shares_memory(a: Any, b: Any) -> bool:
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def launch_in_place(
    what: str,
    target: Tensor,
    compute: Callable[..., torch.Tensor],
    *tensors: Tensor,
    as_held: bool = False,
) -> None:
    """Enqueue `compute`, given the data of `tensors`, which returns the new data of `target`; `as_held`: see launch."""
    mesh = on_device(what, target, *tensors)
    queue = mesh.queue()
    if mesh.has_several_queues:
        for tensor in (target, *tensors):
            reads(what, queue, tensor)
    writes(what, queue, target)
    first, sources = target._values, [(t._values, t.spec) for t in tensors]

    def work() -> None:
        made = compute(*[defined(v.held if as_held else v.data, spec) for v, spec in sources])
        if made is not first.held:
            first.private = False  # it may be memory of others
        first.hold(made)

    queue.submit(what, work)
