"""Tensors made from nothing: allocated, of one value, ranges."""

from __future__ import annotations

from typing import Any

import torch

from disagg_tt.device.emulator.host_buffer import HostValues
from disagg_tt.device.emulator.launch import launch_in_place
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.spec import TensorSpec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, Values
from disagg_tt.device.emulator.transfer import from_torch, need_same_padding
from disagg_tt.device.emulator.types import DRAM_MEMORY_CONFIG, DataType, Layout, MemoryConfig
from disagg_tt.errors import DeviceError


def allocate_tensor_on_device(*args: Any, **kwargs: Any) -> Tensor:
    """allocate_tensor_on_device(tensor_spec, mesh_device) or (shape, dtype, layout, mesh_device[, memory_config]).

    The values are undefined. Raises DeviceError where there is no room.
    """
    spec, mesh = _allocation("allocate_tensor_on_device", args, kwargs)
    return Tensor(spec, mesh, Values(None, mesh.queue()))


def allocate_tensor_on_host(*args: Any, **kwargs: Any) -> Tensor:
    """Return a host tensor in as many parts as the mesh has chips; arguments as of allocate_tensor_on_device."""
    spec, mesh = _allocation("allocate_tensor_on_host", args, kwargs)
    zero = torch.zeros(1, dtype=spec.dtype.storage)
    values = zero.expand(mesh.get_num_devices(), *spec.shape)
    return Tensor(spec, None, HostValues(spec, mesh.shape, values))


def _allocation(what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TensorSpec, MeshDevice]:
    by_spec = "tensor_spec" in kwargs or (bool(args) and isinstance(args[0], TensorSpec))
    names = ("tensor_spec", "mesh_device") if by_spec else _ALLOCATION
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    needed = set(names) - {"memory_config"}
    if len(args) > len(names) or not needed <= set(given) <= set(names):
        raise TypeError(f"{what} takes ({', '.join(names)}), not {sorted(given)}")
    if not isinstance(given["mesh_device"], MeshDevice):
        raise TypeError(
            f"{what}: mesh_device is a {type(given['mesh_device']).__name__}; open one with open_mesh_device"
        )
    if by_spec:
        return given["tensor_spec"], given["mesh_device"]
    spec = make_spec(given["shape"], given["dtype"], given["layout"], given.get("memory_config"))
    return spec, given["mesh_device"]


_ALLOCATION = ("shape", "dtype", "layout", "mesh_device", "memory_config")


def full(
    shape: Any,
    fill_value: float,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    optional_tensor: Tensor | None = None,
) -> Tensor:
    """Return a tensor of one value, the same on every chip of `device`, or on the host without one.

    Default: bfloat16, ROW_MAJOR (TILE for block floats). Given `optional_tensor`, that is filled and returned. The host
    makes the values and writes them, so that a trace cannot capture it.
    """
    mesh = device if optional_tensor is None else optional_tensor._mesh
    if mesh is not None:
        mesh.queue().need_no_capture("full")
    return _full(shape, fill_value, dtype, layout, device, memory_config, optional_tensor)


def _full(
    shape: Any,
    fill_value: float,
    dtype: DataType | None,
    layout: Layout | None,
    device: MeshDevice | None,
    memory_config: MemoryConfig | None,
    optional_tensor: Tensor | None,
) -> Tensor:
    kind = dtype or DataType.BFLOAT16
    layout = layout or (Layout.TILE if kind.is_block_float else Layout.ROW_MAJOR)
    if optional_tensor is None:
        host = make_spec(shape, kind, layout)
        # On the host the place is not looked at, but for block floats, as in ttnn.
        placed = device is not None or kind.is_block_float
        spec = make_spec(shape, kind, layout, memory_config) if placed else host
        spec = host if device is None else spec
        need_same_padding("full", host, spec)
        data = _one(fill_value, kind).expand(1, *spec.shape)
        return Tensor(spec, device, Values(data, None if device is None else device.queue()))
    target = optional_tensor.spec
    if (target.shape, target.dtype, target.layout) != (tuple(shape), kind, layout):
        raise DeviceError(
            f"full: optional_tensor {target!r} for {list(shape)} {kind.value} {layout.name}; they must be alike"
        )
    values = _one(fill_value, kind).expand(1, *target.shape)
    launch_in_place("full", optional_tensor, lambda: values)
    return optional_tensor


