"""linear and minimal_matmul."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_tile, placed
from disagg_tt.device.emulator.tensor import Tensor, launch
from disagg_tt.device.emulator.types import (
    DataType,
    MemoryConfig,
    Spec,
    WormholeComputeKernelConfig,
    make_spec,
)


@lru_cache(maxsize=4096)
def _plan(op: str, a: Spec, b: Spec, dtype: DataType | None, memory_config: MemoryConfig | None) -> Spec:
    need_tile(op, input=a, weight=b)
    need(
        a.dtype.is_float and b.dtype.is_float,
        op,
        f"inputs are {a.dtype.value} and {b.dtype.value}; floats are needed",
    )
    need(len(b.shape) >= 2, op, f"weight {list(b.shape)} must have at least two axes")
    need(a.shape[-1] == b.shape[-2], op, f"inner sizes differ: {list(a.shape)} times {list(b.shape)}")
    need(all(d == 1 for d in b.shape[:-2]), op, f"weight {list(b.shape)} must have leading axes of 1")
    if memory_config is not None and memory_config.is_sharded():
        need(memory_config.shard_spec is not None, op, "a sharded output needs a shard spec")
    padded = (*a.padded_shape[:-1], b.padded_shape[-1])
    return make_spec((*a.shape[:-1], b.shape[-1]), dtype or a.dtype, a.layout, placed(memory_config), padded)


def _multiply(dtype: DataType) -> Any:
    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = a.reshape(a.shape[0], -1, a.shape[-1])
        result = torch.matmul(rows, b.reshape(b.shape[0], b.shape[-2], b.shape[-1]))
        return round_on_device(result, dtype).view(result.shape[0], *a.shape[1:-1], b.shape[-1])

    return compute


_MULTIPLY = {dtype: _multiply(dtype) for dtype in DataType}


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return a @ b: [..., M, K] times [1, 1, K, N]."""
    spec = _plan("linear", input_tensor_a.spec, input_tensor_b.spec, dtype, memory_config)
    return launch("linear", spec, _MULTIPLY[spec.dtype], input_tensor_a, input_tensor_b)


def minimal_matmul(
    input_tensor: Tensor,
    weight_tensor: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return input @ weight, blocked so that it fits L1 at any size."""
    for name, tensor in (("input", input_tensor), ("weight", weight_tensor)):
        need(not tensor.is_sharded(), "minimal_matmul", f"{name} {tensor.spec!r} must be interleaved")
    spec = _plan("minimal_matmul", input_tensor.spec, weight_tensor.spec, dtype, memory_config)
    return launch("minimal_matmul", spec, _MULTIPLY[spec.dtype], input_tensor, weight_tensor)
