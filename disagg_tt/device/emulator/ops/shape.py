"""Ops that give a tensor another shape or axis order: reshape, view, squeeze, unsqueeze, permute, transpose.

A reshape is a view, which shares the tensor's memory, where no value has to move: the last axis stays, and in TILE layout
the axis before it stays too or is whole tiles before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.launch import view as _view
from disagg_tt.device.emulator.ops.moves import axis_of, integers, interleaved, moved, requantised, unchanged
from disagg_tt.device.emulator.ops.place import to_memory_config
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, placed
from disagg_tt.device.emulator.spec import Spec, make_spec, tile_padded
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import (
    L1_MEMORY_CONFIG,
    TILE_SIZE,
    DataType,
    Layout,
    MemoryConfig,
    TensorMemoryLayout,
)

# Placements whose rows lie on several cores each; transpose makes such a tensor interleaved first, as ttnn does.
_SPLIT_ROWS = (TensorMemoryLayout.WIDTH_SHARDED, TensorMemoryLayout.BLOCK_SHARDED)


def _ends(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sizes of the last two axes, 1 for those that are not there."""
    return (shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1)


def _keeps_pages(a: Spec, shape: Sequence[int]) -> bool:
    """Whether `shape` needs no value of `a` to move."""
    (rows, width), (new_rows, new_width) = _ends(a.shape), _ends(shape)
    in_place = (
        a.layout is Layout.ROW_MAJOR or rows == new_rows or rows % TILE_SIZE == new_rows % TILE_SIZE == 0
    )
    return width == new_width and in_place


def _whole_rows(a: Spec) -> bool:
    """Whether rows are as long in memory as they are: in ROW_MAJOR layout shards may pad them."""
    return a.layout is Layout.TILE or a.padded_shape[-1:] == a.shape[-1:]


