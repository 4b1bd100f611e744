"""Ops that move values without changing them: embedding, reshape, transpose, slice, layouts, memory configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch, view
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec, tile_padded
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import TILE_SIZE, DataType, Layout, MemoryConfig
from disagg_tt.errors import DeviceError


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


@lru_cache(maxsize=1024)
def _embedding_plan(ids: Spec, table: Spec, layout: Layout, memory_config: MemoryConfig | None) -> Spec:
    op = "embedding"
    need_dtype(op, "ids", ids, DataType.UINT32)
    need_dtype(op, "table", table, DataType.BFLOAT16)
    need(table.layout is Layout.ROW_MAJOR, op, f"table {table!r} must be in ROW_MAJOR layout")
    need(ids.layout is Layout.ROW_MAJOR, op, f"ids {ids!r} must be in ROW_MAJOR layout")
    need(
        len(ids.shape) >= 2 and math.prod(ids.shape[1:-1]) == 1,
        op,
        f"ids {list(ids.shape)} must be [batch, 1, 1, length] or [batch, length]",
    )
    need(all(d == 1 for d in table.shape[:-2]), op, f"table {list(table.shape)} must have leading axes of 1")
    return make_spec(
        (ids.shape[0], ids.shape[-1], table.shape[-1]), table.dtype, layout, placed(memory_config)
    )


def embedding(ids: Tensor, table: Tensor, *, layout: Layout = Layout.ROW_MAJOR,
              memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return table rows [batch, length, width]; ids of undefined rows give undefined rows."""
    spec = _embedding_plan(ids.spec, table.spec, layout, memory_config)
    size = math.prod(table.shape[:-1])

    def compute(i: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        i = i.reshape(i.shape[0], -1)
        low, high = (int(x) for x in i.aminmax()) if i.numel() else (0, 0)
        if low < -1 or high >= size:
            raise DeviceError(f"embedding: ids reach from {low} to {high}; the table has rows 0..{size - 1}")
        rows = rows.reshape(rows.shape[0], size, -1)
        if i.shape[0] == 1:
            gathered = rows[:, i[0].clamp(min=0)]
        else:
            gathered = torch.stack([rows[c % rows.shape[0], i[c].clamp(min=0)] for c in range(i.shape[0])])
        if low < 0:
            gathered.masked_fill_((i < 0)[..., None], float("nan"))
        return gathered.view(gathered.shape[0], spec.shape[0], -1, spec.shape[2])

    return launch("embedding", spec, compute, ids, table)


@lru_cache(maxsize=4096)
def _reshape_plan(a: Spec, shape: tuple[int, ...], padded: tuple[int, ...] | None) -> tuple[Spec, bool]:
    """Return the new spec, and whether the new tensor is a view of the old one's memory, as ttnn documents."""
    op = "reshape"
    if padded is None:
        need(
            math.prod(shape) == math.prod(a.shape),
            op,
            f"{list(a.shape)} to {list(shape)}: the element counts differ",
        )
    else:
        need(
            math.prod(padded) == math.prod(a.padded_shape) and a.shape[-1] == shape[-1],
            op,
            f"{list(a.padded_shape)} to {list(shape)} padded to {list(padded)}: padded counts or widths differ",
        )
        need(
            math.prod(a.shape[:-2]) == math.prod(shape[:-2]) == 1,
            op,
            f"{list(a.shape)} to {list(shape)} with padding: only axes of 1 before the last two are emulated",
        )
    whole_tiles = a.shape[-2:-1] == shape[-2:-1] or (a.shape[-2] % TILE_SIZE == shape[-2] % TILE_SIZE == 0)
    is_view = padded is not None or (
        a.shape[-1] == shape[-1] and (a.layout is Layout.ROW_MAJOR or whole_tiles)
    )
    if padded is None and a.layout is Layout.TILE:
        padded = tile_padded(shape)
    return make_spec(shape, a.dtype, a.layout, a.memory_config, padded), is_view


def reshape(input_tensor: Tensor, shape: Sequence[int], padded_shape: Sequence[int] | None = None) -> Tensor:
    """Return the same values in another shape. With `padded_shape`, rows move between the logical part and padding."""
    spec, is_view = _reshape_plan(
        input_tensor.spec, tuple(shape), None if padded_shape is None else tuple(padded_shape)
    )
    before = input_tensor.spec

    def compute(a: torch.Tensor) -> torch.Tensor:
        count = math.prod(spec.shape)
        flat = a.reshape(a.shape[0], -1)[:, :count]
        if flat.shape[1] == count:
            return flat.reshape(flat.shape[0], *spec.shape)
        # A defined prefix stays one: all axes before the first longer than 1 keep, that one shrinks.
        axis = next((i for i, d in enumerate(spec.shape) if d > 1), 0)
        inner = math.prod(spec.shape[axis + 1 :])
        if flat.shape[1] % inner == 0:
            return flat.reshape(flat.shape[0], *spec.shape[:axis], -1, *spec.shape[axis + 1 :])
        return whole(a, before).reshape(a.shape[0], *spec.shape)

    return (view if is_view else launch)("reshape", spec, compute, input_tensor)


def unsqueeze_to_4D(tensor: Tensor) -> Tensor:
    """Return the tensor with leading axes of 1 added up to rank 4."""
    need(len(tensor.shape) <= 4, "unsqueeze_to_4D", f"{list(tensor.shape)} has more than 4 axes")
    return reshape(tensor, (1,) * (4 - len(tensor.shape)) + tuple(tensor.shape))


@lru_cache(maxsize=4096)
def _transpose_plan(a: Spec, dim1: int, dim2: int, memory_config: MemoryConfig | None) -> Spec:
    shape = list(a.shape)
    shape[dim1], shape[dim2] = shape[dim2], shape[dim1]
    return make_spec(shape, a.dtype, a.layout, placed(memory_config, a.memory_config))


def transpose(
    input_tensor: Tensor, dim1: int, dim2: int, *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Return the tensor with two axes swapped."""
    rank = len(input_tensor.shape)
    need(
        all(-rank <= d < rank for d in (dim1, dim2)),
        "transpose",
        f"axes {dim1} and {dim2} of {list(input_tensor.shape)}; they must be from {-rank} to {rank - 1}",
    )
    first, second = dim1 % rank, dim2 % rank
    spec = _transpose_plan(input_tensor.spec, first, second, memory_config)
    source = input_tensor.spec
    if first == second:
        return view("transpose", source, _same, input_tensor)
    return launch(
        "transpose", spec, lambda a: whole(a, source).transpose(first + 1, second + 1), input_tensor
    )


@lru_cache(maxsize=4096)
def _slice_plan(
    a: Spec, start: tuple[int, ...], end: tuple[int, ...], memory_config: MemoryConfig | None
) -> Spec:
    op = "slice"
    need(
        len(start) == len(end) == len(a.shape),
        op,
        f"start {start} and end {end} must have {len(a.shape)} numbers",
    )
    for axis, (low, high, size) in enumerate(zip(start, end, a.shape, strict=True)):
        need(0 <= low < high <= size, op, f"[{low}:{high}] on axis {axis} of size {size}")
    if a.layout is Layout.TILE and a.dtype.is_block_float:
        aligned = start[-1] % TILE_SIZE == 0 and start[-2] % TILE_SIZE == 0
        need(aligned, op, f"start {start} of a {a.dtype.value} tensor must be on a tile edge")
    shape = [high - low for low, high in zip(start, end, strict=True)]
    return make_spec(shape, a.dtype, a.layout, placed(memory_config, a.memory_config))


def slice(input_tensor: Tensor, slice_start: Sequence[int], slice_end: Sequence[int], *,
          memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return the part from `slice_start` to before `slice_end`, step 1."""
    start, end = tuple(slice_start), tuple(slice_end)
    spec = _slice_plan(input_tensor.spec, start, end, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        for axis, (low, high) in enumerate(zip(start, end, strict=True)):
            defined = a.shape[axis + 1]
            a = a.narrow(axis + 1, min(low, defined), max(min(high, defined) - low, 0))
        return a

    return (view if spec is input_tensor.spec else launch)("slice", spec, compute, input_tensor)


@lru_cache(maxsize=1024)
def _untilize_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    need_tile("untilize", input=a)
    dtype = DataType.BFLOAT16 if a.dtype.is_block_float else a.dtype
    return make_spec(a.shape, dtype, Layout.ROW_MAJOR, placed(memory_config, a.memory_config))


def untilize(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Return the tensor in ROW_MAJOR layout."""
    return launch("untilize", _untilize_plan(input_tensor.spec, memory_config), _same, input_tensor)


def to_memory_config(tensor: Tensor, memory_config: MemoryConfig) -> Tensor:
    """Return the tensor placed as `memory_config` says."""
    spec = _move_plan(tensor.spec, memory_config)
    if spec is tensor.spec:
        return view("to_memory_config", spec, _same, tensor)
    return launch("to_memory_config", spec, _same, tensor)


def interleaved_to_sharded(input_tensor: Tensor, memory_config: MemoryConfig) -> Tensor:
    """Return an interleaved tensor sharded over cores."""
    need(not input_tensor.is_sharded(), "interleaved_to_sharded", f"{input_tensor.spec!r} is already sharded")
    need(memory_config.is_sharded(), "interleaved_to_sharded", f"output {memory_config!r} must be sharded")
    return launch("interleaved_to_sharded", _move_plan(input_tensor.spec, memory_config), _same, input_tensor)


@lru_cache(maxsize=4096)
def _move_plan(a: Spec, memory_config: MemoryConfig) -> Spec:
    return make_spec(a.shape, a.dtype, a.layout, memory_config, a.padded_shape)
