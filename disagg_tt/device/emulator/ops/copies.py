"""Ops that copy: typecast, clone, copy, assign; and plus_one."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.mesh import command_queue
from disagg_tt.device.emulator.ops.convert import convert, wrap
from disagg_tt.device.emulator.ops.plan import leave_out, need, need_dtype
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import (
    BufferType,
    DataType,
    Layout,
    MemoryConfig,
    WormholeComputeKernelConfig,
)

L1_ALIGNMENT = 16  # bytes


@lru_cache(maxsize=4096)
def _typecast_plan(
    a: Spec, source: DataType, dtype: DataType, memory_config: MemoryConfig | None, out: Spec | None
) -> Spec:
    op = "typecast"
    if not isinstance(dtype, DataType) or not isinstance(source, DataType):
        raise TypeError(f"typecast to {dtype!r}; it must be a DataType")
    need(
        source is a.dtype,
        op,
        f"input_dtype {source.value} of an input of {a.dtype.value}; they must be the same",
    )
    before, after = a.memory_config, out.memory_config if out else memory_config or a.memory_config
    need(
        before.memory_layout is after.memory_layout,
        op,
        f"{before!r} to {after!r}; both must be interleaved or sharded alike; use to_memory_config",
    )
    shard = before.shard_spec
    need(
        a.layout is Layout.TILE or shard is None or a.dtype.bytes_of(shard.shape[1]) % L1_ALIGNMENT == 0,
        op,
        f"shards of {shard and shard.shape[1]} {a.dtype.value}s a row; rows must be multiples of {L1_ALIGNMENT} bytes",
    )
    if out is None:
        return make_spec(a.shape, dtype, a.layout, after, a.padded_shape)
    same = (out.shape, out.dtype, out.layout) == (a.shape, dtype, a.layout)
    need(same, op, f"{a!r} to {dtype.value} into {out!r}; shape, dtype and layout must be the same")
    return out


def typecast(
    input_tensor: Tensor,
    dtype: DataType,
    output_dtype: DataType | None = None,
    *,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    sub_core_grids: None = None,
    queue_id: int | None = None,
    cq_id: int | None = None,
) -> Tensor:
    """Return the tensor in `dtype`, or, given three arguments, of the second dtype in the third; see convert.convert."""
    queue = cq_id if queue_id is None else queue_id
    if queue is not None:
        with command_queue(queue):
            return typecast(
                input_tensor, dtype, output_dtype, memory_config=memory_config, output_tensor=output_tensor
            )
    leave_out("typecast", sub_core_grids=sub_core_grids)
    a = input_tensor.spec
    source, to = (a.dtype, dtype) if output_dtype is None else (dtype, output_dtype)
    spec = _typecast_plan(a, source, to, memory_config, None if output_tensor is None else output_tensor.spec)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return convert(x, source, to)

    if output_tensor is None:
        return launch("typecast", spec, compute, input_tensor)
    launch_in_place("typecast", output_tensor, compute, input_tensor)
    return output_tensor


@lru_cache(maxsize=4096)
def _clone_plan(a: Spec, dtype: DataType | None, memory_config: MemoryConfig | None) -> Spec:
    to = dtype or a.dtype
    need(
        to is a.dtype or a.layout is Layout.TILE,
        "clone",
        f"{a.dtype.value} to {to.value} in ROW_MAJOR layout; dtypes are converted in TILE layout only",
    )
    before, after = a.memory_config, memory_config or a.memory_config
    need(
        before.memory_layout is after.memory_layout and before.shard_spec == after.shard_spec,
        "clone",
        f"{before!r} to {after!r}; both must be interleaved or have the same shards; use to_memory_config",
    )
    return make_spec(a.shape, to, a.layout, after, a.padded_shape)


def clone(
    input: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return a copy, in another dtype or place if given."""
    source, spec = input.spec.dtype, _clone_plan(input.spec, dtype, memory_config)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return convert(x, source, spec.dtype)

    return launch("clone", spec, compute, input, as_held=source is spec.dtype)


@lru_cache(maxsize=4096)
def _copy_check(a: Spec, b: Spec) -> None:
    need(
        (a.shape, a.layout) == (b.shape, b.layout),
        "copy",
        f"{a!r} into {b!r}; shape and layout must be the same",
    )
    need(
        a.dtype is b.dtype or a.layout is Layout.TILE,
        "copy",
        f"{a.dtype.value} into {b.dtype.value} in ROW_MAJOR layout; dtypes are converted in TILE layout only",
    )


def copy(input_a: Tensor, input_b: Tensor) -> Tensor:
    """Write the values of `input_a` into `input_b`, of the same shape and layout, in its dtype; return `input_b`."""
    a, b = input_a.spec, input_b.spec
    _copy_check(a, b)
    source, dtype = a.dtype, b.dtype
    launch_in_place("copy", input_b, lambda x: convert(x, source, dtype), input_a)
    return input_b


@lru_cache(maxsize=4096)
def _plus_one_check(a: Spec) -> None:
    op, place = "plus_one", a.memory_config
    need_dtype(op, "input", a, DataType.INT32, DataType.UINT32)
    need(a.layout is Layout.ROW_MAJOR, op, f"input {a!r} must be ROW_MAJOR")
    need(
        not place.is_sharded() or place.buffer_type is BufferType.L1,
        op,
        f"input in {place!r}; shards must be in L1",
    )
    need(1 <= len(a.shape) <= 4, op, f"input {list(a.shape)} must have 1 to 4 axes")


def plus_one(
    input_tensor: Tensor, sub_core_grids: None = None, skip_negative_entries: bool = False
) -> Tensor:
    """Add one to every entry in place, wrapping; or, skipping negative entries, to those from 0 to 2^31 - 2 only."""
    op, dtype = "plus_one", input_tensor.dtype
    leave_out(op, sub_core_grids=sub_core_grids)
    _plus_one_check(input_tensor.spec)

    def compute(a: torch.Tensor) -> torch.Tensor:
        if skip_negative_entries:
            return a + ((a >= 0) & (a < 2**31 - 1))
        return wrap(a + 1, dtype)

    launch_in_place(op, input_tensor, compute, input_tensor)
    return input_tensor
