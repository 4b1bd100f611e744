"""Reductions over one axis, several or all: sum, mean, max, min, std, var."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import emulated, need, need_dtype
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    CoreRangeSet,
    DataType,
    Layout,
    MemoryConfig,
    WormholeComputeKernelConfig,
)

_FLOATS = (DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)
_ALLOWED = {
    "sum": (*_FLOATS, DataType.INT32, DataType.UINT32),
    "mean": _FLOATS,
    "max": (*_FLOATS, DataType.INT32, DataType.UINT32),
    "min": (*_FLOATS, DataType.INT32, DataType.UINT32),
    "std": _FLOATS,
    "var": _FLOATS,
}


def reduced_spec(
    op: str,
    a: Spec,
    axes: tuple[int, ...],
    keepdim: bool,
    dtype: DataType,
    layout: Layout,
    place: MemoryConfig,
) -> Spec:
    """Return the spec of `a` with `axes` reduced to 1, or dropped; a scalar takes a whole tile, or one element in ROW_MAJOR."""
    need(isinstance(keepdim, bool), op, f"keepdim {keepdim!r} must be a bool")
    whole_tensors = not a.memory_config.is_sharded() and not place.is_sharded()
    emulated(whole_tensors, op, "reduce from or into shards; use to_memory_config before or after")
    shape = [1 if i in axes else d for i, d in enumerate(a.shape) if keepdim or i not in axes]
    scalar = (TILE_SIZE, TILE_SIZE) if layout is Layout.TILE else (1,)
    return make_spec(shape, dtype, layout, place, None if shape else scalar)


def _stays_row_major(op: str, a: Spec, axes: tuple[int, ...], scaled: bool) -> bool:
    """Whether ttnn's kernels for this reduction of a ROW_MAJOR tensor work on rows; others tilize, and so is the result."""
    rank = len(a.shape)
    if op not in ("sum", "mean") or a.dtype not in (DataType.BFLOAT16, DataType.FLOAT32):
        return False
    if op == "sum" and a.dtype is DataType.BFLOAT16 and not scaled and axes[0] < rank - 2:
        return False  # leading axes of bfloat16 are summed tile by tile
    return axes != (rank - 2, rank - 1)


@lru_cache(maxsize=4096)
def _plan(
    op: str,
    a: Spec,
    dim: int | tuple[int, ...] | None,
    keepdim: bool,
    memory_config: MemoryConfig | None,
    scaled: bool,
    output_layout: Layout | None,
) -> tuple[Spec, tuple[int, ...]]:
    """Return the output's spec and the axes to reduce, sorted."""
    rank = len(a.shape)
    given = (dim,) if isinstance(dim, int) else dim or range(rank)
    need(
        all(isinstance(d, int) and -rank <= d < rank for d in given),
        op,
        f"dim {dim} of {list(a.shape)}; it must be from {-rank} to {rank - 1}",
    )
    axes = tuple(sorted({d % rank for d in given}))
    need(len(axes) == len(given), op, f"dim {dim} of {list(a.shape)} names an axis twice")
    need_dtype(op, "input", a, *_ALLOWED[op])
    emulated(
        op != "min" or a.dtype is not DataType.UINT32 or axes[-1] >= rank - 2,
        op,
        f"take uint32 over axes {list(axes)} of {list(a.shape)}, which ttnn does for some sizes only; use int32",
    )
    layout = Layout.TILE
    if a.layout is Layout.ROW_MAJOR and _stays_row_major(op, a, axes, scaled):
        layout = Layout.ROW_MAJOR
    block = a.dtype.is_block_float and output_layout is Layout.ROW_MAJOR
    need(not block, op, f"output_layout ROW_MAJOR of {a.dtype.value}, which exists in TILE layout only")
    place = memory_config or a.memory_config
    return reduced_spec(op, a, axes, keepdim, a.dtype, output_layout or layout, place), axes


