"""Attention of one query a user over its K/V cache, paged or plain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.attention_order import attend
from disagg_tt.device.emulator.ops.pages import Addresses, addresses, as_pool, need_pages
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import (
    BufferType,
    CoreCoord,
    DataType,
    Layout,
    MemoryConfig,
    SDPAProgramConfig,
    WormholeComputeKernelConfig,
)
from disagg_tt.errors import DeviceError

BF16 = DataType.BFLOAT16
_FEW = 4  # times as many slots as are in use: then each is cheaper alone


def _plan(
    op: str,
    q: Spec,
    k: Spec,
    v: Spec,
    pos: Spec | None,
    memory_config: MemoryConfig | None,
    config: SDPAProgramConfig | None,
    grid: CoreCoord,
) -> Spec:
    """Check what paged and plain decode attention share, and return the output's spec."""
    need_tile(op, q=q, k=k, v=v)
    need_dtype(op, "q", q, BF16, DataType.BFLOAT8_B, DataType.BFLOAT4_B)
    for name, cache in (("k", k), ("v", v)):
        need_dtype(op, name, cache, BF16, DataType.BFLOAT8_B, DataType.BFLOAT4_B)
        need(not cache.memory_config.is_sharded(), op, f"{name} {cache!r} must be interleaved")
        need(
            cache.memory_config.buffer_type is BufferType.DRAM,
            op,
            f"{name} {cache!r} must be in DRAM, not in L1",
        )
    need(
        len(q.shape) == len(k.shape) == 4 and k.shape == v.shape,
        op,
        f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must have 4 axes, k as v",
    )
    need(q.shape[0] == 1, op, f"q {list(q.shape)} must be [1, users, heads, head_dim]")
    heads, kv_heads = q.shape[2], k.shape[1]
    need(
        heads % kv_heads == 0 and q.shape[3] == k.shape[3],
        op,
        f"q {list(q.shape)} over a cache {list(k.shape)}",
    )
    need(
        kv_heads == 1 or q.dtype is BF16,
        op,
        f"q is {q.dtype.value} with {kv_heads} kv heads; it must be bfloat16",
    )
    need(
        q.memory_config.is_sharded() or q.memory_config.buffer_type is BufferType.DRAM,
        op,
        f"q {q!r}; interleaved it must be in DRAM",
    )
    if pos is not None:
        need(pos.layout is Layout.ROW_MAJOR, op, f"cur_pos {pos!r} must be ROW_MAJOR")
        need(
            pos.shape[-1] == math.prod(pos.shape) == q.shape[1],
            op,
            f"cur_pos {list(pos.shape)}; it must be [{q.shape[1]}]",
        )
    if config is not None:
        given = config.compute_with_storage_grid_size
        need(
            given.x <= grid.x and given.y <= grid.y,
            op,
            f"a grid of {given.x}x{given.y}; there are {grid.x}x{grid.y}",
        )
        need(
            given.x * given.y >= q.shape[1], op, f"a grid of {given.x}x{given.y} cores for {q.shape[1]} users"
        )
    need_pages(op, k)
    place = placed(memory_config)
    emulated(not place.is_sharded(), op, f"shard its output, {place!r}; leave it interleaved")
    return make_spec(q.shape, q.dtype, Layout.TILE, place)


@lru_cache(maxsize=1024)
def _paged_plan(
    q: Spec,
    k: Spec,
    v: Spec,
    pages: Spec,
    pos: Spec,
    memory_config: MemoryConfig | None,
    config: SDPAProgramConfig | None,
    grid: CoreCoord,
) -> Spec:
    op = "paged_scaled_dot_product_attention_decode"
    need_dtype(op, "page table", pages, DataType.INT32)
    need(pages.layout is Layout.ROW_MAJOR, op, f"page table {pages!r} must be ROW_MAJOR")
    need_dtype(op, "cur_pos", pos, DataType.INT32)
    spec = _plan(op, q, k, v, pos, memory_config, config, grid)
    need(pages.shape[0] == q.shape[1], op, f"q {list(q.shape)} for a page table of {pages.shape[0]} users")
    return spec


def paged_scaled_dot_product_attention_decode(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    page_table_tensor: Tensor,
    *,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    cur_pos_tensor: Tensor | None = None,
    attention_sink: Tensor | None = None,
    scale: float | None = None,
    sliding_window_size: int | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    paged_cache_geometry: object = None,
    cache_position_modulo: int | None = None,
    spec_multi_pos_tiles: int = 0,
) -> Tensor:
    """Return attention of each user's one query over positions 0..cur_pos of its pages; a user at -1 is undefined.

    q is [1, users, heads, D], k and v are pools [blocks, kv_heads, block, D], the page table is int32 [users, blocks].
    """
    op = "paged_scaled_dot_product_attention_decode"
    leave_out(
        op,
        attn_mask=attn_mask,
        attention_sink=attention_sink,
        sliding_window_size=sliding_window_size,
        paged_cache_geometry=paged_cache_geometry,
        cache_position_modulo=cache_position_modulo,
        spec_multi_pos_tiles=spec_multi_pos_tiles or None,
    )
    emulated(is_causal, op, "attend without is_causal")
    if cur_pos_tensor is None:
        raise DeviceError(f"{op}: cur_pos_tensor is needed")
    q, k, v, pages, pos = input_tensor_q, input_tensor_k, input_tensor_v, page_table_tensor, cur_pos_tensor
    grid = on_device(op, q, k, v, pages, pos).compute_with_storage_grid_size()
    spec = _paged_plan(q.spec, k.spec, v.spec, pages.spec, pos.spec, memory_config, program_config, grid)
    return _attend_decode(op, spec, q, k, v, pos, pages, scale)


