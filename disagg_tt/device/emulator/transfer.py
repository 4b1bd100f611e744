"""What crosses between host and device: from_torch, to_torch, to_device, from_device, refreshing a tensor in place.

A host tensor's data is [parts, *shape], one part for each chip it is meant for; equal parts are one, expanded.
"""

from __future__ import annotations

from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch_in_place, reads
from disagg_tt.device.emulator.mappers import MeshToTensor, TensorToMesh, default_composer, default_mapper
from disagg_tt.device.emulator.mesh import MeshDevice, command_queue
from disagg_tt.device.emulator.numeric import round_on_host
from disagg_tt.device.emulator.spec import TensorSpec, make_spec
from disagg_tt.device.emulator.tensor import Shard, Tensor, Values, on_device, once, whole
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig, Tile
from disagg_tt.errors import DeviceError, NotEmulatedError

_TORCH = {
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.UINT32: torch.uint32,
    DataType.INT32: torch.int32,
    DataType.UINT16: torch.uint16,
    DataType.UINT8: torch.uint8,
}
# What from_torch makes of a torch dtype when no ttnn dtype is given.
_TTNN = {v: k for k, v in _TORCH.items()} | {
    torch.float16: DataType.BFLOAT16,
    torch.int64: DataType.UINT32,
    torch.int16: DataType.UINT16,
    torch.bool: DataType.UINT8,
}


def from_torch(
    tensor: Any,
    dtype: DataType | None = None,
    *,
    spec: TensorSpec | None = None,
    tile: Tile | None = None,
    pad_value: float | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    mesh_mapper: TensorToMesh | None = None,
    cq_id: int | None = None,
    preserve_nan_values: bool = False,
    col_tilize: bool = False,
    enable_bfloat_opt: bool = False,
) -> Any:
    """Return `tensor` (torch or numpy) as a ttnn tensor of `dtype`, on the host or on `device`, rounded as the host does.

    `mesh_mapper` cuts it over the chips of a mesh, by default every chip gets all of it. The padding of tiles has no
    values here, so `pad_value` changes nothing. None gives None. Raises DeviceError.
    """
    if tensor is None:
        return None
    for name, given in (("col_tilize", col_tilize), ("enable_bfloat_opt", enable_bfloat_opt)):
        if given:
            raise NotEmulatedError(f"from_torch: the emulator does not have {name}=True; leave it out")
    if not isinstance(tensor, torch.Tensor):
        if type(tensor).__module__ != "numpy":
            raise TypeError(
                f"from_torch takes a torch tensor or a numpy array, not a {type(tensor).__name__}"
            )
        tensor = torch.from_numpy(tensor)
    if spec is not None:
        named = {"dtype": dtype, "layout": layout, "memory_config": memory_config, "tile": tile}
        doubled = [name for name, value in named.items() if value is not None]
        if doubled or spec.shape != tuple(tensor.shape):
            raise DeviceError(
                f"from_torch: spec {spec!r} for a tensor of shape {list(tensor.shape)}, {', '.join(doubled) or 'nothing'} "
                "given beside it; the shapes must agree and spec says the rest"
            )
        dtype, layout, memory_config = spec.dtype, spec.layout, spec.memory_config
    if tensor.dtype not in _TTNN:
        raise DeviceError(
            f"from_torch: no ttnn dtype for {tensor.dtype}; allowed: {', '.join(map(str, _TTNN))}"
        )
    dtype = dtype or _TTNN[tensor.dtype]
    layout = layout or (Layout.TILE if dtype.is_block_float else Layout.ROW_MAJOR)
    mapper = mesh_mapper or default_mapper()
    if mapper is not None and not isinstance(mapper, TensorToMesh):
        raise TypeError(
            f"from_torch: mesh_mapper is a {type(mapper).__name__}; make it with create_mesh_mapper"
        )
    if mapper is not None and device is not None and mapper.chips != device.get_num_devices():
        raise DeviceError(
            f"from_torch: a mapper for {mapper.chips} chips and a device of {device.get_num_devices()}; make it for the device"
        )
    shards = mapper.shards(tensor) if mapper is not None else tensor[None]
    made = make_spec(shards.shape[1:], dtype, layout, memory_config)
    values = converted(once(shards), dtype)  # of its own: the script may change what it gave
    if device is None:
        return Tensor(made, None, Values(values.expand(shards.shape)))
    with command_queue(cq_id):
        device.queue().need_no_capture("from_torch to a device")
        return Tensor(made, device, Values(values.contiguous(), device.queue()))


