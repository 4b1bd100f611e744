"""Tensors: one torch tensor whose first axis is the chip, and the moves between host and device.

`Storage.data` is [chips, *shape], or [1, *shape] when every chip holds the same values, so that replicated work is done
once. It holds only values that the dtype can hold. Two parts of a device tensor may be undefined:

    - all of it, after allocate_tensor_on_device: reads give NaN (or -1) until something is written;
    - the end of it: ops that leave rows undefined on hardware (nlp_concat_heads_decode's rows past the batch) store
      only the defined prefix of the flattened values. What is computed from undefined rows is undefined too, and is
      not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.numeric import round_on_host
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.types import (
    DataType,
    Layout,
    MemoryConfig,
    Spec,
    TensorSpec,
    make_spec,
)
from disagg_tt.errors import DeviceError

_HOST_DTYPE = {
    DataType.BFLOAT16: torch.bfloat16,
    DataType.UINT32: torch.uint32,
    DataType.INT32: torch.int32,
    DataType.UINT16: torch.uint16,
    DataType.UINT8: torch.uint8,
}


class Storage:
    """Values and memory of one allocation, shared by the tensors that view it.

    Attributes:
        writer, written: the queue that wrote the values last, and the sequence number of that work.
        readers: (queue, sequence number) of sends that may still be reading.
        memo: what other modules derived from the values; dropped when they change.
    """

    __slots__ = ("data", "freed", "kind", "memo", "mesh", "per_bank", "readers", "writer", "written")

    def __init__(self, mesh: MeshDevice | None, spec: Spec, data: torch.Tensor | None = None):
        self.data: Any = data
        self.mesh, self.freed = mesh, False
        self.writer: CommandQueue | None = None
        self.written = 0
        self.readers: list[tuple[CommandQueue, int]] | None = None
        self.memo: dict[Any, Any] | None = None
        self.per_bank = 0
        if mesh is not None:
            self.kind = spec.memory_config.buffer_type
            per_bank = mesh._memory.per_bank(spec)
            mesh._memory.allocate(self.kind, per_bank, spec)
            self.per_bank = per_bank

    def __del__(self) -> None:
        if self.per_bank and not self.freed:
            self.mesh._memory.release(self.kind, self.per_bank)  # type: ignore[union-attr]

    def free(self) -> None:
        """Return the memory; raises DeviceError while another queue's send still reads it."""
        for queue, sequence in self.readers or ():
            if queue.completed < sequence and queue is not self.writer:
                raise DeviceError(
                    f"tensor freed while a send on {queue.name} is still reading it; on hardware its memory would be reused "
                    "under the send. Keep the tensor until an event recorded after the send is reached"
                )
        if not self.freed and self.per_bank:
            self.mesh._memory.release(self.kind, self.per_bank)  # type: ignore[union-attr]
        self.freed, self.data = True, None


class Tensor:
    """A tensor on the host (mesh is None) or on a mesh. Made by from_torch, allocate_tensor_on_device and ops."""

    __slots__ = ("_mesh", "_storage", "spec")

    def __init__(self, spec: Spec, mesh: MeshDevice | None, storage: Storage):
        self.spec, self._mesh, self._storage = spec, mesh, storage

    shape = property(lambda self: self.spec.shape)
    padded_shape = property(lambda self: self.spec.padded_shape)
    dtype = property(lambda self: self.spec.dtype)
    layout = property(lambda self: self.spec.layout)

    def memory_config(self) -> MemoryConfig:
        return self.spec.memory_config

    def device(self) -> MeshDevice | None:
        return self._mesh

    def is_allocated(self) -> bool:
        return not self._storage.freed

    def is_sharded(self) -> bool:
        return self.spec.memory_config.is_sharded()

    def deallocate(self, force: bool = False) -> None:
        self._storage.free()

    def buffer_page_size(self) -> int:
        """Return the bytes of one page: a packed tile, or a row in ROW_MAJOR layout."""
        return self.dtype.bytes_of(1024 if self.layout is Layout.TILE else self.padded_shape[-1])

    def buffer_num_pages(self) -> int:
        """Return the pages of one chip's shard."""
        return self.spec.bytes // self.buffer_page_size()

    def __repr__(self) -> str:
        return f"Tensor({self.spec!r}, {'host' if self._mesh is None else self._mesh!r})"


# ---------------------------------------------------------------- running ops


def on_device(what: str, *tensors: Tensor) -> MeshDevice:
    """Check that `tensors` are alive and on one mesh, and return it; raises DeviceError."""
    mesh = tensors[0]._mesh
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise DeviceError(
                f"{what}: a {type(tensor).__name__} where a ttnn tensor is needed; convert it with from_torch"
            )
        if tensor._mesh is None:
            raise DeviceError(
                f"{what}: input {tensor!r} is on the host; move it with from_torch(..., device=mesh)"
            )
        if tensor._mesh is not mesh:
            raise DeviceError(
                f"{what}: inputs on different meshes, {mesh!r} and {tensor._mesh!r}; they must share one"
            )
        if tensor._storage.freed:
            raise DeviceError(
                f"{what}: input {tensor.spec!r} was deallocated; use it before it is freed, or keep a copy"
            )
    assert mesh is not None
    return mesh