@lru_cache(maxsize=1024)
def _plain_plan(
    q: Spec,
    k: Spec,
    v: Spec,
    pos: Spec | None,
    memory_config: MemoryConfig | None,
    config: SDPAProgramConfig | None,
    grid: CoreCoord,
) -> Spec:
    op = "scaled_dot_product_attention_decode"
    if pos is not None:
        need_dtype(op, "cur_pos", pos, DataType.INT32, DataType.UINT32)
    spec = _plan(op, q, k, v, pos, memory_config, config, grid)
    need(k.shape[0] == q.shape[1], op, f"a cache of {k.shape[0]} users for {q.shape[1]}")
    length = k.shape[2]
    chunk = config.k_chunk_size if config is not None and config.k_chunk_size else min(512, length & -length)
    need(chunk % 32 == 0 and length % chunk == 0, op, f"k_chunk_size {chunk} for a cache of {length} tokens")
    return spec


def scaled_dot_product_attention_decode(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    *,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    cur_pos: Sequence[int] = (),
    cur_pos_tensor: Tensor | None = None,
    attention_sink: Tensor | None = None,
    scale: float | None = None,
    sliding_window_size: int | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    share_cache: bool | None = None,
) -> Tensor:
    """Return attention of each user's one query over positions 0..cur_pos; a user at -1 is undefined.

    q is [1, users, heads, D], k and v are [users, kv_heads, length, D]; positions are a tensor [users] or a list.
    """
    op = "scaled_dot_product_attention_decode"
    leave_out(
        op,
        attn_mask=attn_mask,
        attention_sink=attention_sink,
        sliding_window_size=sliding_window_size,
        share_cache=share_cache,
    )
    emulated(is_causal, op, "attend without is_causal")
    q, k, v = input_tensor_q, input_tensor_k, input_tensor_v
    given = () if cur_pos_tensor is None else (cur_pos_tensor,)
    need(bool(given) or bool(cur_pos), op, "pass cur_pos or cur_pos_tensor")
    need(all(p >= 0 for p in cur_pos), op, f"cur_pos {list(cur_pos)} by value; they must be 0 or more")
    grid = on_device(op, q, k, v, *given).compute_with_storage_grid_size()
    pos = None if cur_pos_tensor is None else cur_pos_tensor.spec
    spec = _plain_plan(q.spec, k.spec, v.spec, pos, memory_config, program_config, grid)
    if cur_pos_tensor is None:
        users, longest = q.shape[1], max(cur_pos)
        need(len(cur_pos) == users, op, f"{len(cur_pos)} positions for {users} users")
        need(longest < k.shape[2], op, f"position {longest} of a cache of {k.shape[2]} tokens")
    where = list(cur_pos) if cur_pos_tensor is None else cur_pos_tensor
    return _attend_decode(op, spec, q, k, v, where, None, scale)


def _attend_decode(
    op: str,
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | Sequence[int],
    pages: Tensor | None,
    scale: float | None,
) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    kv_heads = k.shape[1]

    def compute(qd: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        place = addresses(pos, pages, k.spec)
        users, heads, dim = qd.shape[2:]
        keys, values = as_pool(k._values), as_pool(v._values)
        qd = qd.expand(keys.shape[0], *qd.shape[1:]).reshape(
            keys.shape[0], users, kv_heads, heads // kv_heads, dim
        )
        qd = qd.transpose(1, 2) * factor  # [chips, kv_heads, users, group, dim]
        active = [u for u, position in enumerate(place.positions) if position >= 0]
        if place.spread or len(active) * _FEW <= users:  # one by one; what a free slot gets is undefined
            out = torch.zeros_like(qd)
            for u in active:
                out[:, :, u] = _attend(qd[:, :, u : u + 1], keys, values, place.user(u))[:, :, 0]
        else:
            out = _attend(qd, keys, values, place)
        out = out.transpose(1, 2).reshape(keys.shape[0], 1, users, heads, dim)
        return round_on_device(out, spec.dtype)

    tensors = [t for t in (q, k, v, pages, pos) if isinstance(t, Tensor)]
    return launch(op, spec, compute, *tensors)


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: Addresses) -> torch.Tensor:
    """Return [chips, kv_heads, users, group, dim] for q of that shape, over the tokens that `place` gathers."""
    return attend(q, place.gather(keys), place.gather(values), place.mask)