def converted(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return torch values as `dtype` can hold them, in memory of their own; bfloat16 and block floats as torch.bfloat16.

    Integers keep their low bits, as C++ conversions do.
    """
    if dtype is DataType.BFLOAT16:
        return values.to(torch.bfloat16, copy=True)
    if dtype.is_float:
        made = round_on_host(values, dtype) if values.numel() else values.to(dtype.storage)
        return made.to(torch.bfloat16) if dtype.is_block_float else made
    if dtype is DataType.UINT16 and values.is_floating_point():
        return values.float().trunc().clamp(0, 0xFFFF).to(torch.int64)
    bits = 8 * dtype.bytes_of(1)
    kept = values.to(torch.int64) & ((1 << bits) - 1)
    return kept - ((kept >> (bits - 1)) << bits) if dtype is DataType.INT32 else kept


def to_torch(
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    *,
    torch_rank: int | None = None,
    mesh_composer: MeshToTensor | None = None,
    device: MeshDevice | None = None,
    cq_id: int | None = None,
) -> torch.Tensor:
    """Return a tensor's values once they are computed; a multi-chip tensor needs a composer or get_device_tensors.

    `torch_rank` drops leading axes of 1. Raises DeviceError.
    """
    composer = mesh_composer or default_composer()
    if composer is not None and not isinstance(composer, MeshToTensor):
        raise TypeError(
            f"to_torch: mesh_composer is a {type(composer).__name__}; make it with create_mesh_composer"
        )
    parts = read_parts("to_torch", tensor, cq_id, as_held=True)
    if composer is not None:
        values = composer.join(parts)
    elif parts.shape[0] > 1:
        raise DeviceError(
            f"to_torch: a tensor on {parts.shape[0]} chips; pass mesh_composer=ConcatMeshToTensor(mesh, dim), "
            "or read one chip with get_device_tensors"
        )
    else:
        values = parts[0]
    if torch_rank is not None:
        extra = values.dim() - torch_rank
        if any(size != 1 for size in values.shape[: max(extra, 0)]):
            raise DeviceError(f"to_torch: {list(values.shape)} cannot lose {extra} axes; only axes of 1 go")
        values = values.reshape(values.shape[max(extra, 0) :])
    return values.to(dtype or _TORCH.get(tensor.dtype, torch.float32), copy=True)


def read_parts(what: str, tensor: Tensor, cq_id: int | None = None, as_held: bool = False) -> torch.Tensor:
    """Wait for a tensor's values and return them as [parts, *shape], all parts of a device tensor.

    With `as_held` they may be torch.bfloat16 (Values.held).
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} takes a ttnn tensor, not a {type(tensor).__name__}")
    mesh, values, chips = tensor._mesh, tensor._values, 1
    if mesh is not None:
        if not tensor.is_allocated():
            raise DeviceError(f"{what}: {tensor.spec!r} was deallocated; read it before it is freed")
        queue, chips = mesh.queue(cq_id), mesh.get_num_devices()
        reads(what, queue, tensor)
        queue.wait()
    elif values.writer is not None and not values.writer.host_knows(values.written):
        raise DeviceError(
            f"{what}: a host tensor that {values.writer.name} may still be writing (a copy with blocking=False); wait with "
            "synchronize_device or event_synchronize"
        )
    parts = whole(values.held if as_held else values.data, tensor.spec)
    if isinstance(tensor, Shard):
        return parts[min(tensor.chip, parts.shape[0] - 1)][None]
    return parts.expand(max(chips, parts.shape[0]), *parts.shape[1:])


def to_device(
    tensor: Tensor,
    device: MeshDevice,
    memory_config: MemoryConfig | None = None,
    *,
    queue_id: int | None = None,
) -> Tensor:
    """Return a host tensor on `device`, by default in DRAM; one that is on a device already as it is."""
    if tensor._mesh is not None:
        return tensor
    parts, spec = read_parts("to_device", tensor, as_held=True), tensor.spec
    chips = device.get_num_devices()
    if parts.shape[0] not in (1, chips):
        raise DeviceError(
            f"to_device: a tensor in {parts.shape[0]} parts and a mesh of {chips} chips; the emulator does not have tensors "
            "on part of a mesh, so it needs a part for each chip or one for all"
        )
    made = make_spec(spec.shape, spec.dtype, spec.layout, memory_config)
    need_same_padding("to_device", spec, made)
    with command_queue(queue_id):
        device.queue().need_no_capture("to_device")
        return Tensor(made, device, Values(once(parts), device.queue()))


