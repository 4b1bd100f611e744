"""Attention: splitting and joining heads, rotary embedding, scaled dot product attention for prefill and for decode."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.cache import Addresses, addresses, as_pool
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    DataType,
    Layout,
    MemoryConfig,
    SDPAProgramConfig,
    TensorMemoryLayout,
    WormholeComputeKernelConfig,
)

BF16 = DataType.BFLOAT16


# ---------------------------------------------------------------- rotary embedding


@lru_cache(maxsize=1024)
def _rope_plan(a: Spec, cos: Spec, sin: Spec, decode: bool, memory_config: MemoryConfig | None) -> Spec:
    op = "rotary_embedding_hf"
    need_tile(op, input=a, cos=cos, sin=sin)
    need_dtype(op, "cos", cos, BF16)
    need(cos.shape == sin.shape, op, f"cos {list(cos.shape)} and sin {list(sin.shape)} differ")
    need(cos.shape[-1] == a.shape[-1], op, f"cos width {cos.shape[-1]} for head_dim {a.shape[-1]}")
    width = a.shape[-1]
    need(width == TILE_SIZE or width % 64 == 0, op, f"head_dim {width}; it must be 32 or a multiple of 64")
    need(
        cos.shape[0] == 1 and len(a.shape) == len(cos.shape) == 4,
        op,
        f"cos {list(cos.shape)} must be [1, 1, positions, head_dim]",
    )
    if decode:
        sharded = TensorMemoryLayout.HEIGHT_SHARDED
        for name, spec in (("input", a), ("cos", cos), ("sin", sin)):
            need(
                spec.memory_config.memory_layout is sharded,
                op,
                f"decode's {name} {spec!r} must be height sharded",
            )
        need(cos.shape[1] == a.shape[1], op, f"cos for {cos.shape[1]} users, input for {a.shape[1]}")
    else:
        need(cos.shape[1] == 1, op, f"cos {list(cos.shape)} must be [1, 1, positions, head_dim] in prefill")
        need(
            cos.shape[2] >= a.shape[2], op, f"cos has {cos.shape[2]} positions, the input {a.shape[2]} tokens"
        )
    return make_spec(a.shape, a.dtype, Layout.TILE, placed(memory_config, a.memory_config))


def rotary_embedding_hf(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    is_decode_mode: bool,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return x * cos + rotate_half(x) * sin; prefill uses rows 0..S-1 of cos and sin, decode row u for user u."""
    spec = _rope_plan(input.spec, cos.spec, sin.spec, is_decode_mode, memory_config)
    half, tokens = spec.shape[-1] // 2, spec.shape[2]

    def compute(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if not is_decode_mode:
            c, s = c[:, :, :, :tokens], s[:, :, :, :tokens]
        out = x * c
        out[..., :half].addcmul_(x[..., half:], s[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], s[..., half:])
        return round_on_device(out, spec.dtype)

    return launch("rotary_embedding_hf", spec, compute, input, cos, sin)


# ---------------------------------------------------------------- attention


@lru_cache(maxsize=1024)
def _sdpa_plan(
    q: Spec, k: Spec, v: Spec, config: SDPAProgramConfig | None, memory_config: MemoryConfig | None
) -> Spec:
    op = "scaled_dot_product_attention"
    need_tile(op, q=q, k=k, v=v)
    for name, given in (("q", q), ("k", k), ("v", v)):
        need_dtype(op, name, given, BF16, DataType.BFLOAT8_B, DataType.BFLOAT4_B)
    need(k.shape == v.shape, op, f"k {list(k.shape)} and v {list(v.shape)} differ")
    need(len(q.shape) == len(k.shape) == 4, op, f"q {list(q.shape)} must be [batch, heads, tokens, head_dim]")
    need(
        q.shape[-1] == k.shape[-1] and q.shape[0] == k.shape[0],
        op,
        f"q {list(q.shape)} and k {list(k.shape)} do not match",
    )
    need(
        q.shape[1] % k.shape[1] == 0,
        op,
        f"{q.shape[1]} q heads over {k.shape[1]} kv heads; a whole number each is needed",
    )
    need(
        q.shape[2] == k.shape[2],
        op,
        f"causal attention of {q.shape[2]} queries over {k.shape[2]} keys; equal lengths are needed",
    )
    if config is not None:
        need(
            max(config.q_chunk_size, config.k_chunk_size) < 512,
            op,
            "chunks of 512 overflow L1; use 256 or less",
        )
    return make_spec(q.shape, q.dtype, Layout.TILE, placed(memory_config))


def scaled_dot_product_attention(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return causal attention of q [1, heads, S, D] over k, v [1, kv_heads, S, D]."""
    need(is_causal, "scaled_dot_product_attention", "only is_causal=True is emulated")
    spec = _sdpa_plan(
        input_tensor_q.spec, input_tensor_k.spec, input_tensor_v.spec, program_config, memory_config
    )
    group = input_tensor_q.shape[1] // input_tensor_k.shape[1]

    def compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        chips = max(x.shape[0] for x in (q, k, v))
        q, k, v = (x.expand(chips, *x.shape[1:]).flatten(0, 1) for x in (q, k, v))
        if group > 1:
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(q.shape) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return round_on_device(out, spec.dtype).view(chips, *spec.shape)

    return launch(
        "scaled_dot_product_attention", spec, compute, input_tensor_q, input_tensor_k, input_tensor_v
    )


@lru_cache(maxsize=1024)
def _sdpa_decode_plan(
    q: Spec, k: Spec, v: Spec, pages: Spec, pos: Spec, memory_config: MemoryConfig | None
) -> Spec:
    op = "paged_scaled_dot_product_attention_decode"
    need_tile(op, q=q, k=k, v=v)
    need_dtype(op, "q", q, BF16)
    for name, pool in (("k", k), ("v", v)):
        need_dtype(op, name, pool, BF16, DataType.BFLOAT8_B, DataType.BFLOAT4_B)
    need_dtype(op, "page table", pages, DataType.INT32)
    need(
        pages.layout is pos.layout is Layout.ROW_MAJOR,
        op,
        "the page table and cur_pos must be in ROW_MAJOR layout",
    )
    need_dtype(op, "cur_pos", pos, DataType.INT32)
    need(k.shape == v.shape, op, f"k pool {list(k.shape)} and v pool {list(v.shape)} differ")
    need(
        q.shape[0] == 1 and q.shape[1] == pages.shape[0],
        op,
        f"q {list(q.shape)} for a page table of {pages.shape[0]} users",
    )
    need(pos.shape == (q.shape[1],), op, f"cur_pos {list(pos.shape)}; it must be [{q.shape[1]}]")
    need(
        q.shape[2] % k.shape[1] == 0 and q.shape[3] == k.shape[3],
        op,
        f"q {list(q.shape)} over pool {list(k.shape)}",
    )
    place = placed(memory_config)
    need(not place.is_sharded(), op, f"output {place!r}; it must be interleaved")
    return make_spec(q.shape, BF16, Layout.TILE, place)


def paged_scaled_dot_product_attention_decode(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: Tensor,
    page_table_tensor: Tensor,
    *,
    cur_pos_tensor: Tensor,
    scale: float | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Return attention of each user's one query over positions 0..cur_pos of its pages; a user at -1 is undefined."""
    q, k, v, pages, pos = input_tensor_q, input_tensor_k, input_tensor_v, page_table_tensor, cur_pos_tensor
    spec = _sdpa_decode_plan(q.spec, k.spec, v.spec, pages.spec, pos.spec, memory_config)
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def compute(qd: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        place = addresses(pos, pages, k.shape[0])
        users, heads, dim = qd.shape[2:]
        kv_heads = k.shape[1]
        keys, values = as_pool(k._values), as_pool(v._values)
        qd = qd.expand(keys.shape[0], *qd.shape[1:]).reshape(
            keys.shape[0], users, kv_heads, heads // kv_heads, dim
        )
        qd = qd.transpose(1, 2) * factor  # [chips, kv_heads, users, group, dim]
        if place.spread:
            out = torch.cat(
                [_attend(qd[:, :, u : u + 1], keys, values, place.user(u)) for u in range(users)], dim=2
            )
        else:
            out = _attend(qd, keys, values, place)
        out = out.transpose(1, 2).reshape(keys.shape[0], 1, users, heads, dim)
        return round_on_device(out, spec.dtype)

    return launch("paged_scaled_dot_product_attention_decode", spec, compute, q, k, v, pages, pos)


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: Addresses) -> torch.Tensor:
    """Return [chips, kv_heads, users, group, dim] for q of that shape, over the tokens that `place` gathers."""
    k, v = place.gather(keys), place.gather(values)  # [chips, kv_heads, users, length, dim]
    scores = torch.matmul(q, k.transpose(-1, -2))
    if place.mask is not None:
        scores += place.mask
    return torch.matmul(torch.softmax(scores, dim=-1), v)
