"""Ops between the layouts: to_layout, tilize, untilize and their padded forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.ops.moves import (
    aligned_rows,
    integers,
    interleaved,
    moved,
    unchanged,
)
from disagg_tt.device.emulator.ops.place import copied, result_dtype, same_values
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec, tile_padded
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import TILE_SIZE, DataType, Layout, MemoryConfig


def needs_rows(op: str, a: Spec) -> DataType:
    """Check that `a`, in TILE layout, can be written as rows, and return the dtype of these rows."""
    need(
        a.dtype is not DataType.BFLOAT4_B,
        op,
        "bfloat4_b cannot be written as rows; use typecast to bfloat16 before it",
    )
    return DataType.BFLOAT16 if a.dtype is DataType.BFLOAT8_B else a.dtype


@lru_cache(maxsize=1024)
def _untilize_plan(op: str, a: Spec, shape: tuple[int, ...], memory_config: MemoryConfig | None) -> Spec:
    need_tile(op, input=a)
    dtype = needs_rows(op, a)
    emulated(
        not a.memory_config.is_sharded(),
        op,
        f"read shards ({a!r}), whose rows keep their padding; use sharded_to_interleaved before it",
    )
    interleaved(op, a, memory_config)
    return make_spec(shape, dtype, Layout.ROW_MAJOR, placed(memory_config, a.memory_config))


def untilize(
    input_tensor: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    use_multicore: bool = True,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensor in ROW_MAJOR layout, without padding; bfloat8_b becomes bfloat16."""
    leave_out("untilize", sub_core_grids=sub_core_grids)
    a = input_tensor.spec
    spec = _untilize_plan("untilize", a, a.shape, memory_config)
    need(
        len(a.shape) <= 4 or a.shape == a.padded_shape,
        "untilize",
        f"{a!r} has more than 4 axes and padding; use to_layout",
    )
    return launch("untilize", spec, same_values, input_tensor, as_held=True)