def _reduce(
    op: str,
    arithmetic: Callable[[torch.Tensor, list[int], bool], torch.Tensor],
    x: Tensor,
    dim: int | Sequence[int] | None,
    keepdim: bool,
    memory_config: MemoryConfig | None,
    scalar: float,
    output_layout: Layout | None = None,
) -> Tensor:
    source = x.spec
    need(isinstance(scalar, (int, float)), op, f"scalar {scalar!r} must be a number")
    which = dim if dim is None or isinstance(dim, int) else tuple(dim)
    spec, axes = _plan(op, source, which, keepdim, memory_config, scalar != 1.0, output_layout)
    over = [axis + 1 for axis in axes]
    emulated(
        spec.dtype.is_float or scalar == int(scalar), op, f"scale integers by {scalar}; use a whole number"
    )

    def compute(values: torch.Tensor) -> torch.Tensor:
        values = whole(values, source)
        if not spec.dtype.is_float:
            return _wrapped(arithmetic(values, over, keepdim) * int(scalar), spec.dtype)
        if spec.dtype is DataType.FLOAT32:
            values = values.double()
        out = arithmetic(values, over, keepdim)
        out = out if scalar == 1.0 else out * scalar
        out = out.where(
            out == out, math.nan
        )  # vectorised max gives NaNs of which rounding would make numbers
        return round_on_device(out.to(torch.float32), spec.dtype)

    return launch(op, spec, compute, x)


def _wrapped(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return int64 `values` as 32 bits hold them."""
    low = -(1 << 31) if dtype is DataType.INT32 else 0
    return (values - low).bitwise_and(0xFFFFFFFF) + low


def sum(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool | None = None,
    sub_core_grids: CoreRangeSet | None = None,
    fast_and_approximate_mode: bool = False,
    output_layout: Layout | None = None,
) -> Tensor:
    """Return scalar * the sum over `dim`: an axis, several, or None for all; integers wrap at 32 bits.

    The result has the input's dtype and is in TILE layout; it stays in ROW_MAJOR where ttnn's does.
    """
    return _reduce("sum", torch.Tensor.sum, input_tensor, dim, keepdim, memory_config, scalar, output_layout)


def mean(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool | None = None,
    sub_core_grids: CoreRangeSet | None = None,
    fast_and_approximate_mode: bool = False,
    output_layout: Layout | None = None,
) -> Tensor:
    """Return scalar * the mean over `dim`; the rest is as for sum, floats only."""
    return _reduce(
        "mean", torch.Tensor.mean, input_tensor, dim, keepdim, memory_config, scalar, output_layout
    )


def max(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool | None = None,
    sub_core_grids: CoreRangeSet | None = None,
    fast_and_approximate_mode: bool = False,
) -> Tensor:
    """Return scalar * the largest value over `dim`, in TILE layout; NaN where there is one."""
    return _reduce("max", torch.Tensor.amax, input_tensor, dim, keepdim, memory_config, scalar)


def min(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool | None = None,
    sub_core_grids: CoreRangeSet | None = None,
    fast_and_approximate_mode: bool = False,
) -> Tensor:
    """Return scalar * the smallest value over `dim`, in TILE layout; NaN where there is one."""
    fast = fast_and_approximate_mode and input_tensor.dtype is DataType.FLOAT32
    need(not fast, "min", "fast_and_approximate_mode of float32; leave it out")
    return _reduce("min", torch.Tensor.amin, input_tensor, dim, keepdim, memory_config, scalar)


def std(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool = True,
    sub_core_grids: CoreRangeSet | None = None,
) -> Tensor:
    """Return the standard deviation over `dim` of scalar * input, with one less than the count when `correction`."""
    spread = _spread(torch.Tensor.std, correction)
    return _reduce("std", spread, input_tensor, dim, keepdim, memory_config, abs(scalar))


def var(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    scalar: float = 1.0,
    correction: bool = True,
    sub_core_grids: CoreRangeSet | None = None,
) -> Tensor:
    """Return the variance over `dim` of scalar * input, with one less than the count when `correction`."""
    spread = _spread(torch.Tensor.var, correction)
    return _reduce("var", spread, input_tensor, dim, keepdim, memory_config, scalar * scalar)


def _spread(
    arithmetic: Callable[..., torch.Tensor], correction: bool
) -> Callable[[torch.Tensor, list[int], bool], torch.Tensor]:
    return lambda values, over, keepdim: arithmetic(values, over, correction=int(correction), keepdim=keepdim)
