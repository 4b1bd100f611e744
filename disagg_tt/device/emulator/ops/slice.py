"""Ops that cut and pad tensors: slice, split, chunk, pad.

In TILE layout what starts on a tile's edge is moved as tiles. Anything else goes by rows and back: bfloat8_b then comes out as
bfloat16, and bfloat4_b and uint8, which have no such way, are rejected.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.moves import axis_of, integers, interleaved, moved, requantised, unchanged
from disagg_tt.device.emulator.ops.place import to_memory_config
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, placed
from disagg_tt.device.emulator.ops.tilize import needs_rows
from disagg_tt.device.emulator.spec import Spec, make_spec, tile_padded
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import TILE_SIZE, DataType, Layout, MemoryConfig

_INTEGER_RANGE = {
    DataType.UINT32: (0, 2**32 - 1),
    DataType.INT32: (-(2**31), 2**31 - 1),
    DataType.UINT16: (0, 2**16 - 1),
    DataType.UINT8: (0, 2**8 - 1),
}


def by_rows(op: str, a: Spec) -> DataType:
    """Check that `a` can go by rows and back to tiles, and return the dtype that comes out."""
    need(
        a.dtype is not DataType.UINT8,
        op,
        "uint8 in TILE layout can be cut on tile edges only; use ROW_MAJOR layout",
    )
    emulated(
        not a.memory_config.is_sharded(),
        op,
        f"read shards ({a!r}) off their tiles' edges; use sharded_to_interleaved before it",
    )
    return needs_rows(op, a)


# ---------------------------------------------------------------- parts


@lru_cache(maxsize=4096)
def _slice_plan(
    a: Spec,
    start: tuple[int, ...],
    end: tuple[int, ...],
    step: tuple[int, ...],
    memory_config: MemoryConfig | None,
) -> tuple[Spec, tuple[int, ...], tuple[int, ...]]:
    """Return (output spec, start, end), the indices counted from 0."""
    op, rank = "slice", len(a.shape)
    for name, numbers in (("start", start), ("end", end), ("step", step)):
        need(len(numbers) == rank, op, f"{name} {numbers} for {list(a.shape)}: {rank} numbers are needed")
    need(all(s > 0 for s in step), op, f"step {step}; steps must be 1 or more")
    low = tuple(i + size if i < 0 else i for i, size in zip(start, a.shape, strict=True))
    high = tuple(i + size if i < 0 else i for i, size in zip(end, a.shape, strict=True))
    for axis, (first, last, size) in enumerate(zip(low, high, a.shape, strict=True)):
        need(0 <= first <= last <= size, op, f"[{first}:{last}] on axis {axis} of size {size}")
    interleaved(op, a, memory_config)
    strided = any(s != 1 for s in step)
    need(
        not (strided and a.dtype.is_block_float),
        op,
        f"steps {step} of a {a.dtype.value} tensor; only 1 is allowed",
    )
    shape = [-(-(last - first) // s) for first, last, s in zip(low, high, step, strict=True)]
    on_tiles = rank > 1 and not strided and low[-1] % TILE_SIZE == low[-2] % TILE_SIZE == 0
    stays = on_tiles or a.layout is Layout.ROW_MAJOR or 0 in shape
    dtype = a.dtype if stays else by_rows(op, a)
    return make_spec(shape, dtype, a.layout, placed(memory_config, a.memory_config)), low, high


def slice(
    input_tensor: Tensor,
    slice_start: Sequence[int],
    slice_end: Sequence[int],
    slice_step: Sequence[int] | None = None,
    *,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    pad_value: float | None = None,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the part from `slice_start` to before `slice_end`, which count from the end where negative; a copy.

    The whole tensor is returned as a view. bfloat8_b that does not start on a tile's edge becomes bfloat16.
    """
    emulated(output_tensor is None, "slice", "take output_tensor; leave it out")
    leave_out("slice", sub_core_grids=sub_core_grids)
    a = input_tensor.spec
    start, end = integers("slice", "start", slice_start), integers("slice", "end", slice_end)
    step = (1,) * len(start) if slice_step is None else integers("slice", "step", slice_step)
    is_whole = start == (0,) * len(a.shape) and end == a.shape and not any(s != 1 for s in step)
    if is_whole and input_tensor.device() is None:
        return input_tensor
    on_device("slice", input_tensor)
    if is_whole:
        return to_memory_config(input_tensor, placed(memory_config, a.memory_config))
    spec, low, high = _slice_plan(a, start, end, step, memory_config)

    def compute(values: torch.Tensor) -> torch.Tensor:
        for axis, (first, last, by) in enumerate(zip(low, high, step, strict=True), start=1):
            defined = values.shape[axis]  # a prefix of the rows, perhaps
            values = values.narrow(axis, min(first, defined), max(min(last, defined) - first, 0))
            if by != 1:
                parts = [builtins.slice(None)] * values.dim()
                parts[axis] = builtins.slice(None, None, by)
                values = values[tuple(parts)]
        return values

    return launch("slice", spec, compute, input_tensor)


