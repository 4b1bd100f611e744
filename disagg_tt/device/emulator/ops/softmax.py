"""softmax over any axis."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig, WormholeComputeKernelConfig


@lru_cache(maxsize=4096)
def _plan(a: Spec, dim: int, memory_config: MemoryConfig | None) -> Spec:
    op, rank = "softmax", len(a.shape)
    need(-rank <= dim < rank, op, f"dim {dim} of {list(a.shape)}; it must be from {-rank} to {rank - 1}")
    if not (rank == 4 and dim % rank == 3):  # which the device tilizes on its way
        need_tile(op, input=a)
    need_dtype(op, "input", a, DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)
    place = placed(memory_config, a.memory_config)
    spec = make_spec(a.shape, a.dtype, Layout.TILE, place)
    width, padded = spec.shape[-1], spec.padded_shape[-1]
    shard = place.shard_spec
    need(
        width == padded or shard is None or shard.shape[1] == padded,
        op,
        f"output {place!r} of width {width}, which is padded to {padded}; shards must then be {padded} wide",
    )
    return spec


def softmax(
    input_tensor: Tensor,
    dim: int = -1,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    numeric_stable: bool = True,
) -> Tensor:
    """Return exp(x) / sum(exp(x)) along `dim`, the largest value subtracted first whether numeric_stable or not."""
    source = input_tensor.spec
    spec = _plan(source, dim, memory_config)
    axis = dim % len(source.shape) + 1
    exact = torch.float64 if spec.dtype is DataType.FLOAT32 else torch.float32

    def compute(x: torch.Tensor) -> torch.Tensor:
        if axis < x.dim() - 1 or x.shape[-1] != source.shape[-1]:
            x = whole(x, source)  # a prefix of whole rows does for the last axis only
        out = x.softmax(axis, exact).to(torch.float32)
        return round_on_device(
            out.where(out == out, math.nan), spec.dtype
        )  # one NaN, whose bits round to itself

    return launch("softmax", spec, compute, input_tensor)