def _one(value: float, dtype: DataType) -> torch.Tensor:
    """Return [1]: `value` as `dtype` holds it."""
    made: Tensor = from_torch(torch.full((1,), value), dtype)
    assert made._values.data is not None
    return made._values.data.reshape(1).clone()


def zeros(
    shape: Any,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return a tensor of zeros; see full."""
    return full(shape, 0.0, dtype, layout, device, memory_config)


def ones(
    shape: Any,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return a tensor of ones; see full."""
    return full(shape, 1.0, dtype, layout, device, memory_config)


def empty(
    shape: Any,
    dtype: DataType = DataType.BFLOAT16,
    layout: Layout = Layout.ROW_MAJOR,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig = DRAM_MEMORY_CONFIG,
) -> Tensor:
    """Return a device tensor of undefined values."""
    if not isinstance(memory_config, MemoryConfig):
        raise TypeError(f"empty: memory_config is a {type(memory_config).__name__}; leave it out for DRAM")
    return allocate_tensor_on_device(shape, dtype, layout, device, memory_config)


_MADE_BY_CHIPS = (DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)


def full_like(
    tensor: Tensor,
    fill_value: float,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    optional_tensor: Tensor | None = None,
) -> Tensor:
    """Return a tensor of one value, in all else like `tensor` unless given; `optional_tensor` is filled if given.

    The chips themselves make floats in tiles like `tensor`'s, so that a trace can capture that; all else is as in full.
    """
    spec, mesh = tensor.spec, device or tensor._mesh
    place = memory_config or spec.memory_config
    wanted = dtype or spec.dtype, layout or spec.layout
    by_chips = (
        tensor._mesh is not None
        and wanted == (spec.dtype, spec.layout)
        and spec.dtype in _MADE_BY_CHIPS
        and spec.layout is Layout.TILE
    )
    if by_chips and optional_tensor is None:
        made = make_spec(spec.shape, *wanted, place)
        need_same_padding("full_like", spec, made)
        optional_tensor = Tensor(made, mesh, Values())
    return (_full if by_chips else full)(spec.shape, fill_value, *wanted, mesh, place, optional_tensor)


def zeros_like(
    tensor: Tensor,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    optional_tensor: Tensor | None = None,
) -> Tensor:
    """Return a tensor of zeros like `tensor`; see full_like."""
    return full_like(tensor, 0.0, dtype, layout, device, memory_config, optional_tensor)


def ones_like(
    tensor: Tensor,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    optional_tensor: Tensor | None = None,
) -> Tensor:
    """Return a tensor of ones like `tensor`; see full_like."""
    return full_like(tensor, 1.0, dtype, layout, device, memory_config, optional_tensor)


def empty_like(
    tensor: Tensor,
    *,
    dtype: DataType | None = None,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return a device tensor of undefined values, in all else like `tensor` unless given."""
    mesh, spec = device or tensor._mesh, tensor.spec
    if mesh is None:
        raise DeviceError(f"empty_like: {spec!r} is on the host; pass device=")
    place = memory_config or spec.memory_config
    return empty(spec.shape, dtype or spec.dtype, layout or spec.layout, mesh, place)


def arange(
    start: int,
    end: int | None = None,
    step: int = 1,
    *,
    dtype: DataType = DataType.BFLOAT16,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    layout: Layout = Layout.ROW_MAJOR,
) -> Tensor:
    """Return start, start + step, ... before end, along one axis; arange(end) starts at 0. Raises DeviceError."""
    first, last = (0, start) if end is None else (start, end)
    if step == 0 or (last - first) * step < 0:
        raise DeviceError(f"arange: from {first} to {last} by {step}; the step must lead from start to end")
    values = torch.arange(first, last, step).to(torch.float32 if dtype.is_float else torch.int64)
    place = memory_config if device is not None else None
    made: Tensor = from_torch(values, dtype, layout=layout, device=device, memory_config=place)
    return made
