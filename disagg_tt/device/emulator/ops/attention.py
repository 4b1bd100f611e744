"""Attention of many queries: scaled_dot_product_attention, and its chunked form over a paged cache."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.attention_order import attend, attend_causally
from disagg_tt.device.emulator.ops.pages import PAGE, as_pool, in_pages, need_pages
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    TILE_SIZE,
    CoreCoord,
    DataType,
    Layout,
    MemoryConfig,
    SDPAProgramConfig,
    WormholeComputeKernelConfig,
)
from disagg_tt.errors import DeviceError

_FLOATS = (DataType.BFLOAT16, DataType.BFLOAT8_B, DataType.BFLOAT4_B)


def _need_operands(op: str, q: Spec, k: Spec, v: Spec) -> None:
    need_tile(op, q=q, k=k, v=v)
    for name, given in (("q", q), ("k", k), ("v", v)):
        need_dtype(op, name, given, *_FLOATS)
        need(not given.memory_config.is_sharded(), op, f"{name} {given!r} must be interleaved")
        need(
            len(given.shape) == 4, op, f"{name} {list(given.shape)} must be [batch, heads, tokens, head_dim]"
        )
        need(
            given.shape[3] == given.padded_shape[3],
            op,
            f"head_dim {given.shape[3]}; it must be a multiple of {TILE_SIZE}",
        )
    need(k.shape == v.shape, op, f"k {list(k.shape)} and v {list(v.shape)} differ")
    need(q.shape[3] == k.shape[3], op, f"q {list(q.shape)} and k {list(k.shape)} differ in head_dim")
    need(
        q.shape[1] % k.shape[1] == 0,
        op,
        f"{q.shape[1]} q heads over {k.shape[1]} kv heads; a whole number each is needed",
    )


def _need_config(op: str, config: SDPAProgramConfig, grid: CoreCoord) -> None:
    for name, size in (("q_chunk_size", config.q_chunk_size), ("k_chunk_size", config.k_chunk_size)):
        need(
            size > 0 and size % TILE_SIZE == 0,
            op,
            f"{name} is {size}; it must be a positive multiple of {TILE_SIZE}",
        )
        need(size < 512, op, f"{name} is {size}; chunks of 512 overflow L1; use 256 or less")
    given = config.compute_with_storage_grid_size
    need(
        given.x * given.y <= grid.x * grid.y,
        op,
        f"a grid of {given.x}x{given.y} cores; there are {grid.x}x{grid.y}",
    )


def _output(op: str, q: Spec, memory_config: MemoryConfig | None) -> Spec:
    place = placed(memory_config)
    emulated(not place.is_sharded(), op, f"shard its output, {place!r}; leave it interleaved")
    return make_spec(q.shape, q.dtype, Layout.TILE, place)


@lru_cache(maxsize=1024)
def _sdpa_plan(
    q: Spec,
    k: Spec,
    v: Spec,
    mask: Spec | None,
    causal: bool,
    config: SDPAProgramConfig | None,
    memory_config: MemoryConfig | None,
    concat: bool,
    grid: CoreCoord,
) -> Spec:
    op = "scaled_dot_product_attention"
    _need_operands(op, q, k, v)
    need(q.shape[0] == k.shape[0], op, f"q {list(q.shape)} and k {list(k.shape)} differ in batch")
    if causal:
        need(mask is None, op, "attn_mask with is_causal; pass is_causal=False with a mask")
        need(
            q.shape[2] == k.shape[2],
            op,
            f"causal attention of {q.shape[2]} queries over {k.shape[2]} keys; equal lengths are needed",
        )
    if mask is not None:
        need_tile(op, mask=mask)
        need_dtype(op, "attn_mask", mask, *_FLOATS)
        need(mask.memory_config == DRAM_MEMORY_CONFIG, op, f"attn_mask {mask!r} must be interleaved in DRAM")
        fits = (
            len(mask.shape) == 4
            and mask.shape[0] in (1, q.shape[0])
            and mask.shape[1] in (1, q.shape[1])
            and mask.shape[2:] == (q.shape[2], k.shape[2])
        )
        need(fits, op, f"attn_mask {list(mask.shape)} for q {list(q.shape)} and k {list(k.shape)}")
    if config is not None:
        _need_config(op, config, grid)
    spec = _output(op, q, memory_config)
    if concat:
        batch, heads, tokens, dim = q.shape
        return make_spec((batch, 1, tokens, heads * dim), q.dtype, Layout.TILE, spec.memory_config)
    return spec


def scaled_dot_product_attention(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sliding_window_size: int | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    attention_sink: Tensor | None = None,
    cu_window_seqlens: Tensor | None = None,
    windowed_q_token_offset: int = 0,
    windowed_q_token_offset_tensor: Tensor | None = None,
    output_concat_heads: bool = False,
    attn_mask_block_map: Tensor | None = None,
) -> Tensor:
    """Return attention of q [batch, heads, S, D] over k, v [batch, kv_heads, T, D], causal or under an added mask.

    `attn_mask` is [batch or 1, heads or 1, S, T]; with `output_concat_heads` the result is [batch, 1, S, heads * D].
    """
    op = "scaled_dot_product_attention"
    leave_out(
        op,
        sliding_window_size=sliding_window_size,
        attention_sink=attention_sink,
        cu_window_seqlens=cu_window_seqlens,
        windowed_q_token_offset=windowed_q_token_offset or None,
        windowed_q_token_offset_tensor=windowed_q_token_offset_tensor,
        attn_mask_block_map=attn_mask_block_map,
    )
    tensors = (input_tensor_q, input_tensor_k, input_tensor_v)
    mask = None if attn_mask is None else attn_mask.spec
    inputs = tensors if attn_mask is None else (*tensors, attn_mask)
    q, k, v = (t.spec for t in tensors)
    grid = on_device(op, *inputs).compute_with_storage_grid_size()
    spec = _sdpa_plan(q, k, v, mask, is_causal, program_config, memory_config, output_concat_heads, grid)
    group = q.shape[1] // k.shape[1]
    factor = q.shape[3] ** -0.5 if scale is None else scale

    def compute(qd: torch.Tensor, kd: torch.Tensor, vd: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        chips = max(x.shape[0] for x in (qd, kd, vd, *given))
        kd, vd = (x.expand(chips, *x.shape[1:]).reshape(-1, *x.shape[3:]) for x in (kd, vd))
        qd = (qd.expand(chips, *qd.shape[1:]) * factor).reshape(-1, group, *q.shape[2:])
        if is_causal:
            out = attend_causally(qd, kd, vd)
        elif mask is not None:
            added = given[0].expand(chips, *q.shape[:2], *mask.shape[2:]).reshape(-1, group, *mask.shape[2:])
            out = attend(qd, kd[:, None], vd[:, None], added)
        else:
            out = attend(qd.flatten(1, 2), kd, vd)
        out = round_on_device(out.reshape(chips, *q.shape), spec.dtype)
        return out.transpose(2, 3).reshape(chips, *spec.shape) if output_concat_heads else out

    return launch(op, spec, compute, *inputs)


@lru_cache(maxsize=1024)
def _chunked_plan(
    q: Spec,
    k: Spec,
    v: Spec,
    pages: Spec,
    start: int | Spec,
    config: SDPAProgramConfig | None,
    memory_config: MemoryConfig | None,
    grid: CoreCoord,
) -> Spec:
    op = "chunked_scaled_dot_product_attention"
    _need_operands(op, q, k, v)
    need_dtype(op, "page table", pages, DataType.INT32)
    need(pages.layout is Layout.ROW_MAJOR, op, f"page table {pages!r} must be ROW_MAJOR")
    need(
        len(pages.shape) == 2 and pages.shape[0] == q.shape[0],
        op,
        f"page table {list(pages.shape)} for q {list(q.shape)}; it must be [{q.shape[0]}, blocks a user]",
    )
    need_pages(op, k)
    if config is not None:
        _need_config(op, config, grid)
    if isinstance(start, Spec):
        need_dtype(op, "chunk_start_idx_tensor", start, DataType.INT32)
        need(
            start.shape == (1,) and start.layout is Layout.ROW_MAJOR,
            op,
            f"chunk_start_idx_tensor {start!r} must be [1], ROW_MAJOR",
        )
        each = pages.shape[1]
        need(
            each % 8 == 0,
            op,
            f"page table of {each} blocks a user with chunk_start_idx_tensor; it must be a multiple of 8",
        )
    else:
        for size in (1,) if config is None else (config.q_chunk_size, config.k_chunk_size):
            need(
                start >= 0 and start % size == 0,
                op,
                f"chunk_start_idx {start}; it must be 0 or more and a multiple of the chunk size {size}",
            )
        held = pages.shape[1] * k.shape[2]
        need(start + q.shape[2] <= held, op, f"{q.shape[2]} queries from {start} on for {held} tokens a user")
    return _output(op, q, memory_config)


@lru_cache(maxsize=64)
def _is_float32(value: float) -> bool:
    return float(torch.tensor(value, dtype=torch.float32)) == value


def chunked_scaled_dot_product_attention(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    page_table_tensor: Tensor,
    chunk_start_idx: int | None = None,
    *,
    chunk_start_idx_tensor: Tensor | None = None,
    scale: float | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    paged_cache_geometry: object = None,
    sliding_window_size: int | None = None,
    attention_sink: Tensor | None = None,
) -> Tensor:
    """Return causal attention of q [batch, heads, S, D], tokens start..start+S-1, over pools of K and V.

    The pools are [blocks, kv_heads, block, D], the page table int32 [batch, blocks a user], as of paged_fill_cache.
    """
    op = "chunked_scaled_dot_product_attention"
    leave_out(
        op,
        paged_cache_geometry=paged_cache_geometry,
        sliding_window_size=sliding_window_size,
        attention_sink=attention_sink,
    )
    need(
        scale is None or (isinstance(scale, float) and _is_float32(scale)),
        op,
        f"scale {scale!r}; it must be a float that float32 holds exactly",
    )
    if (chunk_start_idx is None) == (chunk_start_idx_tensor is None):
        raise DeviceError(f"{op}: pass chunk_start_idx or chunk_start_idx_tensor, one of them")
    q, k, v, pages = input_tensor_q, input_tensor_k, input_tensor_v, page_table_tensor
    inputs = (q, k, v, pages) if chunk_start_idx_tensor is None else (q, k, v, pages, chunk_start_idx_tensor)
    grid = on_device(op, *inputs).compute_with_storage_grid_size()
    start = chunk_start_idx if chunk_start_idx_tensor is None else chunk_start_idx_tensor.spec
    assert start is not None
    spec = _chunked_plan(q.spec, k.spec, v.spec, pages.spec, start, program_config, memory_config, grid)
    group, block = q.shape[1] // k.shape[1], k.shape[2]
    tokens, dim = q.shape[2:]
    factor = dim**-0.5 if scale is None else scale

    def compute(qd: torch.Tensor, kd: torch.Tensor, vd: torch.Tensor, table: torch.Tensor,
                *given: torch.Tensor) -> torch.Tensor:  # fmt: skip
        first = int(given[0].reshape(-1)[0]) if given else chunk_start_idx or 0
        length = -(-(first + tokens) // PAGE) * PAGE
        rows = in_pages(table.reshape(table.shape[0], *pages.shape)[0], block)[:, : length // PAGE]
        keys, values = as_pool(k._values), as_pool(v._values)
        if length > pages.shape[1] * block or int(rows.min()) < 0 or int(rows.max()) >= keys.shape[2]:
            raise DeviceError(f"{op}: tokens {first}..{first + tokens - 1} lie outside the cache {k.spec!r}")
        chips = max(qd.shape[0], keys.shape[0])
        kd, vd = (  # [chips * kv_heads, length, D]
            x[:, :, rows].flatten(3, 4).transpose(1, 2).expand(chips, -1, -1, -1, -1).reshape(-1, length, dim)
            for x in (keys, values)
        )
        qd = (qd.expand(chips, *qd.shape[1:]) * factor).reshape(-1, group, tokens, dim)
        out = attend_causally(qd, kd[:, : first + tokens], vd[:, : first + tokens])
        return round_on_device(out.reshape(chips, *spec.shape), spec.dtype)

    return launch(op, spec, compute, *inputs)
