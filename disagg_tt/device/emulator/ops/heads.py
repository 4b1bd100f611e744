"""Splitting the q, k, v projection into heads, and joining attention's heads."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    BufferType,
    CoreCoord,
    CoreRangeSet,
    DataType,
    Layout,
    MemoryConfig,
    ShardSpec,
    TensorMemoryLayout,
    num_cores_to_corerangeset,
)

BF16 = DataType.BFLOAT16


def _on_cores(
    cores: int, height: int, width: int, layout: TensorMemoryLayout, grid: CoreCoord
) -> MemoryConfig:
    shard = ShardSpec(num_cores_to_corerangeset(cores, grid, True), (height, width))
    return MemoryConfig(layout, BufferType.L1, shard)


# ---------------------------------------------------------------- heads


@lru_cache(maxsize=1024)
def _split_plan(a: Spec, heads: int, kv_heads: int, memory_config: MemoryConfig | None) -> tuple[Spec, Spec]:
    op = "nlp_create_qkv_heads"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, DataType.FLOAT32, DataType.BFLOAT8_B)
    parts = heads + 2 * kv_heads
    need(
        len(a.shape) == 4 and a.shape[1] == 1, op, f"input {list(a.shape)} must be [batch, 1, tokens, width]"
    )
    need(
        a.shape[-1] % parts == 0,
        op,
        f"width {a.shape[-1]} for {heads} q and 2 x {kv_heads} kv heads; it must be a multiple of {parts}",
    )
    dim, place = a.shape[-1] // parts, placed(memory_config, a.memory_config)
    need(dim % TILE_SIZE == 0, op, f"head_dim {dim}; it must be a multiple of {TILE_SIZE}")
    q = make_spec((a.shape[0], heads, a.shape[2], dim), a.dtype, Layout.TILE, place)
    kv = make_spec((a.shape[0], kv_heads, a.shape[2], dim), a.dtype, Layout.TILE, place)
    return q, kv


def nlp_create_qkv_heads(
    input: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    transpose_k_heads: bool = True,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [1, 1, S, width] into q [1, heads, S, D] and k, v [1, kv_heads, S, D]."""
    kv_heads = num_kv_heads or num_heads
    need(not transpose_k_heads, "nlp_create_qkv_heads", "transpose_k_heads=True is not emulated; pass False")
    q, kv = _split_plan(input.spec, num_heads, kv_heads, memory_config)

    def part(name: str, spec: Spec, first: int) -> Tensor:
        heads, dim = spec.shape[1], spec.shape[3]

        def compute(a: torch.Tensor) -> torch.Tensor:
            columns = a[..., first * dim : (first + heads) * dim]
            return columns.reshape(a.shape[0], a.shape[1], a.shape[3], heads, dim).transpose(2, 3)

        return launch(name, spec, compute, input)

    name = "nlp_create_qkv_heads"
    return part(name, q, 0), part(name, kv, num_heads), part(name, kv, num_heads + kv_heads)


@lru_cache(maxsize=1024)
def _split_decode_plan(a: Spec, heads: int, kv_heads: int, grid: CoreCoord) -> tuple[Spec, Spec]:
    op = "nlp_create_qkv_heads_decode"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, DataType.FLOAT32)
    batch = a.shape[2]
    need(
        a.shape[:2] == (1, 1) and 1 <= batch <= 32,
        op,
        f"input {list(a.shape)} must be [1, 1, batch, width], batch 1..32",
    )
    need(heads <= TILE_SIZE, op, f"{heads} heads on a chip; at most {TILE_SIZE}")
    need(kv_heads <= heads, op, f"{kv_heads} kv heads for {heads} q heads; at most as many")
    dim = a.shape[-1] // (heads + 2 * kv_heads)
    need(
        dim * (heads + 2 * kv_heads) == a.shape[-1] and dim % TILE_SIZE == 0,
        op,
        f"width {a.shape[-1]} does not split into heads",
    )

    def spec(count: int) -> Spec:
        place = _on_cores(batch, TILE_SIZE, dim, TensorMemoryLayout.HEIGHT_SHARDED, grid)
        return make_spec((1, batch, count, dim), a.dtype, Layout.TILE, place)

    return spec(heads), spec(kv_heads)