def split(
    input_tensor: Tensor,
    split_size: int | Sequence[int],
    dim: int = 0,
    *,
    memory_config: MemoryConfig | None = None,
) -> list[Tensor]:
    """Return the parts of `split_size` along `dim` (the last may be smaller), or of these sizes, which must add up."""
    on_device("split", input_tensor)
    axis = axis_of("split", dim, len(input_tensor.shape))
    total = input_tensor.shape[axis]
    if isinstance(split_size, int):
        need(split_size > 0, "split", f"split_size {split_size}; it must be 1 or more")
        sizes = [min(split_size, total - low) for low in range(0, total, split_size)]
    else:
        sizes = list(integers("split", "split_size", split_size))
        need(
            bool(sizes) and all(s > 0 for s in sizes) and sum(sizes) == total,
            "split",
            f"sizes {sizes} of axis {axis} of {list(input_tensor.shape)}; they must be positive and add up to {total}",
        )
    return _parts(input_tensor, sizes, axis, memory_config)


def _parts(
    input_tensor: Tensor, sizes: Sequence[int], axis: int, memory_config: MemoryConfig | None = None
) -> list[Tensor]:
    """Return the parts of these sizes along `axis`."""
    parts, low = [], 0
    for size in sizes:
        start, end = [0] * len(input_tensor.shape), list(input_tensor.shape)
        start[axis], end[axis], low = low, low + size, low + size
        parts.append(slice(input_tensor, start, end, memory_config=memory_config))
    return parts


