"""linear and minimal_matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, Values
from disagg_tt.device.emulator.types import DataType, MemoryConfig, WormholeComputeKernelConfig


@lru_cache(maxsize=4096)
def _plan(op: str, a: Spec, b: Spec, dtype: DataType | None, place: MemoryConfig) -> Spec:
    need_tile(op, input=a, weight=b)
    need(
        a.dtype.is_float and b.dtype.is_float,
        op,
        f"inputs are {a.dtype.value} and {b.dtype.value}; floats are needed",
    )
    need(len(b.shape) >= 2, op, f"weight {list(b.shape)} must have at least two axes")
    need(a.shape[-1] == b.shape[-2], op, f"inner sizes differ: {list(a.shape)} times {list(b.shape)}")
    need(all(d == 1 for d in b.shape[:-2]), op, f"weight {list(b.shape)} must have leading axes of 1")
    need(not place.is_sharded() or place.shard_spec is not None, op, f"output {place!r} needs a shard spec")
    padded = (*a.padded_shape[:-1], b.padded_shape[-1])
    return make_spec((*a.shape[:-1], b.shape[-1]), dtype or a.dtype, a.layout, place, padded)


# From how many rows, or weight elements a chip, on native bfloat16 beats float32 in spite of its higher cost a call.
MANY, LARGE = 8, 1 << 20


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


def _weight(values: Values) -> torch.Tensor:
    """Return a weight [1, 1, K, N] a chip as bfloat16 [chips, K, N], laid out by columns; converted once."""
    if values.memo is None:
        values.memo = {}
    if "bfloat16" not in values.memo:
        columns = values.data.flatten(0, 2).transpose(1, 2)  # type: ignore[union-attr]
        values.memo["bfloat16"] = columns.to(torch.bfloat16).contiguous().transpose(1, 2)
    return values.memo["bfloat16"]


def _multiply(a: Tensor, b: Tensor, spec: Spec) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the arithmetic of one product: exact products, float32 sums, one rounding to the output's dtype."""
    native = (
        spec.dtype is DataType.BFLOAT16
        and _exact_in_bfloat16(a.spec)
        and _exact_in_bfloat16(b.spec)
        and _multiplies_bfloat16()
    )
    large, weight = math.prod(b.shape) >= LARGE, b._values

    def compute(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if native and (large or rows.shape[1] >= MANY):
            result = torch.matmul(rows.to(torch.bfloat16), _weight(weight)).to(torch.float32)
        else:
            result = round_on_device(torch.matmul(rows, w.flatten(0, 2)), spec.dtype)
        return result.view(result.shape[0], *x.shape[1:-1], w.shape[-1])

    return compute


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return a @ b: [..., M, K] times [1, 1, K, N]."""
    spec = _plan("linear", input_tensor_a.spec, input_tensor_b.spec, dtype, placed(memory_config))
    return launch(
        "linear", spec, _multiply(input_tensor_a, input_tensor_b, spec), input_tensor_a, input_tensor_b
    )


def minimal_matmul(
    input_tensor: Tensor,
    weight_tensor: Tensor,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return input @ weight, blocked so that it fits L1 at any size; its result is placed as the input is."""
    op = "minimal_matmul"
    for name, tensor in (("input", input_tensor), ("weight", weight_tensor)):
        need(not tensor.is_sharded(), op, f"{name} {tensor.spec!r} must be interleaved")
        need_dtype(
            op, name, tensor.spec, DataType.BFLOAT16, DataType.BFLOAT8_B, DataType.BFLOAT4_B
        )  # float32 overflows L1
    place = placed(memory_config, input_tensor.spec.memory_config)
    spec = _plan(op, input_tensor.spec, weight_tensor.spec, dtype, place)
    return launch(op, spec, _multiply(input_tensor, weight_tensor, spec), input_tensor, weight_tensor)
