"""Ops that put tensors together or repeat them: concat, stack, repeat, repeat_interleave, expand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.ops.moves import axis_of, integers, interleaved, requantised
from disagg_tt.device.emulator.ops.place import to_memory_config
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, placed
from disagg_tt.device.emulator.ops.shape import reshape, unsqueeze
from disagg_tt.device.emulator.ops.slice import by_rows
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import DRAM_MEMORY_CONFIG, DataType, Layout, MemoryConfig


@lru_cache(maxsize=4096)
def _concat_plan(specs: tuple[Spec, ...], dim: int, memory_config: MemoryConfig) -> Spec:
    op, a = "concat", specs[0]
    for b in specs[1:]:
        alike = len(b.shape) == len(a.shape) and all(
            axis == dim or x == y for axis, (x, y) in enumerate(zip(a.shape, b.shape, strict=False))
        )
        need(alike, op, f"{list(a.shape)} and {list(b.shape)} may differ on axis {dim} only")
        need(
            a.layout is b.layout,
            op,
            f"{a.layout.name} and {b.layout.name}; layouts must be the same, use to_layout",
        )
        need(
            a.dtype is b.dtype,
            op,
            f"{a.dtype.value} and {b.dtype.value}; dtypes must be the same, use typecast",
        )
        mixed = a.memory_config.is_sharded() != b.memory_config.is_sharded()
        need(not mixed, op, f"{a!r} and {b!r}; either all tensors or none must be sharded")
    emulated(
        not memory_config.is_sharded(),
        op,
        f"write shards ({memory_config!r}) here; use interleaved_to_sharded after it",
    )
    on_tiles = a.layout is Layout.ROW_MAJOR or all(b.shape[dim] == b.padded_shape[dim] for b in specs)
    dtype = a.dtype if on_tiles else by_rows(op, a)
    shape = list(a.shape)
    shape[dim] = sum(b.shape[dim] for b in specs)
    return make_spec(shape, dtype, a.layout, memory_config)


def concat(
    tensors: Sequence[Tensor],
    dim: int = 0,
    *,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    groups: int = 1,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensors, alike but for axis `dim`, one after the other along it; interleaved in DRAM by default.

    bfloat8_b becomes bfloat16 where a tensor is padded along `dim`.
    """
    need(len(tensors) > 0, "concat", "no tensors; at least one is needed")
    emulated(output_tensor is None, "concat", "take output_tensor; leave it out")
    emulated(groups == 1, "concat", "interleave groups; leave groups out")
    leave_out("concat", sub_core_grids=sub_core_grids)
    place = memory_config or DRAM_MEMORY_CONFIG
    on_device("concat", *tensors)
    if len(tensors) == 1:
        return to_memory_config(tensors[0], place)
    specs = tuple(t.spec for t in tensors)
    axis = axis_of("concat", dim, len(specs[0].shape))
    spec = _concat_plan(specs, axis, place)

    def compute(*parts: torch.Tensor) -> torch.Tensor:
        filled = [whole(part, one) for part, one in zip(parts, specs, strict=True)]
        chips = max(part.shape[0] for part in filled)
        return torch.cat([part.expand(chips, *part.shape[1:]) for part in filled], dim=axis + 1)

    return launch("concat", spec, compute, *tensors)


def stack(input_tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return the tensors, of one shape, along a new axis `dim`."""
    need(len(input_tensors) > 0, "stack", "no tensors; at least one is needed")
    axis = axis_of("stack", dim, len(input_tensors[0].shape), extra=1)
    return concat([unsqueeze(t, axis) for t in input_tensors], axis)


@lru_cache(maxsize=4096)
def _repeat_plan(op: str, a: Spec, times: tuple[int, ...], memory_config: MemoryConfig | None) -> Spec:
    interleaved(op, a, memory_config)
    shape = [size * n for size, n in zip(a.shape, times, strict=True)]
    return make_spec(shape, a.dtype, a.layout, placed(memory_config, a.memory_config))


def repeat(
    input_tensor: Tensor,
    repeat_dims: Sequence[int],
    *,
    memory_config: MemoryConfig | None = None,
    optional_output_tensor: Tensor | None = None,
) -> Tensor:
    """Return the tensor repeated `repeat_dims` times along each axis; more numbers than axes add leading ones."""
    emulated(optional_output_tensor is None, "repeat", "take optional_output_tensor; leave it out")
    times = integers("repeat", "repeat_dims", repeat_dims)
    if any(n < 0 for n in times):
        raise TypeError(f"repeat: {times}; the numbers must be 0 or more")
    rank = max(len(times), len(input_tensor.shape))
    times = (1,) * (rank - len(times)) + times
    on_device("repeat", input_tensor)
    if len(input_tensor.shape) < rank:
        input_tensor = reshape(
            input_tensor, (1,) * (rank - len(input_tensor.shape)) + tuple(input_tensor.shape)
        )
    a = input_tensor.spec
    if all(n == 1 for n in times):
        return to_memory_config(input_tensor, placed(memory_config, a.memory_config))
    small = a.dtype in (DataType.BFLOAT4_B, DataType.UINT8)
    emulated(not small, "repeat", f"repeat {a.dtype.value}; use typecast before it")
    spec = _repeat_plan("repeat", a, times, memory_config)

    def compute(values: torch.Tensor) -> torch.Tensor:
        return requantised(whole(values, a).repeat(1, *times), spec.dtype)

    return launch("repeat", spec, compute, input_tensor)


def repeat_interleave(
    input_tensor: Tensor, repeats: int, dim: int, *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Return the tensor with each of its parts along `dim` `repeats` times in a row."""
    op, a = "repeat_interleave", input_tensor.spec
    if not isinstance(repeats, int):
        raise TypeError(f"{op}: repeats is {repeats!r}; it must be an integer")
    need(repeats > 0, op, f"{repeats} times; it must be 1 or more")
    axis = axis_of(op, dim, len(a.shape))
    on_device(op, input_tensor)
    emulated(
        not input_tensor.is_sharded(), op, "repeat parts of shards; use sharded_to_interleaved before it"
    )
    need(
        len(a.shape) > 1 or a.dtype not in (DataType.UINT16, DataType.UINT8),
        op,
        f"{list(a.shape)} in {a.dtype.value}; allowed for one axis: floats, uint32, int32",
    )
    if repeats == 1:
        return to_memory_config(input_tensor, placed(memory_config, a.memory_config))
    times = tuple(repeats if i == axis else 1 for i in range(len(a.shape)))
    spec = _repeat_plan(op, a, times, memory_config)

    def compute(values: torch.Tensor) -> torch.Tensor:
        return requantised(whole(values, a).repeat_interleave(repeats, dim=axis + 1), spec.dtype)

    return launch(op, spec, compute, input_tensor)


def expand(
    input_tensor: Tensor, output_shape: Sequence[int], *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Return the tensor with axes of size 1 repeated to `output_shape`, where -1 keeps an axis; a copy."""
    shape, new = input_tensor.shape, integers("expand", "output_shape", output_shape)
    need(len(new) >= len(shape), "expand", f"{list(shape)} to {list(new)}: axes cannot be dropped")
    before = (1,) * (len(new) - len(shape)) + tuple(shape)
    fits = all(n in (-1, size) or (size == 1 and n >= 0) for size, n in zip(before, new, strict=True))
    need(fits, "expand", f"{list(shape)} to {list(new)}: only axes of size 1 can be expanded")
    times = [1 if n in (-1, size) else n for size, n in zip(before, new, strict=True)]
    return repeat(input_tensor, times, memory_config=memory_config)
