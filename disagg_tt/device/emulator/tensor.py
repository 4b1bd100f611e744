"""Tensors: a spec, values, and the memory that holds them.

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
