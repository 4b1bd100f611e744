"""The parts that a tensor has on the chips of a mesh: taken apart, put together, cut and joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disagg_tt.device.emulator.mappers import MeshToTensor, TensorToMesh
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.spec import make_spec
from disagg_tt.device.emulator.tensor import Shard, Tensor, Values, on_device
from disagg_tt.device.emulator.transfer import read_parts, to_device
from disagg_tt.device.emulator.types import MeshShape
from disagg_tt.errors import DeviceError, NotEmulatedError


def get_device_tensors(tensor: Tensor) -> list[Tensor]:
    """Return each chip's part as a tensor of its own, for reading; of a host tensor, each part."""
    if tensor._mesh is None:
        return [
            Tensor(tensor.spec, None, Values(part[None]))
            for part in read_parts("get_device_tensors", tensor, as_held=True)
        ]
    if isinstance(tensor, Shard):
        return [tensor]
    return [Shard(tensor, chip) for chip in range(on_device("get_device_tensors", tensor).get_num_devices())]


def combine_device_tensors(*, tensors: Sequence[Tensor]) -> Tensor:
    """Return the device tensor whose parts get_device_tensors gave, all of them in order."""
    first = tensors[0] if tensors else None
    if not isinstance(first, Shard) or first._mesh is None:
        raise DeviceError(
            "combine_device_tensors takes the parts that get_device_tensors gives of a device tensor"
        )
    same = all(isinstance(t, Shard) and t._buffer is first._buffer for t in tensors)
    if not same or [getattr(t, "chip", -1) for t in tensors] != list(range(first._mesh.get_num_devices())):
        raise NotEmulatedError(
            "combine_device_tensors: the emulator does not have tensors of other parts than all of one tensor, in order"
        )
    return Tensor(first.spec, first._mesh, first._values, first._buffer)


def from_host_shards(tensors: Sequence[Tensor], mesh_shape: MeshShape) -> Tensor:
    """Return the host tensor whose parts are `tensors`, one for each chip of `mesh_shape`; their specs must be equal."""
    if len(tensors) != mesh_shape.mesh_size():
        raise DeviceError(f"from_host_shards: {len(tensors)} tensors for {mesh_shape!r}; it needs one a chip")
    if any(t._mesh is not None for t in tensors) or len({t.spec for t in tensors}) != 1:
        raise DeviceError("from_host_shards: all tensors must be on the host and of one spec")
    parts = torch.cat([read_parts("from_host_shards", t, as_held=True) for t in tensors])
    return Tensor(tensors[0].spec, None, Values(parts))


def distribute_tensor(tensor: Tensor, mapper: TensorToMesh, mesh_device: MeshDevice | None = None) -> Tensor:
    """Return a host tensor cut by `mapper`, on `mesh_device` if given."""
    if tensor._mesh is not None:
        raise DeviceError(f"distribute_tensor: {tensor.spec!r} is on a device; it must be a host tensor")
    (part,) = read_parts("distribute_tensor", tensor, as_held=True)
    shards, spec = mapper.shards(part), tensor.spec
    made = make_spec(shards.shape[1:], spec.dtype, spec.layout, spec.memory_config)
    host = Tensor(made, None, Values(shards))
    return host if mesh_device is None else to_device(host, mesh_device, spec.memory_config)


def aggregate_tensor(tensor: Tensor, composer: MeshToTensor) -> Tensor:
    """Return the host tensor that `composer` makes of all parts of `tensor`."""
    joined = composer.join(read_parts("aggregate_tensor", tensor, as_held=True))
    return Tensor(make_spec(joined.shape, tensor.dtype, tensor.layout), None, Values(joined[None]))
