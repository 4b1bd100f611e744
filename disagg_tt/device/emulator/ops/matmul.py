"""matmul, linear and minimal_matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.cores import CoreGrid
from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.functions import Function, UnaryOpType, UnaryWithParam, fused, gelu_tanh
from disagg_tt.device.emulator.ops.matmul_config import MatmulProgramConfig, MinimalMatmulConfig
from disagg_tt.device.emulator.ops.matmul_plan import as_matrix, minimal_plan, product_plan
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, placed
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, on_device
from disagg_tt.device.emulator.types import DataType, MemoryConfig, WormholeComputeKernelConfig

Activation = str | UnaryOpType | UnaryWithParam
_NAMED: dict[str, Function] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_approx": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sigmoid_approx": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "recip": torch.reciprocal,
    "log": torch.log,
    "abs": torch.abs,
    "square": torch.square,
}


def _activation(op: str, given: Activation | None) -> Function | None:
    if given is None:
        return None
    if isinstance(given, str):
        need(given in _NAMED, op, f"activation {given!r}; allowed: {', '.join(_NAMED)}")
        return _NAMED[given]
    (function,) = fused(op, [given])
    return function


# ---------------------------------------------------------------- arithmetic


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively, into float32 sums: some four times faster than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _exact_in_bfloat16(spec: Spec) -> bool:
    return spec.dtype is DataType.BFLOAT16 or spec.dtype.is_block_float  # at most 8 significant bits


def _by_columns(values: Values) -> torch.Tensor:
    """Return a weight [.., K, N] a chip as bfloat16 [chips, K, N], which is laid out by columns from now on."""
    held = values.bfloat16()
    assert held is not None
    weight = held.reshape(held.shape[0], *held.shape[-2:])
    if weight.stride(1) != 1:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        values.narrow = weight.view(held.shape)
    return weight


@lru_cache(maxsize=4096)
def _native(a: Spec, b: Spec, spec: Spec) -> bool:
    """Return whether a product by the weight `b` is computed in bfloat16.

    However few rows it has, though float32 is then faster: the two are summed in different orders, and a token's values
    must not depend on how many others are computed beside it.
    """
    exact = all(_exact_in_bfloat16(x) for x in (a, b))
    return exact and spec.dtype is DataType.BFLOAT16 and _multiplies_bfloat16()


def _multiply(a: Spec, b: Tensor, spec: Spec) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the arithmetic of one product by a weight: exact products, float32 sums, one rounding to the dtype.

    Its inputs are as they are held: float32 or bfloat16.
    """
    native, values = _native(a, b.spec, spec), b._values

    def compute(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        rows = x.flatten(1, -2)
        if native:
            result = torch.matmul(rows.to(torch.bfloat16), _by_columns(values)).to(torch.float32)
        else:
            if w.dtype is not torch.float32:
                w = values.data  # type: ignore[assignment]  # and keeps them so
            if rows.dtype is not torch.float32:
                rows = rows.to(torch.float32)
            result = torch.matmul(rows, w.view(w.shape[0], *w.shape[-2:]))
            result = round_on_device(result, spec.dtype)
        return result.view(result.shape[0], *shape[1:-1], result.shape[2])

    return compute


@lru_cache(maxsize=4096)
def _by_weight(a: Spec, b: Spec, turns: tuple[bool, bool]) -> bool:
    """Whether a @ b multiplies all rows of `a` by one matrix, as they are."""
    matrices = len(a.shape) >= len(b.shape) > 1 and math.prod(b.shape[:-2]) == 1
    return matrices and not any(turns)


def _general(
    a: Spec, b: Spec, spec: Spec, turns: tuple[bool, bool], function: Function | None
) -> Callable[..., torch.Tensor]:
    """Return the arithmetic of any product, with bias and activation, rounded once to the output's dtype."""

    def matrix(x: torch.Tensor, shape: tuple[int, ...], turned: bool, column: bool) -> torch.Tensor:
        x = x.reshape(x.shape[0], *as_matrix(shape, False, column))
        return x.transpose(-1, -2) if turned else x

    def compute(x: torch.Tensor, w: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        x, w = matrix(x, a.shape, turns[0], False), matrix(w, b.shape, turns[1], True)
        axes = max(x.dim(), w.dim())
        x, w = (t.view(t.shape[0], *(1,) * (axes - t.dim()), *t.shape[1:]) for t in (x, w))
        result = torch.matmul(x, w)
        result = result.reshape(result.shape[0], *spec.shape)
        if bias:
            extra = bias[0]
            lacking = result.dim() - extra.dim()
            result = result + extra.view(extra.shape[0], *(1,) * lacking, *extra.shape[1:])
        if function is not None:
            result = function(result)
        return round_on_device(result, spec.dtype)

    return compute


def _run(
    op: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    turns: tuple[bool, bool],
    memory_config: MemoryConfig | None,
    dtype: DataType | None,
    config: MatmulProgramConfig | None,
    activation: Activation | None,
    core_grid: CoreGrid | None,
) -> Tensor:
    inputs = (a, b) if bias is None else (a, b, bias)
    grid = on_device(op, *inputs).memory.grid
    need(core_grid is None or config is None, op, "core_grid and program_config; pass one of them")
    function = None if activation is None else _activation(op, activation)
    added = None if bias is None else bias.spec
    options = (config, core_grid is not None, function is not None)
    spec = product_plan(op, a.spec, b.spec, added, turns, dtype, placed(memory_config), *options, grid)
    if bias is None and function is None and _by_weight(a.spec, b.spec, turns):
        return launch(op, spec, _multiply(a.spec, b, spec), a, b, as_held=True)
    return launch(op, spec, _general(a.spec, b.spec, spec, turns, function), *inputs)


def matmul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    activation: Activation | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
    output_tile: object = None,
    optional_output_tensor: Tensor | None = None,
    global_cb: object = None,
    sub_device_id: object = None,
) -> Tensor:
    """Return a @ b, of a's dtype unless `dtype` is given, in DRAM unless `memory_config` is.

    The batch axes of b are all 1, or the same as a's, or a's are all 1. Vectors are rows on the left, columns on the right.
    """
    op = "matmul"
    leave_out(
        op,
        output_tile=output_tile,
        optional_output_tensor=optional_output_tensor,
        global_cb=global_cb,
        sub_device_id=sub_device_id,
    )
    turns = (transpose_a, transpose_b)
    return _run(
        op,
        input_tensor_a,
        input_tensor_b,
        None,
        turns,
        memory_config,
        dtype,
        program_config,
        activation,
        core_grid,
    )


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    bias: Tensor | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    activation: Activation | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
    output_tile: object = None,
    optional_output_tensor: Tensor | None = None,
    global_cb: object = None,
    sub_device_id: object = None,
    in0_column_offset: int | None = None,
) -> Tensor:
    """Return activation(a @ b + bias), as matmul; the bias is broadcast as torch does, and all is rounded once."""
    op = "linear"
    leave_out(
        op,
        output_tile=output_tile,
        optional_output_tensor=optional_output_tensor,
        global_cb=global_cb,
        sub_device_id=sub_device_id,
        in0_column_offset=in0_column_offset,
    )
    turns = (transpose_a, transpose_b)
    return _run(
        op,
        input_tensor_a,
        input_tensor_b,
        bias,
        turns,
        memory_config,
        dtype,
        program_config,
        activation,
        core_grid,
    )