def _inferred(op: str, a: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with its -1, if any, replaced by what is left over."""
    need(shape.count(-1) <= 1, op, f"shape {list(shape)}: only one axis may be -1")
    if -1 in shape:
        rest = -math.prod(shape)
        whole_axis = rest > 0 and math.prod(a.shape) % rest == 0
        need(whole_axis, op, f"{list(a.shape)} to {list(shape)}: no size for -1 fits")
        shape = tuple(math.prod(a.shape) // rest if d == -1 else d for d in shape)
    same = all(d >= 0 for d in shape) and math.prod(shape) == math.prod(a.shape)
    need(same, op, f"{list(a.shape)} to {list(shape)}: the element counts differ")
    return shape


@lru_cache(maxsize=4096)
def _reshape_plan(
    a: Spec, shape: tuple[int, ...], padded: tuple[int, ...] | None, place: MemoryConfig | None, on_host: bool
) -> tuple[Spec, bool]:
    """Return the new spec, and whether the new tensor is a view of the old one's memory, as ttnn documents."""
    op = "reshape"
    if padded is not None and padded != (tile_padded(shape) if a.layout is Layout.TILE else shape):
        return _repadded_plan(a, shape, padded), True
    if padded is not None and math.prod(shape) != math.prod(a.shape):
        return _repadded_plan(a, shape, padded), True
    shape = _inferred(op, a, shape)
    here = a.memory_config
    stays = place is None or (place.is_sharded(), place.buffer_type) == (here.is_sharded(), here.buffer_type)
    if shape == a.shape and stays:
        return a, True
    if _keeps_pages(a, shape) and (stays or on_host) and _whole_rows(a):
        return make_spec(shape, a.dtype, a.layout, here), True
    if on_host:
        need(
            a.layout is Layout.ROW_MAJOR,
            op,
            f"{list(a.shape)} to {list(shape)} on the host, where no tile is rearranged; reshape it on the device "
            "or in ROW_MAJOR layout",
        )
        return make_spec(shape, a.dtype, a.layout, here), False
    interleaved(op, a, place)
    need(
        shape == a.shape or a.dtype not in (DataType.UINT16, DataType.UINT8),
        op,
        f"{list(a.shape)} to {list(shape)} moves {a.dtype.value} values; allowed: floats, uint32, int32",
    )
    return make_spec(shape, a.dtype, a.layout, placed(place, here)), False


def _repadded_plan(a: Spec, shape: tuple[int, ...], padded: tuple[int, ...]) -> Spec:
    """Return the spec of a view that moves rows between the logical part of the last tiles and their padding."""
    op = "reshape"
    emulated(
        a.layout is Layout.TILE,
        op,
        f"pad {a!r} to {list(padded)}; only TILE layout is supported with a padding",
    )
    need(
        math.prod(padded) == math.prod(a.padded_shape) and a.shape[-1:] == shape[-1:],
        op,
        f"{list(a.padded_shape)} to {list(shape)} padded to {list(padded)}: padded counts or widths differ",
    )
    need(
        len(padded) == len(shape) and all(p >= d for p, d in zip(padded, shape, strict=True)),
        op,
        f"{list(shape)} padded to {list(padded)}: the padding must be added",
    )
    emulated(
        math.prod(a.shape[:-2]) == math.prod(shape[:-2]) == 1,
        op,
        f"take {list(a.shape)} to {list(shape)} with padding; only axes of 1 before the last two are supported",
    )
    return make_spec(shape, a.dtype, a.layout, a.memory_config, padded)


def reshape(
    input_tensor: Tensor,
    shape: Sequence[int],
    padded_shape: Sequence[int] | None = None,
    *,
    memory_config: MemoryConfig | None = None,
    pad_value: float | None = None,
    reshape_tile_mode: Any = None,
    sub_core_grids: Any = None,
    skip_padding_fill: bool = False,
) -> Tensor:
    """Return the same values in another shape, of which one axis may be -1; a view where no value has to move.

    With `padded_shape`, rows move between the logical part and padding. `pad_value` fills tile padding, which the emulator
    does not hold.
    """
    leave_out("reshape", reshape_tile_mode=reshape_tile_mode, sub_core_grids=sub_core_grids)
    new = integers("reshape", "shape", shape)
    padded = None if padded_shape is None else integers("reshape", "padded_shape", padded_shape)
    before = input_tensor.spec
    spec, is_view = _reshape_plan(before, new, padded, memory_config, input_tensor.device() is None)
    if spec is before:
        return unchanged("reshape", input_tensor)

    def compute(a: torch.Tensor) -> torch.Tensor:
        count = math.prod(spec.shape)
        flat = a.reshape(a.shape[0], -1)[:, :count]
        if flat.shape[1] == count:
            return requantised(
                flat.reshape(flat.shape[0], *spec.shape), DataType.FLOAT32 if is_view else spec.dtype
            )
        # A defined prefix stays one: all axes before the first longer than 1 keep, that one shrinks.
        axis = next((i for i, d in enumerate(spec.shape) if d > 1), 0)
        inner = math.prod(spec.shape[axis + 1 :])
        if flat.shape[1] % inner == 0:
            return flat.reshape(flat.shape[0], *spec.shape[:axis], -1, *spec.shape[axis + 1 :])
        return whole(a, before).reshape(a.shape[0], *spec.shape)

    if is_view and input_tensor.device() is not None:
        return _view("reshape", spec, compute, input_tensor)
    return moved("reshape", spec, compute, input_tensor)


def view(input_tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a view of a device tensor in another shape; raises DeviceError where values would have to move."""
    a = input_tensor.spec
    new = _inferred("view", a, integers("view", "shape", shape))
    need(
        input_tensor.device() is not None or new == a.shape,
        "view",
        "the tensor is on the host; only a device tensor has views, use reshape",
    )
    need(
        new == a.shape or (_keeps_pages(a, new) and _whole_rows(a)),
        "view",
        f"{list(a.shape)} to {list(new)} would move values: the last axis must stay, and in TILE layout the one before it "
        "must stay or be whole tiles; use reshape",
    )
    return reshape(input_tensor, new)


def squeeze(input_tensor: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """Return the tensor without axis `dim` (several, or by default all) where its size is 1."""
    shape = input_tensor.shape
    if dim is None:
        dims = list(range(len(shape)))
    else:
        dims = [axis_of("squeeze", d, len(shape)) for d in ([dim] if isinstance(dim, int) else dim)]
    need(len(set(dims)) == len(dims), "squeeze", f"dim {dim} names an axis twice")
    return reshape(input_tensor, [d for axis, d in enumerate(shape) if axis not in dims or d != 1])


def unsqueeze(input_tensor: Tensor, dim: int) -> Tensor:
    """Return the tensor with a new axis of size 1 at `dim`."""
    shape = list(input_tensor.shape)
    shape.insert(axis_of("unsqueeze", dim, len(shape), extra=1), 1)
    return reshape(input_tensor, shape)


def unsqueeze_to_4D(tensor: Tensor) -> Tensor:
    """Return the tensor with leading axes of 1 added up to rank 4."""
    need(len(tensor.shape) <= 4, "unsqueeze_to_4D", f"{list(tensor.shape)} has more than 4 axes")
    return reshape(tensor, (1,) * (4 - len(tensor.shape)) + tuple(tensor.shape))


@lru_cache(maxsize=4096)
def _permute_plan(op: str, a: Spec, order: tuple[int, ...], memory_config: MemoryConfig | None) -> Spec:
    interleaved(op, a, memory_config)
    return make_spec([a.shape[d] for d in order], a.dtype, a.layout, placed(memory_config, a.memory_config))


def _permuted(op: str, tensor: Tensor, order: tuple[int, ...], memory_config: MemoryConfig | None) -> Tensor:
    source = tensor.spec
    spec = _permute_plan(op, source, order, memory_config)
    rows_change = order[-1] != len(order) - 1

    def compute(a: torch.Tensor) -> torch.Tensor:
        out = whole(a, source).permute(0, *(d + 1 for d in order))
        return requantised(out, spec.dtype) if rows_change else out

    return launch(op, spec, compute, tensor)


def _moves_nothing(a: Spec, order: tuple[int, ...]) -> bool:
    """Whether only axes of size 1 change places, and none that pages depend on."""
    fixed = 2 if a.layout is Layout.TILE else 1
    kept = order[-fixed:] == tuple(range(len(order)))[-fixed:]
    return order == tuple(range(len(order))) or (
        kept and all(d == axis or a.shape[axis] == 1 for axis, d in enumerate(order))
    )


def permute(
    input_tensor: Tensor,
    dims: Sequence[int],
    pad_value: float = 0.0,
    *,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return the tensor with its axes in the order `dims`. `pad_value` fills tile padding, which the emulator does not hold."""
    rank, given = len(input_tensor.shape), integers("permute", "dims", dims)
    need(len(given) == rank, "permute", f"dims {given} for {list(input_tensor.shape)}: {rank} are needed")
    order = tuple(axis_of("permute", d, rank) for d in given)
    need(len(set(order)) == rank, "permute", f"dims {given} names an axis twice")
    if _moves_nothing(input_tensor.spec, order):
        return to_memory_config(input_tensor, placed(memory_config, input_tensor.spec.memory_config))
    return _permuted("permute", input_tensor, order, memory_config)


@lru_cache(maxsize=4096, typed=True)  # typed: 1.0 is no axis
def _swapped(a: Spec, dim1: int, dim2: int, pad_value: float, on_host: bool) -> tuple[int, int]:
    """Return the two axes that transpose swaps, from 0; raises DeviceError for what it does not take."""
    rank = len(a.shape)
    first, second = (axis_of("transpose", d, rank) for d in (dim1, dim2))
    need(
        rank > 1 or a.layout is Layout.ROW_MAJOR,
        "transpose",
        f"{a!r} has one axis; 2 are needed in TILE layout",
    )
    need(
        pad_value == 0
        or a.layout is Layout.ROW_MAJOR
        or {first - rank, second - rank} not in ({-1, -2}, {-3, -4}),
        "transpose",
        f"pad_value {pad_value} with axes {dim1} and {dim2} in TILE layout; it must be 0",
    )
    emulated(
        first != second
        or rank <= 4
        or a.layout is Layout.TILE
        or a.memory_config.memory_layout not in _SPLIT_ROWS,
        "transpose",
        f"write shards of rows ({a!r}) for an axis swapped with itself; leave the call out",
    )
    emulated(
        rank > 1 or not a.memory_config.is_sharded(),
        "transpose",
        f"read shards of one axis ({a!r}); use to_memory_config",
    )
    need(
        not on_host or rank <= 4,
        "transpose",
        f"{a!r} is on the host; move it with from_torch(..., device=mesh)",
    )
    return first, second


def transpose(
    input_tensor: Tensor,
    dim1: int,
    dim2: int,
    pad_value: float = 0.0,
    *,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return the tensor with two axes swapped. `pad_value` fills tile padding, which the emulator does not hold."""
    a = input_tensor.spec
    first, second = _swapped(a, dim1, dim2, pad_value, input_tensor.device() is None)
    rank = len(a.shape)
    if a.layout is Layout.ROW_MAJOR and a.memory_config.memory_layout in _SPLIT_ROWS and rank <= 4:
        input_tensor = to_memory_config(input_tensor, L1_MEMORY_CONFIG)
        a = input_tensor.spec
    if first == second or a.padded_shape[first] == a.padded_shape[second] == 1:
        place = placed(memory_config, a.memory_config)
        if place == a.memory_config:
            return unchanged("transpose", input_tensor)
        alike = not (place.is_sharded() or a.memory_config.is_sharded())
        need(alike, "transpose", f"{a!r} to {place!r} without moving an axis; use to_memory_config")
        return to_memory_config(input_tensor, place)
    order = list(range(rank))
    order[first], order[second] = second, first
    return _permuted("transpose", input_tensor, tuple(order), memory_config)
