"""Tensors, and how ops are run on them.

`Values.data` is [chips, *shape], or [1, *shape] when every chip holds the same values, so that replicated work is done
once. It holds only values that the dtype can hold. Two parts of a device tensor may be undefined:

    - all of it (`data` is None), after allocate_tensor_on_device. What is computed from it is undefined too, and is not
      computed; so a program on allocated weights costs almost nothing. Read, it is NaN (-1 in integers).
    - the end of it: ops that leave rows undefined on hardware (nlp_concat_heads_decode's rows past the batch) store
      only the defined prefix of the flattened values, and what is computed from the rest is not computed.

A tensor's memory is a Buffer, which views of the tensor share. Work that waits in a queue keeps the Values but not the
Buffer: memory is free as soon as the program drops the tensor, as on hardware.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.types import MemoryConfig
from disagg_tt.errors import DeviceError


class Values:
    """What a tensor holds, once the work that computes it has run.

    Attributes:
        data: see the module; None while undefined.
        private: no other Values share the memory of `data`, so that it may be written in place.
        writer, written: the queue that wrote last, and the sequence number of that work.
        memo: what other modules derived from `data`; dropped when it changes.
    """

    __slots__ = ("data", "memo", "private", "writer", "written")

    def __init__(self, data: torch.Tensor | None = None, writer: CommandQueue | None = None):
        self.data = data
        self.private = False
        self.writer = writer
        self.written = 0 if writer is None else writer.enqueued
        self.memo: dict[Any, Any] | None = None


class Buffer:
    """The memory of one allocation on every chip of a mesh, given back when the last tensor on it is gone.

    Attributes:
        readers: (queue, sequence number) of work on another queue than the writer's that reads it.
        viewed: a view has been made of it.
    """

    __slots__ = ("freed", "mesh", "per_bank", "readers", "spec", "viewed")

    def __init__(self, mesh: MeshDevice, spec: Spec):
        self.mesh, self.spec = mesh, spec
        self.freed = True  # until it is there
        self.readers: list[tuple[CommandQueue, int]] | None = None
        self.viewed = False
        self.per_bank = mesh.memory.allocate(spec)
        self.freed = False

    def __del__(self) -> None:
        if not self.freed:
            self._release()
            error = self._still_read()
            if error is not None:
                self.mesh.queue(0).fail(error)

    def free(self) -> None:
        """Give the memory back now; raises DeviceError when another queue may still be reading it."""
        if self.freed:
            return
        error = self._still_read()
        if error is not None:
            raise error
        self._release()

    def _release(self) -> None:
        self.freed = True
        self.mesh.memory.release(self.spec.memory_config.buffer_type, self.per_bank)

    def _still_read(self) -> DeviceError | None:
        for queue, sequence in self.readers or ():
            if not queue.host_knows(sequence):
                return DeviceError(
                    f"tensor {self.spec!r} freed while work on {queue.name} may still be reading it; on hardware its memory "
                    "would be reused under the reader. Keep the tensor until event_synchronize or synchronize_device "
                    "says that the work is done"
                )
        return None


class Tensor:
    """A tensor on the host (no mesh) or on a mesh. Made by from_torch, allocate_tensor_on_device and ops."""

    __slots__ = ("_buffer", "_mesh", "_values", "spec")

    def __init__(self, spec: Spec, mesh: MeshDevice | None, values: Values, buffer: Buffer | None = None):
        self.spec, self._mesh, self._values = spec, mesh, values
        self._buffer = buffer if mesh is None or buffer is not None else Buffer(mesh, spec)

    shape = property(lambda self: self.spec.shape)
    padded_shape = property(lambda self: self.spec.padded_shape)
    dtype = property(lambda self: self.spec.dtype)
    layout = property(lambda self: self.spec.layout)

    def memory_config(self) -> MemoryConfig:
        return self.spec.memory_config

    def device(self) -> MeshDevice | None:
        return self._mesh

    def is_allocated(self) -> bool:
        return self._buffer is None or not self._buffer.freed

    def is_sharded(self) -> bool:
        return self.spec.memory_config.is_sharded()

    def deallocate(self, force: bool = False) -> None:
        if self._buffer is not None and self._mesh is not None:
            self._buffer.free()
            if self._mesh.idle():  # else work that was enqueued before may still need the values
                self._values.data = None

    def buffer_page_size(self) -> int:
        """Return the bytes of one page: a packed tile, or a row in ROW_MAJOR layout."""
        return self.spec.page

    def buffer_num_pages(self) -> int:
        """Return the pages of one chip's shard."""
        return self.spec.bytes // self.spec.page

    def __repr__(self) -> str:
        return f"Tensor({self.spec!r}, {'host' if self._mesh is None else self._mesh!r})"


class Shard(Tensor):
    """One chip's part of a device tensor, for reading only."""

    __slots__ = ("chip",)

    def __init__(self, whole: Tensor, chip: int):
        super().__init__(whole.spec, whole._mesh, whole._values, whole._buffer)
        self.chip = chip


