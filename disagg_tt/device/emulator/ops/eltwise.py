"""Element-wise ops, typecast, normalisation, argmax, plus_one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import (
    DataType,
    Layout,
    MemoryConfig,
    UnaryOpType,
    WormholeComputeKernelConfig,
)

_ACTIVATIONS: dict[UnaryOpType, Callable[[torch.Tensor], torch.Tensor]] = {
    UnaryOpType.SILU: F.silu,
    UnaryOpType.RELU: F.relu,
    UnaryOpType.GELU: F.gelu,
}


@lru_cache(maxsize=4096)
def _binary_plan(
    op: str, a: Spec, b: Spec, dtype: DataType | None, memory_config: MemoryConfig | None
) -> Spec:
    need_tile(op, first=a, second=b)
    need(a.dtype.is_float and b.dtype.is_float, op, f"{a.dtype.value} and {b.dtype.value}: floats are needed")
    # Rows broadcast silently on the device: a [1, 1, 1, W] input is spread over 32 rows. No program of ours means that.
    need(
        a.shape == b.shape, op, f"shapes {list(a.shape)} and {list(b.shape)} differ; equal shapes are needed"
    )
    return make_spec(
        a.shape, dtype or a.dtype, Layout.TILE, placed(memory_config, a.memory_config), a.padded_shape
    )


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both to the rows that are defined in both."""
    if a.shape[-2] != b.shape[-2]:
        rows = min(a.shape[-2], b.shape[-2])
        return a[..., :rows, :], b[..., :rows, :]
    return a, b


def add(input_tensor_a: Tensor, input_tensor_b: Tensor, *, dtype: DataType | None = None,
        memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return a + b."""
    spec = _binary_plan("add", input_tensor_a.spec, input_tensor_b.spec, dtype, memory_config)

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = _same_rows(a, b)
        return round_on_device(a + b, spec.dtype)

    return launch("add", spec, compute, input_tensor_a, input_tensor_b)


def mul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    input_tensor_a_activations: list[UnaryOpType] | tuple[UnaryOpType, ...] = (),
) -> Tensor:
    """Return activation(a) * b, the activation fused before the product."""
    spec = _binary_plan("mul", input_tensor_a.spec, input_tensor_b.spec, dtype, memory_config)
    activations = [_ACTIVATIONS[a] for a in input_tensor_a_activations]

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = _same_rows(a, b)
        for activation in activations:
            a = activation(a)
        return round_on_device(a.mul_(b) if activations and a.shape[0] >= b.shape[0] else a * b, spec.dtype)

    return launch("mul", spec, compute, input_tensor_a, input_tensor_b)


@lru_cache(maxsize=4096)
def _typecast_plan(a: Spec, dtype: DataType, memory_config: MemoryConfig | None) -> Spec:
    need(
        a.dtype.is_float and dtype.is_float,
        "typecast",
        f"{a.dtype.value} to {dtype.value}: only floats are supported",
    )
    return make_spec(a.shape, dtype, a.layout, placed(memory_config, a.memory_config), a.padded_shape)


def typecast(input_tensor: Tensor, dtype: DataType, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Return the tensor in another float dtype, rounded as the device packs it."""
    spec = _typecast_plan(input_tensor.spec, dtype, memory_config)
    return launch(
        "typecast",
        spec,
        lambda a: round_on_device(a.clone() if dtype is DataType.BFLOAT16 else a, dtype),
        input_tensor,
    )


@lru_cache(maxsize=4096)
def _norm_plan(a: Spec, weight: Spec, memory_config: MemoryConfig | None) -> Spec:
    op, width = "rms_norm", a.shape[-1]
    need_tile(op, input=a)
    need_dtype(op, "input", a, DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)
    need_dtype(op, "weight", weight, DataType.BFLOAT16)
    if weight.layout is Layout.ROW_MAJOR:
        need(
            weight.shape[-1] == 32 and weight.shape[-2] * 32 == width,
            op,
            f"ROW_MAJOR weight {list(weight.shape)} for width {width}; it must be folded to [1, 1, {width // 32}, 32]",
        )
    else:
        need(weight.shape[-1] == width, op, f"weight {list(weight.shape)} for width {width}")
    return make_spec(a.shape, a.dtype, Layout.TILE, placed(memory_config, a.memory_config), a.padded_shape)


def rms_norm(
    input_tensor: Tensor,
    *,
    epsilon: float = 1e-12,
    weight: Tensor,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight over the last axis; note ttnn's default epsilon."""
    spec = _norm_plan(input_tensor.spec, weight.spec, memory_config)

    def compute(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if w.shape[0] == 1:
            out = F.rms_norm(x, (width,), w.reshape(-1), epsilon)
        else:
            out = F.rms_norm(x, (width,), None, epsilon) * w.reshape(w.shape[0], 1, 1, 1, width)
        return round_on_device(out, spec.dtype)

    return launch("rms_norm", spec, compute, input_tensor, weight)


@lru_cache(maxsize=4096)
def _argmax_plan(a: Spec, dim: int, keepdim: bool) -> Spec:
    need_dtype("argmax", "input", a, DataType.BFLOAT16, DataType.FLOAT32)
    need(
        dim in (-1, len(a.shape) - 1),
        "argmax",
        f"dim {dim}; only the last axis of {list(a.shape)} is supported",
    )
    shape = (*a.shape[:-1], 1) if keepdim else a.shape[:-1]
    return make_spec(shape, DataType.UINT32, Layout.ROW_MAJOR)


def argmax(input_tensor: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return the index of each row's largest value, uint32 in ROW_MAJOR."""
    spec = _argmax_plan(input_tensor.spec, dim, keepdim)
    return launch("argmax", spec, lambda a: a.argmax(dim=-1, keepdim=keepdim), input_tensor)


def plus_one(input_tensor: Tensor, *, skip_negative_entries: bool = False) -> Tensor:
    """Add one to every entry in place, but not to negative ones when they are to be skipped."""
    need_dtype("plus_one", "input", input_tensor.spec, DataType.INT32, DataType.UINT32)
    need(
        input_tensor.layout is Layout.ROW_MAJOR, "plus_one", f"input {input_tensor.spec!r} must be ROW_MAJOR"
    )

    def compute(a: torch.Tensor) -> torch.Tensor:
        return a + (a >= 0) if skip_negative_entries else a + 1

    launch_in_place("plus_one", input_tensor, compute, input_tensor)
    return input_tensor


def copy(input_a: Tensor, input_b: Tensor) -> Tensor:
    """Copy the values of `input_a` into `input_b`, of the same shape, dtype and layout, in place; return `input_b`."""
    a, b = input_a.spec, input_b.spec
    same = (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)
    need(same, "copy", f"{a!r} into {b!r}; shape, dtype and layout must be the same")
    launch_in_place("copy", input_b, lambda values: values.clone(), input_a)
    return input_b