def untilize_with_unpadding(
    input_tensor: Tensor,
    output_tensor_end: Sequence[int],
    *,
    memory_config: MemoryConfig | None = None,
    use_multicore: bool = True,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the part up to and including the index `output_tensor_end`, in ROW_MAJOR layout."""
    op = "untilize_with_unpadding"
    leave_out(op, sub_core_grids=sub_core_grids)
    a, end = input_tensor.spec, integers(op, "output_tensor_end", output_tensor_end)
    need(len(end) == len(a.shape), op, f"end {end} for {list(a.shape)}: {len(a.shape)} indices are needed")
    inside = all(e < d for e, d in zip(end, a.shape, strict=True))
    need(inside, op, f"end {end} is past {list(a.shape)}, whose padding has no defined values")
    spec = _untilize_plan(op, a, tuple(e + 1 for e in end), memory_config)
    part = (slice(None), *(slice(e + 1) for e in end))
    return launch(op, spec, lambda values: whole(values, a)[part], input_tensor)


@lru_cache(maxsize=1024)
def _tilize_plan(
    op: str,
    a: Spec,
    padded: tuple[int, ...] | None,
    dtype: DataType | None,
    memory_config: MemoryConfig | None,
    may_pad: bool = True,
) -> Spec:
    """Return the spec in TILE layout, padded to `padded` (None: to whole tiles); of an op that `may_pad` or not."""
    need(a.layout is Layout.ROW_MAJOR, op, f"input {a!r} must be in ROW_MAJOR layout")
    padded = tile_padded(a.shape) if padded is None else padded
    pads = padded != a.shape
    need(
        a.dtype is not DataType.UINT8 or not (pads or may_pad),
        op,
        f"{list(a.shape)} in uint8 cannot be padded to tiles; allowed: floats, uint32, int32, uint16",
    )
    emulated(
        memory_config is not None or not (pads and a.memory_config.is_sharded()),
        op,
        f"write shards of its own choice for {a!r}, which is padded; pass a memory_config",
    )
    emulated(
        aligned_rows(a),
        op,
        f"read shards of {a!r}, whose rows are not whole 16 bytes; use to_memory_config before it",
    )
    made = result_dtype(op, a, dtype)
    return make_spec(a.shape, made, Layout.TILE, placed(memory_config, a.memory_config), padded)


def tilize(
    input_tensor: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    use_multicore: bool = True,
    use_low_perf: bool = False,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensor, whose last two axes must be whole tiles, in TILE layout."""
    leave_out("tilize", sub_core_grids=sub_core_grids)
    a = input_tensor.spec
    tiles = len(a.shape) > 1 and all(d % TILE_SIZE == 0 for d in a.shape[-2:])
    need(
        tiles,
        "tilize",
        f"{list(a.shape)} is not whole tiles of {TILE_SIZE}x{TILE_SIZE}; use tilize_with_zero_padding or to_layout",
    )
    on_device("tilize", input_tensor)
    return copied(
        "tilize", input_tensor, _tilize_plan("tilize", a, None, dtype, memory_config, may_pad=False)
    )


def tilize_with_zero_padding(
    input_tensor: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    output_dtype: DataType | None = None,
    use_multicore: bool = True,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensor in TILE layout, padded to whole tiles; one in TILE layout is returned as it is."""
    op = "tilize_with_zero_padding"
    leave_out(op, sub_core_grids=sub_core_grids)
    if input_tensor.layout is Layout.TILE:
        return unchanged(op, input_tensor)
    on_device(op, input_tensor)
    return copied(op, input_tensor, _tilize_plan(op, input_tensor.spec, None, output_dtype, memory_config))


def tilize_with_val_padding(
    input_tensor: Tensor,
    output_tensor_shape: Sequence[int],
    pad_value: float,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    use_multicore: bool = True,
    sub_core_grids: Any = None,
) -> Tensor:
    """Return the tensor in TILE layout with the padded shape `output_tensor_shape`.

    `pad_value` fills the padding, which the emulator does not hold. What is sharded or has more than
    4 axes is padded to whole tiles only, as ttnn does.
    """
    op = "tilize_with_val_padding"
    leave_out(op, sub_core_grids=sub_core_grids)
    if input_tensor.layout is Layout.TILE:
        return unchanged(op, input_tensor)
    on_device(op, input_tensor)
    a, padded = input_tensor.spec, integers(op, "output_tensor_shape", output_tensor_shape)
    fits = (
        len(padded) == len(a.shape) > 1
        and all(p >= d for p, d in zip(padded, a.shape, strict=True))
        and all(d % TILE_SIZE == 0 for d in padded[-2:])
    )
    need(fits, op, f"{list(a.shape)} to {list(padded)}: it must be at least as large, and whole tiles")
    if len(a.shape) > 4:
        padded = tile_padded(a.shape)
    elif placed(memory_config, a.memory_config).is_sharded():
        outer = padded[:-2] == a.shape[:-2]
        need(outer, op, f"{list(a.shape)} to {list(padded)} in shards; only the last two axes are padded")
        padded = tile_padded(a.shape)
    return copied(op, input_tensor, _tilize_plan(op, a, padded, dtype, memory_config))


def to_layout(
    tensor: Tensor,
    layout: Layout,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    sub_core_grids: Any = None,
    pad_value: float = 0.0,
) -> Tensor:
    """Return a host or device tensor in `layout`: padded to whole tiles, or without padding.

    A tensor in that layout is returned as it is, whatever the other arguments, as ttnn does.
    """
    op, a = "to_layout", tensor.spec
    if not isinstance(layout, Layout):
        raise TypeError(f"{op}: layout is {layout!r}; allowed: ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT")
    leave_out(op, sub_core_grids=sub_core_grids)
    if a.layout is layout:
        return unchanged(op, tensor)
    if tensor.device() is None:
        need(
            not a.dtype.is_block_float,
            op,
            f"{a.dtype.value} on the host has no ROW_MAJOR layout; read it with to_torch",
        )
        return moved(op, make_spec(a.shape, a.dtype, layout), same_values, tensor, as_held=True)
    if layout is Layout.TILE:
        may_pad = tile_padded(a.shape) != a.shape
        return copied(op, tensor, _tilize_plan(op, a, None, dtype, memory_config, may_pad))
    spec = _untilize_plan(op, a, a.shape, memory_config)
    need(
        dtype in (None, a.dtype, spec.dtype),
        op,
        f"{a.dtype.value} to rows of {'' if dtype is None else dtype.value}; rows keep the dtype; use typecast",
    )
    return launch(op, spec, same_values, tensor, as_held=True)
