"""Attention: splitting and joining heads, rotary embedding, scaled dot product attention for prefill and for decode."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.cache import addresses, as_pool
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.tensor import Tensor, launch, on_device
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    BufferType,
    DataType,
    Layout,
    MemoryConfig,
    SDPAProgramConfig,
    ShardSpec,
    Spec,
    TensorMemoryLayout,
    WormholeComputeKernelConfig,
    make_spec,
    num_cores_to_corerangeset,
)

BF16 = DataType.BFLOAT16


def _on_cores(cores: int, height: int, width: int, layout: TensorMemoryLayout, grid: object) -> MemoryConfig:
    shard = ShardSpec(num_cores_to_corerangeset(cores, grid, True), (height, width))  # type: ignore[arg-type]
    return MemoryConfig(layout, BufferType.L1, shard)


# ---------------------------------------------------------------- heads


@lru_cache(maxsize=1024)
def _split_plan(a: Spec, heads: int, kv_heads: int, memory_config: MemoryConfig | None) -> tuple[Spec, Spec]:
    op = "nlp_create_qkv_heads"
    need_tile(op, input=a)
    parts = heads + 2 * kv_heads
    need(a.shape[0] >= 1 and a.shape[1] == 1, op, f"input {list(a.shape)} must be [batch, 1, tokens, width]")
    need(
        a.shape[-1] % parts == 0,
        op,
        f"width {a.shape[-1]} for {heads} q and 2 x {kv_heads} kv heads; it must be a multiple of {parts}",
    )
    dim, place = a.shape[-1] // parts, placed(memory_config)
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
def _split_decode_plan(a: Spec, heads: int, kv_heads: int, grid: object) -> tuple[Spec, Spec]:
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
def _join_decode_plan(a: Spec, heads: int, grid: object) -> Spec:
    op = "nlp_concat_heads_decode"
    need_tile(op, input=a)
    need(
        a.memory_config.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED,
        op,
        f"input {a!r} must be height sharded",
    )
    need(a.shape[2] == heads, op, f"num_heads {heads} for input {list(a.shape)}, which has {a.shape[2]}")
    place = _on_cores(heads, TILE_SIZE, a.shape[3], TensorMemoryLayout.WIDTH_SHARDED, grid)
    return make_spec((1, 1, TILE_SIZE, heads * a.shape[3]), a.dtype, Layout.TILE, place)


def nlp_concat_heads_decode(input: Tensor, *, num_heads: int) -> Tensor:
    """Join [1, batch, heads, D] into [1, 1, 32, heads * D]; rows past the batch are undefined."""
    grid = on_device("nlp_concat_heads_decode", input).compute_with_storage_grid_size()
    spec = _join_decode_plan(input.spec, num_heads, grid)
    return launch("nlp_concat_heads_decode", spec, lambda a: a.reshape(*a.shape[:3], -1), input)


# ---------------------------------------------------------------- rotary embedding


@lru_cache(maxsize=1024)
def _rope_plan(a: Spec, cos: Spec, sin: Spec, decode: bool, memory_config: MemoryConfig | None) -> Spec:
    op = "rotary_embedding_hf"
    need_tile(op, input=a, cos=cos, sin=sin)
    need_dtype(op, "cos", cos, BF16)
    need(cos.shape == sin.shape, op, f"cos {list(cos.shape)} and sin {list(sin.shape)} differ")
    need(cos.shape[-1] == a.shape[-1], op, f"cos width {cos.shape[-1]} for head_dim {a.shape[-1]}")
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
    need(k.shape == v.shape, op, f"k {list(k.shape)} and v {list(v.shape)} differ")
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
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if group > 1:
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(q.shape) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return round_on_device(out, spec.dtype)[:, None]

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
    need_dtype(op, "page table", pages, DataType.INT32)
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
        chips, _, users, heads, dim = qd.shape
        kv_heads = k.shape[1]
        keys, values = as_pool(k._storage), as_pool(v._storage)
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


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Return [chips, kv_heads, users, group, dim] for q of that shape, over the tokens that `place` gathers."""
    k, v = place.gather(keys), place.gather(values)  # [chips, kv_heads, users, length, dim]
    scores = torch.matmul(q, k.transpose(-1, -2))
    if place.mask is not None:
        scores += place.mask
    return torch.matmul(torch.softmax(scores, dim=-1), v)
