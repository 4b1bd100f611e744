"""What crosses between host and device: mappers, from_torch, to_torch, allocation, refreshing a tensor in place."""

from __future__ import annotations

from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch_in_place, reads
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.numeric import round_on_host
from disagg_tt.device.emulator.spec import TensorSpec, make_spec
from disagg_tt.device.emulator.tensor import Shard, Tensor, Values, on_device, whole
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig
from disagg_tt.errors import DeviceError

_HOST_DTYPE = {
    DataType.BFLOAT16: torch.bfloat16,
    DataType.UINT32: torch.uint32,
    DataType.INT32: torch.int32,
    DataType.UINT16: torch.uint16,
    DataType.UINT8: torch.uint8,
}


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
        return Tensor(spec, None, Values(values))
    return Tensor(spec, device, Values(values.contiguous(), device.queue()))


def to_torch(tensor: Tensor, *, mesh_composer: ConcatMeshToTensor | None = None) -> torch.Tensor:
    """Return a tensor's values once they are computed; a multi-chip tensor needs a composer or get_device_tensors."""
    mesh, chips = tensor._mesh, 1
    if mesh is not None:
        if not tensor.is_allocated():
            raise DeviceError(f"to_torch: {tensor.spec!r} was deallocated; read it before it is freed")
        queue, chips = mesh.queue(), mesh.get_num_devices()
        reads("to_torch", queue, tensor)
        queue.wait()
    values = whole(tensor._values.data, tensor.spec)
    if isinstance(tensor, Shard):
        values = values[min(tensor.chip, values.shape[0] - 1)]
    elif mesh_composer is not None:
        values = torch.cat(
            list(values.expand(max(chips, values.shape[0]), *values.shape[1:])), dim=mesh_composer.dim
        )
    elif max(chips, values.shape[0]) > 1:
        raise DeviceError(
            f"to_torch: a tensor on {max(chips, values.shape[0])} chips; pass mesh_composer=ConcatMeshToTensor(mesh, dim), "
            "or read one chip with get_device_tensors"
        )
    else:
        values = values[0]
    return values.to(_HOST_DTYPE.get(tensor.dtype, torch.float32), copy=True)


def get_device_tensors(tensor: Tensor) -> list[Tensor]:
    """Return each chip's shard as a tensor of its own, for reading."""
    return [Shard(tensor, chip) for chip in range(on_device("get_device_tensors", tensor).get_num_devices())]


def allocate_tensor_on_device(spec: Any, *args: Any) -> Tensor:
    """allocate_tensor_on_device(TensorSpec, mesh) or (shape, dtype, layout, mesh[, memory_config]); values undefined."""
    if isinstance(spec, TensorSpec):
        (mesh,), made = args, spec.spec
    else:
        dtype, layout, mesh, *rest = args
        made = make_spec(spec, dtype, layout, rest[0] if rest else None)
    return Tensor(made, mesh, Values(None, mesh.queue()))


def zeros(
    shape: Any,
    dtype: DataType = DataType.BFLOAT16,
    layout: Layout = Layout.ROW_MAJOR,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return a tensor of zeros, the same on every chip of `device`, or on the host without one."""
    spec = make_spec(shape, dtype, layout, memory_config)
    data = torch.zeros(1, dtype=dtype.storage).expand(1, *spec.shape)
    return Tensor(spec, device, Values(data, None if device is None else device.queue()))


def zeros_like(tensor: Tensor, *, optional_tensor: Tensor | None = None) -> Tensor:
    """Return a device tensor of zeros of `tensor`'s spec; given `optional_tensor`, that is filled and returned."""
    mesh, spec = on_device("zeros_like", tensor), tensor.spec
    if optional_tensor is None:
        return zeros(spec.shape, spec.dtype, spec.layout, mesh, spec.memory_config)
    if optional_tensor.spec is not spec:
        raise DeviceError(
            f"zeros_like: optional_tensor {optional_tensor.spec!r} for a tensor {spec!r}; they must be alike"
        )
    values = torch.zeros(1, dtype=spec.dtype.storage).expand(1, *spec.shape)
    launch_in_place("zeros_like", optional_tensor, lambda: values)
    return optional_tensor


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
    values = whole(host_tensor._values.data, host)
    launch_in_place("copy_host_to_device_tensor", device_tensor, lambda: values)


def deallocate(tensor: Tensor, force: bool = True) -> None:
    """Free a tensor's memory now, and with it every view of it."""
    tensor.deallocate(force)