def minimal_matmul(
    input_tensor: Tensor,
    weight_tensor: Tensor,
    *,
    bias_tensor: Tensor | None = None,
    fused_activation: UnaryOpType | UnaryWithParam | None = None,
    config: MinimalMatmulConfig | None = None,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    fuse_swiglu: bool = False,
) -> Tensor:
    """Return activation(input @ weight + bias), blocked so that it fits L1 at any size, placed as the input is."""
    op = "minimal_matmul"
    leave_out(op, fuse_swiglu=fuse_swiglu)
    emulated(isinstance(input_tensor, Tensor), op, "join several inputs; use concat")
    inputs = (
        (input_tensor, weight_tensor) if bias_tensor is None else (input_tensor, weight_tensor, bias_tensor)
    )
    on_device(op, *inputs)
    a, b = input_tensor.spec, weight_tensor.spec
    bias = None if bias_tensor is None else bias_tensor.spec
    spec = minimal_plan(a, b, bias, dtype, placed(memory_config, a.memory_config))
    function = _activation(op, fused_activation)
    if bias_tensor is None and function is None:
        product = _multiply(a, weight_tensor, spec)
        return launch(op, spec, product, input_tensor, weight_tensor, as_held=True)
    return launch(op, spec, _general(a, b, spec, (False, False), function), *inputs)