def _check_order(what: str, queue: CommandQueue, storage: Storage) -> None:
    """Raise when `storage` was written on another queue, and `queue` has not waited for that."""
    writer = storage.writer
    if writer is None or writer is queue or queue.seen.get(writer, 0) >= storage.written:
        return
    raise DeviceError(
        f"{what} on {queue.name} uses a tensor that {writer.name} writes, without waiting for it; on hardware it may read old "
        "data. Record an event after the write and pass it to wait_for_event, or use one queue"
    )


def launch(what: str, spec: Spec, compute: Callable[..., torch.Tensor], *tensors: Tensor) -> Tensor:
    """Enqueue `compute`, given the storages' data of `tensors`, and return the tensor of `spec` that it makes."""
    mesh = on_device(what, *tensors)
    queue = mesh.queue()
    storages = [t._storage for t in tensors]
    if len(mesh._queues) > 1:
        for storage in storages:
            _check_order(what, queue, storage)
    out = Storage(mesh, spec)
    out.writer = queue

    def work() -> None:
        out.data = compute(*[s.data for s in storages])

    out.written = queue.submit(what, work)
    return Tensor(spec, mesh, out)


def launch_in_place(what: str, target: Tensor, compute: Callable[..., Any], *tensors: Tensor) -> None:
    """Enqueue `compute`, given the data of `target` and of `tensors`, which modifies the target's values."""
    mesh = on_device(what, target, *tensors)
    queue = mesh.queue()
    storages = [t._storage for t in (target, *tensors)]
    if len(mesh._queues) > 1:
        for storage in storages:
            _check_order(what, queue, storage)
    first = storages[0]
    first.writer = queue

    def work() -> None:
        writable(first)
        compute(*[s.data for s in storages])

    first.written = queue.submit(what, work)


def writable(storage: Storage) -> None:
    """Give `storage` memory of its own where its values were only a pattern, and forget what was derived from them."""
    if 0 in storage.data.stride():
        storage.data = storage.data.contiguous()
    storage.memo = None


