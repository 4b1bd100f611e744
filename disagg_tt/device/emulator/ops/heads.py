"""Splitting the q, k, v projection into heads, and joining attention's heads."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype, need_tile, placed
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
    ShardOrientation,
    ShardSpec,
    TensorMemoryLayout,
    num_cores_to_corerangeset,
)

BF16, FP32, BF8 = DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B


def _on_cores(
    cores: int, height: int, width: int, layout: TensorMemoryLayout, grid: CoreCoord
) -> MemoryConfig:
    shard = ShardSpec(
        num_cores_to_corerangeset(cores, grid, True), (height, width), ShardOrientation.ROW_MAJOR
    )
    return MemoryConfig(layout, BufferType.L1, shard)


# ---------------------------------------------------------------- prefill


@lru_cache(maxsize=1024)
def _split_plan(
    a: Spec,
    both: Spec | None,
    heads: int,
    kv_heads: int,
    transpose_k: bool,
    memory_config: MemoryConfig | None,
) -> tuple[Spec, Spec, Spec]:
    op = "nlp_create_qkv_heads"
    need(heads > 0 and kv_heads > 0, op, f"{heads} q and {kv_heads} kv heads; there must be some of each")
    parts = heads + 2 * kv_heads if both is None else heads
    for name, spec, count in (("input", a, parts), ("input_kv", both, 2 * kv_heads)):
        if spec is None:
            continue
        need_tile(op, **{name: spec})
        need_dtype(op, name, spec, BF16, FP32, BF8)
        emulated(
            not spec.memory_config.is_sharded(),
            op,
            f"split a sharded {name}, {spec!r}; move it to DRAM or L1",
        )
        need(
            len(spec.shape) == 4 and spec.shape[1] == 1,
            op,
            f"{name} {list(spec.shape)} must be [batch, 1, tokens, width]",
        )
        need(
            spec.shape[-1] % (count * TILE_SIZE) == 0,
            op,
            f"width {spec.shape[-1]} for {heads} q and 2 x {kv_heads} kv heads; head_dim must be a multiple of {TILE_SIZE}",
        )
    dim, place = a.shape[-1] // parts, placed(memory_config, a.memory_config)
    if both is not None:
        same = (a.dtype, a.shape[0], a.shape[2], dim) == (
            both.dtype,
            both.shape[0],
            both.shape[2],
            both.shape[-1] // (2 * kv_heads),
        )
        need(same, op, f"input {a!r} and input_kv {both!r} differ in dtype, batch, tokens or head_dim")
    need(not place.is_sharded(), op, f"output {place!r} for an interleaved input; it must be interleaved")
    batch, _, tokens, _ = a.shape
    q = make_spec((batch, heads, tokens, dim), a.dtype, Layout.TILE, place)
    v = make_spec((batch, kv_heads, tokens, dim), a.dtype, Layout.TILE, place)
    k = make_spec((batch, kv_heads, dim, tokens), a.dtype, Layout.TILE, place) if transpose_k else v
    return q, k, v


def nlp_create_qkv_heads(
    input: Tensor,
    input_kv: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    transpose_k_heads: bool = True,
    kv_tied: bool = False,
    memory_config: MemoryConfig | None = None,
    output_tensors: object = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, 1, S, width] into q [B, heads, S, D] and k, v [B, kv_heads, S, D]; k is [.., D, S] when transposed.

    With `input_kv` [B, 1, S, 2 * kv_heads * D], k and v come from it, and `input` is q alone.
    """
    op = "nlp_create_qkv_heads"
    leave_out(op, kv_tied=kv_tied, output_tensors=output_tensors)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    on_device(op, *((input,) if input_kv is None else (input, input_kv)))
    both = None if input_kv is None else input_kv.spec
    q, k, v = _split_plan(input.spec, both, num_heads, kv_heads, transpose_k_heads, memory_config)
    dim = q.shape[3]

    def part(spec: Spec, source: Tensor, first: int, turned: bool = False) -> Tensor:
        heads = spec.shape[1]

        def compute(a: torch.Tensor) -> torch.Tensor:
            columns = a[..., first * dim : (first + heads) * dim]
            split = columns.reshape(a.shape[0], a.shape[1], a.shape[3], heads, dim).transpose(2, 3)
            if not turned:
                return split
            return round_on_device(split.transpose(3, 4).clone(), spec.dtype)  # block floats are packed anew

        return launch(op, spec, compute, source)

    source, first = (input, num_heads) if input_kv is None else (input_kv, 0)
    return part(q, input, 0), part(k, source, first, transpose_k_heads), part(v, source, first + kv_heads)


@lru_cache(maxsize=1024)
def _join_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    op = "nlp_concat_heads"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, FP32, BF8)
    need(len(a.shape) == 4, op, f"input {list(a.shape)} must be [batch, heads, tokens, head_dim]")
    emulated(not a.memory_config.is_sharded(), op, f"join a sharded input, {a!r}; move it to DRAM or L1")
    batch, heads, tokens, dim = a.shape
    place = placed(memory_config, a.memory_config)
    need(not place.is_sharded(), op, f"output {place!r} for an interleaved input; it must be interleaved")
    return make_spec((batch, 1, tokens, heads * dim), a.dtype, Layout.TILE, place)


