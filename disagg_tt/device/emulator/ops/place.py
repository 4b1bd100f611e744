"""Ops that place a tensor's values in another way: memory configs, shards, another address."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.moves import (
    moved,
    need_aligned_rows,
    unchanged,
)
from disagg_tt.device.emulator.ops.plan import emulated, need, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig, TensorMemoryLayout


def same_values(a: torch.Tensor) -> torch.Tensor:
    return a


def copied(op: str, tensor: Tensor, spec: Spec) -> Tensor:
    """Return the tensor's values as `spec` stores them, converted to its dtype as the device packs it."""
    before, after = tensor.dtype, spec.dtype
    if before is after or (before.is_block_float and after is DataType.BFLOAT16):
        return moved(op, spec, same_values, tensor, as_held=True)
    return launch(op, spec, lambda a: round_on_device(a.clone(), after), tensor)


def result_dtype(op: str, a: Spec, dtype: DataType | None) -> DataType:
    """Return the output's dtype: of the conversions those between floats are emulated."""
    if dtype is None or dtype is a.dtype:
        return a.dtype
    emulated(
        a.dtype.is_float and dtype.is_float,
        op,
        f"convert {a.dtype.value} to {dtype.value} on the way; use typecast",
    )
    return dtype


@lru_cache(maxsize=4096)
def _place_plan(op: str, a: Spec, memory_config: MemoryConfig, dtype: DataType | None) -> Spec:
    need(
        dtype in (None, a.dtype) or a.layout is Layout.TILE,
        op,
        f"{a!r} to {'' if dtype is None else dtype.value}: only a tensor in TILE layout can be converted",
    )
    padded = a.padded_shape if a.layout is Layout.TILE else None
    return make_spec(a.shape, result_dtype(op, a, dtype), a.layout, memory_config, padded)


def to_memory_config(
    tensor: Tensor,
    memory_config: MemoryConfig,
    dtype: DataType | None = None,
    output_tensor: Tensor | None = None,
) -> Tensor:
    """Return the tensor placed as `memory_config` says; one that lies there is returned as it is, in its own dtype."""
    op = "to_memory_config"
    emulated(output_tensor is None, op, "take output_tensor; leave it out")
    on_device(op, tensor)
    if memory_config == tensor.spec.memory_config:
        return unchanged(op, tensor)
    return copied(op, tensor, _place_plan(op, tensor.spec, memory_config, dtype))


@lru_cache(maxsize=4096)
def _shard_plan(op: str, a: Spec, place: MemoryConfig, dtype: DataType | None) -> Spec:
    need(place.is_sharded(), op, f"output {place!r} must be sharded")
    need(not a.memory_config.is_sharded(), op, f"{a!r} is already sharded; use reshard")
    spec = _place_plan(op, a, place, dtype)
    need_aligned_rows(op, spec)
    return spec


def interleaved_to_sharded(
    input_tensor: Tensor,
    sharded_memory_config: MemoryConfig,
    output_dtype: DataType | None = None,
    *,
    keep_l1_aligned: bool | None = False,
    preallocated_output: Tensor | None = None,
) -> Tensor:
    """Return an interleaved tensor sharded over cores."""
    op, a = "interleaved_to_sharded", input_tensor.spec
    emulated(
        isinstance(sharded_memory_config, MemoryConfig), op, "take a grid and a shape; pass a memory config"
    )
    emulated(preallocated_output is None, op, "take preallocated_output; leave it out")
    spec = _shard_plan(op, a, sharded_memory_config, output_dtype)
    on_device(op, input_tensor)
    return copied(op, input_tensor, spec)


def sharded_to_interleaved(
    input_tensor: Tensor, memory_config: MemoryConfig | None = None, output_dtype: DataType | None = None
) -> Tensor:
    """Return a sharded tensor interleaved over banks, in DRAM unless `memory_config` says L1; others as they are."""
    op, a = "sharded_to_interleaved", input_tensor.spec
    if not a.memory_config.is_sharded():
        return unchanged(op, input_tensor)
    place = placed(memory_config)
    need(not place.is_sharded(), op, f"output {place!r} must be interleaved")
    spec = _place_plan(op, a, place, output_dtype)
    need_aligned_rows(op, a)
    on_device(op, input_tensor)
    return copied(op, input_tensor, spec)


def reshard(
    input_tensor: Tensor, output_memory_config: MemoryConfig, output_tensor: Tensor | None = None
) -> Tensor:
    """Return a sharded tensor in other shards."""
    op, a = "reshard", input_tensor.spec
    emulated(output_tensor is None, op, "take output_tensor; leave it out")
    need(a.memory_config.is_sharded(), op, f"{a!r} is not sharded; use interleaved_to_sharded")
    need(output_memory_config.is_sharded(), op, f"output {output_memory_config!r} must be sharded")
    spec = _place_plan(op, a, output_memory_config, None)
    heights = TensorMemoryLayout.HEIGHT_SHARDED
    if a.memory_config.memory_layout is not heights or output_memory_config.memory_layout is not heights:
        need_aligned_rows(op, a, spec)
    on_device(op, input_tensor)
    return copied(op, input_tensor, spec)


def move(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Return the tensor at another address, or as `memory_config` says, and free `input_tensor`."""
    a = input_tensor.spec
    place = placed(memory_config, a.memory_config)
    if a.memory_config.is_sharded():
        need(place.is_sharded(), "move", f"{a!r} to {place!r}; a sharded tensor stays sharded")
        place = MemoryConfig(place.memory_layout, place.buffer_type, a.memory_config.shard_spec)
    on_device("move", input_tensor)
    result = copied("move", input_tensor, _place_plan("move", a, place, None))
    input_tensor.deallocate(True)
    return result


def reallocate(input_tensor: Tensor, memory_config: MemoryConfig | None = None) -> Tensor:
    """Return the tensor at another address, or as `memory_config` says, and free `input_tensor`."""
    return move(input_tensor, memory_config=memory_config)