def whole(data: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return `data` with its undefined end, if any, filled with NaN (integers: -1), as [chips, *shape]."""
    count = math.prod(spec.shape)
    if data.numel() == data.shape[0] * count:
        return data.reshape(data.shape[0], *spec.shape)
    flat = torch.full((data.shape[0], count), float("nan") if spec.dtype.is_float else -1, dtype=data.dtype)
    defined = data.reshape(data.shape[0], -1)
    flat[:, : defined.shape[1]] = defined
    return flat.reshape(data.shape[0], *spec.shape)


# ---------------------------------------------------------------- host and device


class ReplicateTensorToMesh:
    """Give every chip of the mesh the whole tensor."""

    def __init__(self, mesh_device: MeshDevice):
        self.mesh = mesh_device

    def shards(self, values: torch.Tensor) -> torch.Tensor:
        return values[None]


class ShardTensorToMesh:
    """Cut the tensor along `dim` into one equal part a chip, in row order of the mesh."""

    def __init__(self, mesh_device: MeshDevice, dim: int):
        self.mesh, self.dim = mesh_device, dim

    def shards(self, values: torch.Tensor) -> torch.Tensor:
        chips = self.mesh.get_num_devices()
        size = values.shape[self.dim]
        if size % chips:
            raise DeviceError(
                f"ShardTensorToMesh: axis {self.dim} of {list(values.shape)} is {size}, not divisible by {chips} chips"
            )
        return torch.stack(values.chunk(chips, dim=self.dim))


class ConcatMeshToTensor:
    """Read all chips' shards as one tensor, joined along `dim`."""

    def __init__(self, mesh_device: MeshDevice, dim: int):
        self.mesh, self.dim = mesh_device, dim


def from_torch(
    tensor: torch.Tensor,
    dtype: DataType | None = None,
    *,
    layout: Layout = Layout.ROW_MAJOR,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    mesh_mapper: Any = None,
) -> Tensor:
    """Return `tensor` as a ttnn tensor of `dtype`, on the host or on `device`, rounded as the host converts."""
    if dtype is None:
        names = {v: k for k, v in _HOST_DTYPE.items()} | {
            torch.float32: DataType.FLOAT32,
            torch.int64: DataType.UINT32,
        }
        if tensor.dtype not in names:
            raise DeviceError(
                f"from_torch: no ttnn dtype for {tensor.dtype}; allowed: {', '.join(map(str, names))}"
            )
        dtype = names[tensor.dtype]
    if mesh_mapper is None and device is not None and device.get_num_devices() > 1:
        mesh_mapper = ReplicateTensorToMesh(device)
    shards = mesh_mapper.shards(tensor) if mesh_mapper is not None else tensor[None]
    spec = make_spec(shards.shape[1:], dtype, layout, memory_config)
    values = round_on_host(shards, dtype)
    if values.data_ptr() == tensor.data_ptr():
        values = values.clone()
    if device is None:
        return Tensor(spec, None, Storage(None, spec, values))
    out = Storage(device, spec, values.contiguous())
    out.writer = queue = device.queue()
    out.written = queue.enqueued
    return Tensor(spec, device, out)


def to_torch(tensor: Tensor, *, mesh_composer: ConcatMeshToTensor | None = None) -> torch.Tensor:
    """Return a tensor's values once they are computed; a multi-chip tensor needs a composer or get_device_tensors."""
    storage = tensor._storage
    if storage.freed:
        raise DeviceError(f"to_torch: {tensor.spec!r} was deallocated; read it before it is freed")
    if tensor._mesh is not None:
        queue = tensor._mesh.queue()
        _check_order("a host read", queue, storage)
        queue.wait()
    values = whole(storage.data, tensor.spec)
    chips = 1 if tensor._mesh is None else tensor._mesh.get_num_devices()
    if mesh_composer is not None:
        values = torch.cat(list(values.expand(chips, *values.shape[1:])), dim=mesh_composer.dim)
    elif values.shape[0] > 1 or (tensor._mesh is not None and chips > 1):
        raise DeviceError(
            f"to_torch: a tensor on {chips} chips; pass mesh_composer=ConcatMeshToTensor(mesh, dim), or read one chip with get_device_tensors"
        )
    else:
        values = values[0]
    return values.to(_HOST_DTYPE.get(tensor.dtype, torch.float32)).clone()


def get_device_tensors(tensor: Tensor) -> list[Tensor]:
    """Return each chip's shard as a tensor of its own, for reading."""
    mesh = on_device("get_device_tensors", tensor)
    mesh.queue().wait()
    _check_order("get_device_tensors", mesh.queue(), tensor._storage)
    data = tensor._storage.data
    shards = data.expand(mesh.get_num_devices(), *data.shape[1:])
    return [Tensor(tensor.spec, None, Storage(None, tensor.spec, shard[None])) for shard in shards]


def allocate_tensor_on_device(spec: Any, *args: Any) -> Tensor:
    """allocate_tensor_on_device(TensorSpec, mesh) or (shape, dtype, layout, mesh[, memory_config]); values undefined."""
    if isinstance(spec, TensorSpec):
        (mesh,), made = args, spec.spec
    else:
        dtype, layout, mesh, *rest = args
        made = make_spec(spec, dtype, layout, rest[0] if rest else None)
    return _filled(made, mesh, float("nan") if made.dtype.is_float else -1)


def zeros(shape: Any, dtype: DataType = DataType.BFLOAT16, layout: Layout = Layout.ROW_MAJOR,
          device: MeshDevice | None = None, memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return a device tensor of zeros, the same on every chip."""
    return _filled(make_spec(shape, dtype, layout, memory_config), device, 0)


def _filled(spec: Spec, mesh: MeshDevice | None, value: float) -> Tensor:
    chips = 1 if mesh is None else mesh.get_num_devices()
    data = torch.full((1,), value, dtype=spec.dtype.storage).expand(chips, *spec.shape)
    storage = Storage(mesh, spec, data)
    if mesh is not None:
        storage.writer = mesh.queue()
        storage.written = storage.writer.enqueued
    return Tensor(spec, mesh, storage)


def copy_host_to_device_tensor(host_tensor: Tensor, device_tensor: Tensor, cq_id: int | None = None) -> None:
    """Overwrite `device_tensor` in place with `host_tensor`, whose spec must match but for the memory config."""
    host, target = host_tensor.spec, device_tensor.spec
    if host_tensor._mesh is not None:
        raise DeviceError(
            f"copy_host_to_device_tensor: the source {host!r} is on a device; it must be a host tensor"
        )
    if (host.shape, host.dtype, host.layout) != (target.shape, target.dtype, target.layout):
        raise DeviceError(
            f"copy_host_to_device_tensor: host {host!r} into device {target!r}; shape, dtype and layout must match"
        )
    values = host_tensor._storage.data
    storage = device_tensor._storage

    def write(_: torch.Tensor) -> None:
        storage.data = values

    launch_in_place("copy_host_to_device_tensor", device_tensor, write)


def deallocate(tensor: Tensor, force: bool = True) -> None:
    """Free a tensor's memory now."""
    tensor.deallocate(force)