def nlp_concat_heads(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Join [B, heads, S, D] into [B, 1, S, heads * D]."""
    on_device("nlp_concat_heads", input_tensor)
    spec = _join_plan(input_tensor.spec, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        return a.transpose(2, 3).reshape(a.shape[0], *spec.shape)

    return launch("nlp_concat_heads", spec, compute, input_tensor)


# ---------------------------------------------------------------- decode


@lru_cache(maxsize=1024)
def _split_decode_plan(
    a: Spec, heads: int, kv_heads: int, memory_config: MemoryConfig | None, grid: CoreCoord
) -> tuple[Spec, Spec]:
    op = "nlp_create_qkv_heads_decode"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, FP32)
    need(
        len(a.shape) == 4 and a.shape[:2] == (1, 1) and 1 <= a.shape[2] <= 32,
        op,
        f"input {list(a.shape)} must be [1, 1, batch, width], batch 1..32",
    )
    need(0 < kv_heads <= heads, op, f"{kv_heads} kv heads for {heads} q heads; at least one, at most as many")
    batch, dim = a.shape[2], a.shape[-1] // (heads + 2 * kv_heads)
    need(
        dim * (heads + 2 * kv_heads) == a.shape[-1] and dim % TILE_SIZE == 0,
        op,
        f"width {a.shape[-1]} does not split into heads of a multiple of {TILE_SIZE}",
    )

    def spec(count: int) -> Spec:
        height = -(-count // TILE_SIZE) * TILE_SIZE
        place = _on_cores(batch, height, dim, TensorMemoryLayout.HEIGHT_SHARDED, grid)
        asked, given = None if memory_config is None else memory_config.shard_spec, place.shard_spec
        emulated(
            asked is None or given is None or asked.grid == given.grid,
            op,
            f"place users on other cores than the first {batch}; leave the shard spec out",
        )
        return make_spec((1, batch, count, dim), a.dtype, Layout.TILE, place)

    return spec(heads), spec(kv_heads)


def nlp_create_qkv_heads_decode(
    input_tensor: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    output_tensors: object = None,
    overlap_qk_coregrid: bool | None = True,
    batch_offset: Tensor | None = None,
    slice_size: int | None = None,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [1, 1, batch, width] into q [1, batch, heads, D] and k, v [1, batch, kv_heads, D], one user a core.

    The outputs are height-sharded in L1, whatever `memory_config` says, as ttnn's are.
    """
    op = "nlp_create_qkv_heads_decode"
    leave_out(op, output_tensors=output_tensors, batch_offset=batch_offset, slice_size=slice_size)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    grid = on_device(op, input_tensor).compute_with_storage_grid_size()
    emulated(
        overlap_qk_coregrid is not False or not input_tensor.is_sharded(),
        op,
        "place q and k on different cores; pass overlap_qk_coregrid=True",
    )
    q, kv = _split_decode_plan(input_tensor.spec, num_heads, kv_heads, memory_config, grid)

    def part(spec: Spec, first: int) -> Tensor:
        batch, heads, dim = spec.shape[1:]

        def compute(a: torch.Tensor) -> torch.Tensor:
            return a[..., :batch, first * dim : (first + heads) * dim].reshape(
                a.shape[0], 1, batch, heads, dim
            )

        return launch(op, spec, compute, input_tensor)

    return part(q, 0), part(kv, num_heads), part(kv, num_heads + kv_heads)


@lru_cache(maxsize=1024)
def _join_decode_plan(a: Spec, heads: int, grid: CoreCoord, sub_core_grids: CoreRangeSet | None) -> Spec:
    op = "nlp_concat_heads_decode"
    need_tile(op, input=a)
    need_dtype(op, "input", a, BF16, FP32)
    shard = a.memory_config.shard_spec
    need(
        shard is not None and a.memory_config.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED,
        op,
        f"input {a!r} must be height sharded",
    )
    assert shard is not None
    need(
        len(a.shape) == 4 and a.shape[0] == 1 and a.shape[1] == shard.grid.num_cores(),
        op,
        f"input {a!r} must be [1, users, heads, head_dim], one user a core",
    )
    need(a.shape[1] <= TILE_SIZE, op, f"{a.shape[1]} users; at most {TILE_SIZE}")
    need(a.shape[2] == heads, op, f"num_heads {heads} for input {list(a.shape)}, which has {a.shape[2]}")
    need(heads <= TILE_SIZE, op, f"num_heads {heads}; at most {TILE_SIZE}")
    need(a.shape[3] % TILE_SIZE == 0, op, f"head_dim {a.shape[3]}; it must be a multiple of {TILE_SIZE}")
    need(
        sub_core_grids is not None or len(shard.grid.ranges()) == 1,
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
    input_tensor: Tensor,
    *,
    num_heads: int,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    sub_core_grids: CoreRangeSet | None = None,
) -> Tensor:
    """Join [1, batch, heads, D] into [1, 1, 32, heads * D]; rows past the batch are undefined.

    The output is width-sharded in L1, one head a core, whatever `memory_config` says, as ttnn's is.
    """
    op = "nlp_concat_heads_decode"
    leave_out(op, output_tensor=output_tensor)
    grid = on_device(op, input_tensor).compute_with_storage_grid_size()
    spec = _join_decode_plan(input_tensor.spec, num_heads, grid, sub_core_grids)
    return launch(op, spec, lambda a: a.reshape(*a.shape[:3], -1), input_tensor)
