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
import threading
from typing import Any

import torch

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.spec import Spec, TensorSpec
from disagg_tt.device.emulator.tensor_methods import TensorMethods, op
from disagg_tt.errors import DeviceError


class Values:
    """What a tensor holds, once the work that computes it has run.

    bfloat16 and block floats are held as float32, in which ops compute, or as torch.bfloat16, half the size, in which they
    come from the host, cross sockets and are multiplied natively. Each is exact in the other, and is made of it when it is
    asked for. A small tensor then keeps both, a large one that which was asked for last.

    Attributes:
        wide, narrow: float32 (int64), bfloat16, or None where that form is not there; both None while undefined.
        private: no other Values share the memory that holds them, so that it may be written in place.
        writer, written: the queue that wrote last, and the sequence number of that work.
        memo: what other modules derived from the values; dropped when they change.
    """

    __slots__ = ("memo", "narrow", "private", "wide", "writer", "written")

    def __init__(self, data: torch.Tensor | None = None, writer: CommandQueue | None = None):
        self.wide: torch.Tensor | None = None
        self.narrow: torch.Tensor | None = None
        self.private = False
        self.writer = writer
        self.written = 0 if writer is None else writer.enqueued
        self.memo: dict[Any, Any] | None = None
        if data is not None:
            self.hold(data)

    @property
    def data(self) -> torch.Tensor | None:
        """See the module; float32 or int64, None while undefined."""
        wide = self.wide
        return self._widened() if wide is None else wide

    @data.setter
    def data(self, data: torch.Tensor | None) -> None:
        self.wide, self.narrow, self.memo = data, None, None

    @property
    def held(self) -> torch.Tensor | None:
        """The values in the form that is there, the smaller of two; None while undefined."""
        narrow = self.narrow
        return self.data if narrow is None else narrow

    def hold(self, data: torch.Tensor | None) -> None:
        """Take new values in either form."""
        if data is not None and data.dtype is torch.bfloat16:
            self.wide, self.narrow, self.memo = None, data, None
        else:
            self.data = data

    def bfloat16(self) -> torch.Tensor | None:
        """Return the values as torch.bfloat16, which their dtype must fit in."""
        with _converting:
            if self.narrow is None and self.wide is not None:
                self.narrow = _in(torch.bfloat16, self.wide)
                if self.narrow.numel() > SMALL:
                    self.wide = None
            return self.narrow

    def _widened(self) -> torch.Tensor | None:
        with _converting:
            if self.wide is None and self.narrow is not None:
                self.wide = _in(torch.float32, self.narrow)
                if self.wide.numel() > SMALL:
                    self.narrow = None
            return self.wide


SMALL = 1 << 20  # values
_converting = threading.Lock()  # two queues may read the same values


def once(parts: torch.Tensor) -> torch.Tensor:
    """Return [1, *shape] for parts that are one tensor expanded, else the parts."""
    return parts[:1] if parts.shape[0] > 1 and parts.stride(0) == 0 else parts


def _in(form: torch.dtype, data: torch.Tensor) -> torch.Tensor:
    """Return the values in another form, in rows: what is computed from them must not depend on what was done before."""
    return once(data).to(form, memory_format=torch.contiguous_format).expand(data.shape)


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
            error = self.readers and self._still_read()
            if error:
                self.mesh._queues[0].fail(error)  # queue(0) would refuse when the mesh is closed

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


class Tensor(TensorMethods):
    """A tensor on the host (no mesh) or on a mesh. Made by from_torch, allocate_tensor_on_device and ops.

    Inside the emulator it is made of a spec, a mesh, values and, for a view, the buffer of another. A script may write
    Tensor(torch_tensor, data_type, device, layout, ...) or Tensor(numbers, shape, data_type, layout, ...) as with ttnn.
    """

    __slots__ = ("_buffer", "_mesh", "_values", "spec")

    _buffer: Buffer | None
    _values: Values

    def __init__(
        self,
        spec: Any = None,
        mesh: Any = None,
        values: Any = None,
        buffer: Any = None,
        *more: Any,
        **named: Any,
    ):
        if type(spec) is not TensorSpec:
            made = _constructed((spec, mesh, values, buffer, *more), named)
            spec, mesh, values, buffer = made.spec, made._mesh, made._values, made._buffer
        self.spec, self._mesh, self._values = spec, mesh, values
        self._buffer = buffer if mesh is None or buffer is not None else Buffer(mesh, spec)

    def is_allocated(self) -> bool:
        return self._buffer is None or not self._buffer.freed

    def deallocate(self, force: bool = False) -> None:
        if self._buffer is not None and self._mesh is not None:
            self._buffer.free()
            if self._mesh.idle():  # else work that was enqueued before may still need the values
                self._values.data = None

    def __repr__(self) -> str:
        return f"Tensor({self.spec!r}, {'host' if self._mesh is None else self._mesh!r})"

    def __str__(self) -> str:
        """Return the values of every chip, as far as they can be read."""
        if not self.is_allocated():
            return repr(self)
        what = f"shape={self.shape!r}, dtype={self.dtype!r}, layout={self.layout!r}"
        texts = []
        for number, part in enumerate(op("get_device_tensors")(self) if type(self) is Tensor else [self]):
            where = "" if self._mesh is None else f"chip {self._mesh.get_device_ids()[number]}:\n"
            texts.append(f"{where}ttnn.{str(part.to_torch()).capitalize()[:-1]}, {what})")
        return "\n".join(texts)


def _constructed(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the tensor of a public form of the constructor."""
    given = list(args)
    while given and given[-1] is None:
        given.pop()
    if given and isinstance(given[0], Tensor):
        return given[0]
    names: tuple[str, ...] = (
        "tensor",
        "data_type",
        "device",
        "layout",
        "mem_config",
        "tile",
        "cq_id",
        "pad_value",
    )
    if "data" in named or (given and isinstance(given[0], (list, tuple))):
        names = ("data", "shape", "data_type", "layout", "device", "memory_config", "tile", "pad_value")
    form = dict(zip(names, given, strict=False)) | named
    values, dtype = form.pop("tensor", None), form.pop("data_type", None)
    if "data" in form:
        numbers, shape = torch.tensor(form.pop("data")), tuple(form.pop("shape"))
        if numbers.numel() != math.prod(shape):
            raise DeviceError(f"Tensor of {numbers.numel()} numbers and shape {list(shape)}; they must agree")
        values = numbers.reshape(shape)
    if "mem_config" in form:
        form["memory_config"] = form.pop("mem_config")
    made: Tensor = op("from_torch")(values, dtype, **form)
    return made


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