def chunk(input_tensor: Tensor, chunks: int, dim: int) -> list[Tensor]:
    """Return at most `chunks` parts of equal size along `dim`; the last may be smaller."""
    need(chunks > 0, "chunk", f"{chunks} chunks; there must be 1 or more")
    axis = axis_of("chunk", dim, len(input_tensor.shape))
    total = input_tensor.shape[axis]
    size = -(-total // chunks)
    return _parts(input_tensor, [min(size, total - low) for low in range(0, total, size)], axis)


# ---------------------------------------------------------------- padding


@lru_cache(maxsize=4096)
def _pad_plan(
    a: Spec,
    pairs: tuple[tuple[int, ...], ...],
    value: float,
    memory_config: MemoryConfig | None,
    on_host: bool,
) -> Spec:
    op = "pad"
    shape = [front + size + back for size, (front, back) in zip(a.shape, pairs, strict=True)]
    if on_host:
        rows = a.layout is Layout.ROW_MAJOR
        need(rows, op, f"{a!r} on the host is padded in ROW_MAJOR layout only; use to_layout before it")
    else:
        need(a.dtype is not DataType.UINT8, op, "uint8 cannot be padded on a device; use another dtype")
    within_tiles = a.layout is Layout.TILE and tile_padded(shape) == a.padded_shape
    if a.layout is Layout.TILE:
        need(all(front == 0 for front, _ in pairs), op, f"{pairs}: TILE layout is padded at the end only")
        need(
            within_tiles or (a.dtype is not DataType.BFLOAT4_B and len(shape) > 1),
            op,
            f"{list(a.shape)} {a.dtype.value} in TILE layout to {shape}; bfloat4_b, and a tensor of one axis, can be padded "
            "within their tiles only",
        )
    low, high = _INTEGER_RANGE.get(a.dtype, (-math.inf, math.inf))
    need(
        a.dtype.is_float or (value == int(value) and low <= value <= high),
        op,
        f"value {value} in a {a.dtype.value} tensor; it must be one that the dtype can hold",
    )
    emulated(
        not a.memory_config.is_sharded(), op, "pad a sharded tensor; use sharded_to_interleaved before it"
    )
    emulated(
        len(a.shape) <= 4 or memory_config in (None, a.memory_config),
        op,
        "pad more than 4 axes into another memory config; use to_memory_config after it",
    )
    interleaved(op, a, memory_config)
    place = a.memory_config if within_tiles else placed(memory_config, a.memory_config)
    return make_spec(shape, a.dtype, a.layout, None if on_host else place)


def pad(
    input_tensor: Tensor,
    padding: Sequence[Any],
    input_tensor_start: Any = None,
    value: float | None = None,
    *,
    use_multicore: bool = True,
    memory_config: MemoryConfig | None = None,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensor with `value` around it: pad(tensor, pairs, value) or pad(tensor, new shape, start, value).

    `pairs` has (before, after) of the last axes; the form with a shape is for 4 axes. Without any padding the tensor is returned as
    it is.
    """
    leave_out("pad", sub_core_grids=sub_core_grids)
    a = input_tensor.spec
    if padding and isinstance(padding[0], int):
        shape, start = integers("pad", "shape", padding), integers("pad", "start", input_tensor_start)
        if not len(shape) == len(start) == 4:
            raise TypeError(f"pad: shape {shape} and start {start}; this form takes 4 axes")
        need(len(a.shape) == 4, "pad", f"{list(a.shape)} to {list(shape)}; 4 axes are needed")
        by_pairs = "take a shape for a host tensor, which would stay as it is; pass pairs"
        emulated(input_tensor.device() is not None or shape == a.shape, "pad", by_pairs)
        pairs: tuple[tuple[int, ...], ...] = tuple(
            (i, new - i - size) for i, new, size in zip(start, shape, a.shape, strict=True)
        )
    else:
        if isinstance(input_tensor_start, (int, float)) and value is None:
            value = input_tensor_start
        pairs = tuple(integers("pad", "padding", pair) for pair in padding)
        need(len(pairs) <= len(a.shape), "pad", f"{pairs} for {list(a.shape)}: more pairs than axes")
        pairs = ((0, 0),) * (len(a.shape) - len(pairs)) + pairs
    if not isinstance(value, (int, float)) or any(len(pair) != 2 for pair in pairs):
        raise TypeError("pad: a list of pairs and a value are needed, or a shape, a start and a value")
    need(all(front >= 0 and back >= 0 for front, back in pairs), "pad", f"{pairs}: the input does not fit")
    if not any(map(any, pairs)):
        return unchanged("pad", input_tensor)
    spec = _pad_plan(a, pairs, value, memory_config, input_tensor.device() is None)
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    fill = (
        float(round_on_device(torch.tensor([float(value)]), spec.dtype))
        if spec.dtype.is_float
        else int(value)
    )

    def compute(values: torch.Tensor) -> torch.Tensor:
        return requantised(torch.nn.functional.pad(whole(values, a), amounts, value=fill), spec.dtype)

    return moved("pad", spec, compute, input_tensor)