# ---------------------------------------------------------------- running ops


def on_device(what: str, *tensors: Tensor) -> MeshDevice:
    """Check that `tensors` are alive and on one mesh, and return it; raises DeviceError."""
    mesh = None
    for tensor in tensors:
        if type(tensor) is not Tensor:
            if isinstance(tensor, Shard):
                raise DeviceError(
                    f"{what}: {tensor!r} is one chip's shard, which can only be read; use the whole tensor"
                )
            raise DeviceError(
                f"{what}: a {type(tensor).__name__} where a ttnn tensor is needed; convert it with from_torch"
            )
        buffer = tensor._buffer
        if buffer is None:
            raise DeviceError(
                f"{what}: input {tensor!r} is on the host; move it with from_torch(..., device=mesh)"
            )
        if buffer.freed:
            raise DeviceError(
                f"{what}: input {tensor.spec!r} was deallocated; use it before it is freed, or keep a copy"
            )
        if mesh is None:
            mesh = tensor._mesh
        elif tensor._mesh is not mesh:
            raise DeviceError(
                f"{what}: inputs on different meshes, {mesh!r} and {tensor._mesh!r}; they must share one"
            )
    assert mesh is not None
    return mesh


def reads(what: str, queue: CommandQueue, tensor: Tensor) -> None:
    """Note that the next work of `queue` reads `tensor`; raises DeviceError unless it knows that it was written."""
    values = tensor._values
    writer = values.writer
    if writer is queue or writer is None:
        return
    if not queue.knows(writer, values.written):
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


def launch(what: str, spec: Spec, compute: Callable[..., torch.Tensor], *tensors: Tensor) -> Tensor:
    """Enqueue `compute`, given the data of `tensors`, and return the tensor of `spec` that it makes."""
    mesh = on_device(what, *tensors)
    out = Values()
    result = Tensor(spec, mesh, out)
    _submit(what, mesh, out, compute, tensors)
    return result


def view(what: str, spec: Spec, compute: Callable[[torch.Tensor], torch.Tensor], tensor: Tensor) -> Tensor:
    """Enqueue `compute` as `launch` does, and return a tensor of `spec` in the memory of `tensor`."""
    mesh = on_device(what, tensor)
    out = Values()
    assert tensor._buffer is not None
    tensor._buffer.viewed = True
    _submit(what, mesh, out, compute, (tensor,))
    return Tensor(spec, mesh, out, tensor._buffer)


def _submit(
    what: str,
    mesh: MeshDevice,
    out: Values,
    compute: Callable[..., torch.Tensor],
    tensors: tuple[Tensor, ...],
) -> None:
    queue = mesh.queue()
    if mesh.has_several_queues:
        for tensor in tensors:
            reads(what, queue, tensor)
    sources = [t._values for t in tensors]

    def work() -> None:
        data = [s.data for s in sources]
        for values in data:
            if values is None:
                return
        out.data = compute(*data)
        for source in sources:
            if source.private and _shares_memory(out.data, source.data):
                source.private = False

    out.writer = queue
    out.written = queue.submit(what, work)


def _shares_memory(a: Any, b: Any) -> bool:
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def launch_in_place(
    what: str, target: Tensor, compute: Callable[..., torch.Tensor], *tensors: Tensor, waits: bool = False
) -> None:
    """Enqueue `compute`, given the data of `tensors`, which returns the new data of `target`."""
    mesh = on_device(what, target, *tensors)
    queue = mesh.queue()
    if mesh.has_several_queues:
        for tensor in (target, *tensors):
            reads(what, queue, tensor)
    writes(what, queue, target)
    first, sources = target._values, [(t._values, t.spec) for t in tensors]

    def work() -> None:
        first.data = compute(*[defined(values.data, spec) for values, spec in sources])
        first.memo = None

    queue.submit(what, work, waits)


def defined(data: torch.Tensor | None, spec: Spec) -> torch.Tensor:
    """Return `data`, or for an undefined tensor the pattern that stands for undefined values."""
    if data is not None:
        return data
    return torch.full((1,), undefined(spec), dtype=spec.dtype.storage).expand(1, *spec.shape)


def undefined(spec: Spec) -> float:
    """Return what reads of undefined values give."""
    return float("nan") if spec.dtype.is_float else -1


def whole(data: torch.Tensor | None, spec: Spec) -> torch.Tensor:
    """Return `data` with its undefined part, if any, filled with NaN (integers: -1), as [chips, *shape]."""
    data = defined(data, spec)
    count = math.prod(spec.shape)
    if data.numel() == data.shape[0] * count:
        return data.reshape(data.shape[0], *spec.shape)
    flat = torch.full((data.shape[0], count), undefined(spec), dtype=data.dtype)
    known = data.reshape(data.shape[0], -1)
    flat[:, : known.shape[1]] = known
    return flat.reshape(data.shape[0], *spec.shape)