def nlp_create_qkv_heads_decode(
    input: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [1, 1, batch, width] into q [1, batch, heads, D] and k, v [1, batch, kv_heads, D], one user a core."""
    op = "nlp_create_qkv_heads_decode"
    kv_heads = num_kv_heads or num_heads
    need(
        memory_config is None or memory_config.is_sharded(),
        op,
        f"memory_config {memory_config!r} must be height sharded",
    )
    grid = on_device(op, input).compute_with_storage_grid_size()
    q, kv = _split_decode_plan(input.spec, num_heads, kv_heads, grid)

    def part(spec: Spec, first: int) -> Tensor:
        batch, heads, dim = spec.shape[1:]

        def compute(a: torch.Tensor) -> torch.Tensor:
            return a[..., :batch, first * dim : (first + heads) * dim].reshape(
                a.shape[0], 1, batch, heads, dim
            )

        return launch(op, spec, compute, input)

    return part(q, 0), part(kv, num_heads), part(kv, num_heads + kv_heads)


@lru_cache(maxsize=1024)
def _join_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    op = "nlp_concat_heads"
    need_tile(op, input=a)
    need(len(a.shape) == 4, op, f"input {list(a.shape)} must be [batch, heads, tokens, head_dim]")
    batch, heads, tokens, dim = a.shape
    return make_spec(
        (batch, 1, tokens, heads * dim), a.dtype, Layout.TILE, placed(memory_config, a.memory_config)
    )


def nlp_concat_heads(input: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Join [1, heads, S, D] into [1, 1, S, heads * D]."""
    spec = _join_plan(input.spec, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        return a.transpose(2, 3).reshape(a.shape[0], *spec.shape)

    return launch("nlp_concat_heads", spec, compute, input)


@lru_cache(maxsize=1024)
def _join_decode_plan(a: Spec, heads: int, grid: CoreCoord, sub_core_grids: CoreRangeSet | None) -> Spec:
    op = "nlp_concat_heads_decode"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, DataType.FLOAT32)
    need(
        a.memory_config.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED,
        op,
        f"input {a!r} must be height sharded",
    )
    need(a.shape[2] == heads, op, f"num_heads {heads} for input {list(a.shape)}, which has {a.shape[2]}")
    shard = a.memory_config.shard_spec
    need(
        sub_core_grids is not None or shard is None or len(shard.grid.ranges()) == 1,
        op,
        f"input {a!r} lies on cores that are not one rectangle; pass sub_core_grids (ttnn: bad optional access)",
    )
    need(
        sub_core_grids is None or sub_core_grids.num_cores() >= heads,
        op,
        f"num_heads {heads} on sub_core_grids {sub_core_grids!r}; a core a head is needed",
    )
    place = _on_cores(heads, TILE_SIZE, a.shape[3], TensorMemoryLayout.WIDTH_SHARDED, grid)
    return make_spec((1, 1, TILE_SIZE, heads * a.shape[3]), a.dtype, Layout.TILE, place)


def nlp_concat_heads_decode(
    input: Tensor, *, num_heads: int, sub_core_grids: CoreRangeSet | None = None
) -> Tensor:
    """Join [1, batch, heads, D] into [1, 1, 32, heads * D]; rows past the batch are undefined."""
    grid = on_device("nlp_concat_heads_decode", input).compute_with_storage_grid_size()
    spec = _join_decode_plan(input.spec, num_heads, grid, sub_core_grids)
    return launch("nlp_concat_heads_decode", spec, lambda a: a.reshape(*a.shape[:3], -1), input)