def need_same_padding(what: str, host: TensorSpec, device: TensorSpec) -> None:
    """Raise DeviceError unless host data of one spec fills a device tensor of another, byte for byte."""
    if host.padded_shape != device.padded_shape:
        raise DeviceError(
            f"{what}: host {host!r} into {device!r}; the transfer adds no padding, so shards must divide the rows "
            "(from_torch with this memory_config pads)"
        )


def from_device(
    tensor: Tensor, blocking: bool = True, *, queue_id: int | None = None, cq_id: int | None = None
) -> Tensor:
    """Return a device tensor on the host, in as many parts as chips; a host tensor as it is.

    With blocking=False the values are there after the next synchronisation, and reading them before is an error.
    """
    if tensor._mesh is None:
        return tensor
    queue = queue_id if cq_id is None else cq_id
    spec = make_spec(tensor.spec.shape, tensor.dtype, tensor.layout)
    if blocking or isinstance(tensor, Shard):
        values = read_parts("from_device", tensor, queue, as_held=True)
        tensor._values.private = False
        return Tensor(spec, None, Values(values))
    host = Tensor(spec, None, Values())
    copy_device_to_host_tensor(tensor, host, False, queue)
    return host


def copy_host_to_device_tensor(host_tensor: Tensor, device_tensor: Tensor, cq_id: int | None = None) -> None:
    """Overwrite `device_tensor` in place with `host_tensor`, whose spec must match but for the memory config."""
    host, target = host_tensor.spec, device_tensor.spec
    if host_tensor._mesh is not None:
        raise DeviceError(
            f"copy_host_to_device_tensor: the source {host!r} is on a device; it must be a host tensor"
        )
    _need_alike("copy_host_to_device_tensor: host", host, "into device", target)
    parts = once(read_parts("copy_host_to_device_tensor", host_tensor, as_held=True))
    mesh = on_device("copy_host_to_device_tensor", device_tensor)
    mesh.queue(cq_id).need_no_capture("copy_host_to_device_tensor")
    chips = mesh.get_num_devices()
    if parts.shape[0] not in (1, chips):
        raise DeviceError(
            f"copy_host_to_device_tensor: a tensor in {parts.shape[0]} parts into {target!r} on {chips} chips; "
            "it needs a part for each chip or one for all"
        )
    with command_queue(cq_id):
        launch_in_place("copy_host_to_device_tensor", device_tensor, lambda: parts)


def copy_device_to_host_tensor(
    device_tensor: Tensor, host_tensor: Tensor, blocking: bool = True, cq_id: int | None = None
) -> None:
    """Overwrite `host_tensor` with a device tensor of the same shape, dtype and layout; see from_device for `blocking`."""
    what = "copy_device_to_host_tensor"
    mesh = on_device(what, device_tensor)
    if host_tensor._mesh is not None:
        raise DeviceError(f"{what}: the target {host_tensor.spec!r} is on a device; it must be a host tensor")
    _need_alike(f"{what}: device", device_tensor.spec, "into host", host_tensor.spec)
    queue, source, target, spec = (
        mesh.queue(cq_id),
        device_tensor._values,
        host_tensor._values,
        device_tensor.spec,
    )
    chips, held = mesh.get_num_devices(), target.held
    if held is not None and held.shape[0] != chips:
        raise DeviceError(
            f"{what}: a host tensor of {held.shape[0]} parts for {chips} chips; make it with allocate_tensor_on_host"
        )
    reads(what, queue, device_tensor)
    queue.need_no_capture(what)

    def work() -> None:
        parts = whole(source.held, spec)
        # A copy: what the device tensor holds may be written in place later.
        target.hold(parts.clone().expand(max(chips, parts.shape[0]), *parts.shape[1:]))

    target.writer = queue
    target.written = queue.submit(what, work)
    if blocking:
        queue.wait()


def _need_alike(source: str, a: TensorSpec, target: str, b: TensorSpec) -> None:
    if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
        raise DeviceError(f"{source} {a!r} {target} {b!r}; shape, dtype and layout must match")


def deallocate(tensor: Tensor, force: bool = True) -> None:
    """Free a tensor's memory now, and with it every view of it."""
    tensor.deallocate(force)
