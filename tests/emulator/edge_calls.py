"""Calls at the edge of the rules, with what the emulator says to them: those that ttnn 0.81 rejects, and those that only the
emulator rejects. What both accept, and many more calls without their messages, are the cases of disagg_tt/conformance.

`calls(ttnn, mesh)` works with the emulator and with the real runtime; run as a program it prints what the runtime chosen
by DISAGG_TT_DEVICE says to each, as JSON. Mesh: 1x2 with WORKER dispatch, the grid of 8x7 cores of a mock cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Rejected = dict[str, tuple[Call, str]]  # by name: the call, and what the emulator's message says


# fmt: off
def calls(ttnn: Any, mesh: Any) -> tuple[Rejected, Rejected]:
    """Return (rejected by both, rejected by the emulator only)."""
    T, R = ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT
    D, L = ttnn.DRAM_MEMORY_CONFIG, ttnn.L1_MEMORY_CONFIG
    B, F, U, I, B8 = ttnn.bfloat16, ttnn.float32, ttnn.uint32, ttnn.int32, ttnn.bfloat8_b  # noqa: E741
    X, G = ttnn.experimental, mesh.compute_with_storage_grid_size()

    def t(*shape: int, dt: Any = B, lay: Any = T, mc: Any = D) -> Any:
        return ttnn.allocate_tensor_on_device(ttnn.Shape(shape), dt, lay, mesh, mc)

    def idx(values: Any) -> Any:
        tensor = torch.tensor(values, dtype=torch.int32)
        return ttnn.from_torch(tensor, dtype=I, layout=R, device=mesh, mesh_mapper=ttnn.ReplicateTensorToMesh(mesh))

    def H(*shape: int, dt: Any = B, lay: Any = T) -> Any:
        return ttnn.from_torch(torch.zeros(shape), dtype=dt, layout=lay)

    def gone() -> Any:
        tensor = t(1, 1, 32, 64)
        ttnn.deallocate(tensor)
        return tensor

    def sh(height: int, width: int, cores: int, strategy: Any = ttnn.ShardStrategy.HEIGHT) -> Any:
        return ttnn.create_sharded_memory_config(
            (height, width), core_grid=ttnn.num_cores_to_corerangeset(cores, G, True), strategy=strategy,
            orientation=ttnn.ShardOrientation.ROW_MAJOR, use_height_and_width_as_shard_shape=True)

    hs, s3 = ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG, sh(32, 64, 3)

    def program(chunk: int) -> Any:
        return ttnn.SDPAProgramConfig(compute_with_storage_grid_size=G, q_chunk_size=chunk, k_chunk_size=chunk, exp_approx_mode=False)

    def sd(q: Any, k: Any, v: Any, chunk: int = 32, **kwargs: Any) -> Any:
        return ttnn.transformer.scaled_dot_product_attention(q, k, v, is_causal=True, program_config=program(chunk), **kwargs)

    def pd(q: Any, k: Any, v: Any, pages: Any, positions: Any, chunk: int = 32, mc: Any = D) -> Any:
        return ttnn.transformer.paged_scaled_dot_product_attention_decode(
            q, k, v, page_table_tensor=pages, cur_pos_tensor=positions, scale=0.125, memory_config=mc, program_config=program(chunk))

    def q3(**kwargs: Any) -> Any:
        return t(1, 3, 4, 64, mc=s3, **kwargs)

    def k3(**kwargs: Any) -> Any:
        return t(1, 3, 2, 64, mc=s3, **kwargs)

    def pool(dt: Any = B8) -> Any:
        return t(12, 2, 32, 64, dt=dt)

    def pt() -> Any:
        return idx([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])

    def ps() -> Any:
        return idx([3, 40, -1])

    rejected: Rejected = {
        "add deallocated": (lambda: ttnn.add(t(1, 1, 32, 64), gone()), "add: input [1, 1, 32, 64] bfloat16 TILE INTERLEAVED DRAM was deallocated; use it before it is freed"),
        "concat decode heads of cores that are no rectangle": (lambda: X.nlp_concat_heads_decode(t(1, 11, 4, 32, mc=sh(32, 32, 11)), num_heads=4), "cores that are not one rectangle; pass sub_core_grids"),
        "embedding int32 ids": (lambda: ttnn.embedding(t(1, 32, dt=I, lay=R), t(64, 64, lay=R), layout=T), "embedding: ids is int32; allowed: uint32, bfloat16; use typecast"),
        "embedding f32 table": (lambda: ttnn.embedding(t(1, 32, dt=U, lay=R), t(64, 64, dt=F, lay=R), layout=T), "embedding: table is float32; allowed: bfloat16; use typecast"),
        "embedding table rank4 batch": (lambda: ttnn.embedding(t(1, 5, dt=U, lay=R), t(1, 2, 64, 64, lay=R)), "embedding: table [1, 2, 64, 64] must be [rows, width], with leading axes of 1"),
        "rms_norm weight rm 1x1x1xW": (lambda: ttnn.rms_norm(t(1, 1, 32, 256), epsilon=1e-5, weight=t(1, 1, 1, 256, lay=R)), "rms_norm: ROW_MAJOR weight [1, 1, 1, 256] for width 256; it must be folded to [1, 1, 8, 32]"),
        "rms_norm weight wrong width": (lambda: ttnn.rms_norm(t(1, 1, 32, 256), epsilon=1e-5, weight=t(1, 1, 4, 32, lay=R)), "rms_norm: ROW_MAJOR weight [1, 1, 4, 32] for width 256; it must be folded to [1, 1, 8, 32]"),
        "rms_norm rm input": (lambda: ttnn.rms_norm(t(1, 1, 32, 256, lay=R), epsilon=1e-5, weight=t(1, 1, 8, 32, lay=R)), "rms_norm: input [1, 1, 32, 256] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "rms_norm uint input": (lambda: ttnn.rms_norm(t(1, 1, 32, 256, dt=U), epsilon=1e-5, weight=t(1, 1, 8, 32, lay=R)), "rms_norm: input is uint32; allowed: bfloat16, float32, bfloat8_b; use typecast"),
        "linear rm a": (lambda: ttnn.linear(t(1, 1, 32, 64, lay=R), t(64, 64)), "linear: input [1, 1, 32, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "linear rm b": (lambda: ttnn.linear(t(1, 1, 32, 64), t(64, 64, lay=R)), "linear: weight [64, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "linear inner": (lambda: ttnn.linear(t(1, 1, 32, 64), t(96, 64)), "linear: inner sizes differ: [1, 1, 32, 64] times [96, 64]"),
        "linear uint": (lambda: ttnn.linear(t(1, 1, 32, 64, dt=U), t(64, 64)), "linear: inputs are uint32 and bfloat16; floats are needed"),
        "linear host b": (lambda: ttnn.linear(t(1, 1, 32, 64), H(64, 64)), "linear: input Tensor([64, 64] bfloat16 TILE INTERLEAVED DRAM, 'host') is on the host; move it with from_torch(..., device=mesh)"),
        "minimal_matmul rm": (lambda: X.minimal_matmul(t(1, 1, 32, 64, lay=R), t(64, 64)), "minimal_matmul: input [1, 1, 32, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "minimal_matmul inner": (lambda: X.minimal_matmul(t(1, 1, 32, 64), t(96, 64)), "minimal_matmul: inner sizes differ: [1, 1, 32, 64] times [96, 64]"),
        "minimal_matmul batch b": (lambda: X.minimal_matmul(t(1, 1, 32, 64), t(1, 2, 64, 64)), "minimal_matmul: weight [1, 2, 64, 64] must have leading axes of 1"),
        "minimal_matmul f32": (lambda: X.minimal_matmul(t(1, 1, 32, 64, dt=F), t(1, 1, 64, 64, dt=F)), "minimal_matmul: float32 times float32 as float32 overflows L1; typecast the inputs to bfloat16"),
        "minimal_matmul u32": (lambda: X.minimal_matmul(t(1, 1, 32, 64, dt=U), t(1, 1, 64, 64)), "minimal_matmul: input is uint32; a float is needed"),
        "create heads rm": (lambda: X.nlp_create_qkv_heads(t(1, 1, 32, 256, lay=R), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: input [1, 1, 32, 256] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "create heads axis1": (lambda: X.nlp_create_qkv_heads(t(1, 2, 32, 256), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: input [1, 2, 32, 256] must be [batch, 1, tokens, width]"),
        "create heads rank3": (lambda: X.nlp_create_qkv_heads(t(1, 32, 256), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: input [1, 32, 256] must be [batch, 1, tokens, width]"),
        "create heads u32": (lambda: X.nlp_create_qkv_heads(t(1, 1, 32, 256, dt=U), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: input is uint32; allowed: bfloat16, float32, bfloat8_b; use typecast"),
        "create decode heads bf8": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 32, 256, dt=B8), num_heads=4, num_kv_heads=2, memory_config=hs), "nlp_create_qkv_heads_decode: input is bfloat8_b; allowed: bfloat16, float32; use typecast"),
        "create decode heads 33": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 33, 256), num_heads=4, num_kv_heads=2, memory_config=hs), "nlp_create_qkv_heads_decode: input [1, 1, 33, 256] must be [1, 1, batch, width], batch 1..32"),
        "create decode heads rm": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 32, 256, lay=R), num_heads=4, num_kv_heads=2, memory_config=hs), "nlp_create_qkv_heads_decode: input [1, 1, 32, 256] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "create decode heads dim16": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 32, 128), num_heads=4, num_kv_heads=2, memory_config=hs), "nlp_create_qkv_heads_decode: width 128 does not split into heads"),
        "create decode heads more kv than q": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 32, 320), num_heads=2, num_kv_heads=4, memory_config=hs), "nlp_create_qkv_heads_decode: 4 kv heads for 2 q heads; at least one, at most as many"),
        "create decode heads indivisible": (lambda: X.nlp_create_qkv_heads_decode(t(1, 1, 32, 288), num_heads=4, num_kv_heads=2, memory_config=hs), "nlp_create_qkv_heads_decode: width 288 does not split into heads"),
        "concat heads rm": (lambda: X.nlp_concat_heads(t(1, 4, 32, 32, lay=R)), "nlp_concat_heads: input [1, 4, 32, 32] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "concat heads rank3": (lambda: X.nlp_concat_heads(t(4, 32, 32)), "nlp_concat_heads: input [4, 32, 32] must be [batch, heads, tokens, head_dim]"),
        "concat decode heads interleaved": (lambda: X.nlp_concat_heads_decode(t(1, 3, 4, 32), num_heads=4), "nlp_concat_heads_decode: input [1, 3, 4, 32] padded to [1, 3, 32, 32] bfloat16 TILE INTERLEAVED DRAM must be height sharded"),
        "concat decode heads bf8": (lambda: X.nlp_concat_heads_decode(t(1, 3, 4, 32, dt=B8, mc=sh(32, 32, 3)), num_heads=4), "nlp_concat_heads_decode: input is bfloat8_b; allowed: bfloat16, float32; use typecast"),
        "rotary short cos": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64), t(1, 1, 32, 64), t(1, 1, 32, 64), is_decode_mode=False), "rotary_embedding_hf: cos has 32 positions, the input 64 tokens"),
        "rotary cos sin differ": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64), t(1, 1, 64, 64), t(1, 1, 96, 64), is_decode_mode=False), "rotary_embedding_hf: input [1, 4, 64, 64], cos [1, 1, 64, 64] and sin [1, 1, 96, 64] must have 4 axes, cos as sin"),
        "rotary width": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64), t(1, 1, 64, 32), t(1, 1, 64, 32), is_decode_mode=False), "rotary_embedding_hf: cos width 32 for head_dim 64"),
        "rotary rm": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64, lay=R), t(1, 1, 64, 64), t(1, 1, 64, 64), is_decode_mode=False), "rotary_embedding_hf: input [1, 4, 64, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "rotary rm cos": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64), t(1, 1, 64, 64, lay=R), t(1, 1, 64, 64, lay=R), is_decode_mode=False), "rotary_embedding_hf: cos [1, 1, 64, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "rotary dim 96": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 96), t(1, 1, 64, 96), t(1, 1, 64, 96), is_decode_mode=False), "rotary_embedding_hf: head_dim 96; it must be 32 or a multiple of 64"),
        "rotary cos heads": (lambda: X.rotary_embedding_hf(t(1, 4, 64, 64), t(1, 4, 64, 64), t(1, 4, 64, 64), is_decode_mode=False), "rotary_embedding_hf: cos [1, 4, 64, 64] must be [1, 1, positions, head_dim] in prefill"),
        "decode rotary interleaved x": (lambda: X.rotary_embedding_hf(t(1, 3, 4, 64), t(1, 3, 1, 64, mc=s3), t(1, 3, 1, 64, mc=s3), is_decode_mode=True), "rotary_embedding_hf: decode's input [1, 3, 4, 64] padded to [1, 3, 32, 64] bfloat16 TILE INTERLEAVED DRAM must be height sharded"),
        "decode rotary interleaved cos": (lambda: X.rotary_embedding_hf(t(1, 3, 4, 64, mc=s3), t(1, 3, 1, 64), t(1, 3, 1, 64), is_decode_mode=True), "rotary_embedding_hf: decode's cos [1, 3, 1, 64] padded to [1, 3, 32, 64] bfloat16 TILE INTERLEAVED DRAM must be height sharded"),
        "decode rotary batch": (lambda: X.rotary_embedding_hf(t(1, 3, 4, 64, mc=s3), t(1, 2, 1, 64, mc=sh(32, 64, 2)), t(1, 2, 1, 64, mc=sh(32, 64, 2)), is_decode_mode=True), "rotary_embedding_hf: cos for 2 users, input for 3"),
        "attention chunk 48": (lambda: sd(t(1, 4, 64, 64), t(1, 2, 64, 64), t(1, 2, 64, 64), 48), "scaled_dot_product_attention: q_chunk_size is 48; it must be a positive multiple of 32"),
        "attention chunk 512": (lambda: sd(t(1, 4, 4096, 128), t(1, 2, 4096, 128), t(1, 2, 4096, 128), 512), "scaled_dot_product_attention: q_chunk_size is 512; chunks of 512 overflow L1; use 256 or less"),
        "attention lengths differ": (lambda: sd(t(1, 4, 64, 64), t(1, 2, 128, 64), t(1, 2, 128, 64)), "scaled_dot_product_attention: causal attention of 64 queries over 128 keys; equal lengths are needed"),
        "attention kv heads": (lambda: sd(t(1, 4, 64, 64), t(1, 3, 64, 64), t(1, 3, 64, 64)), "scaled_dot_product_attention: 4 q heads over 3 kv heads; a whole number each is needed"),
        "attention k v differ": (lambda: sd(t(1, 4, 64, 64), t(1, 2, 64, 64), t(1, 4, 64, 64)), "scaled_dot_product_attention: k [1, 2, 64, 64] and v [1, 4, 64, 64] differ"),
        "attention v dim": (lambda: sd(t(1, 4, 64, 64), t(1, 2, 64, 64), t(1, 2, 64, 32)), "scaled_dot_product_attention: k [1, 2, 64, 64] and v [1, 2, 64, 32] differ"),
        "attention f32": (lambda: sd(t(1, 4, 64, 64, dt=F), t(1, 2, 64, 64, dt=F), t(1, 2, 64, 64, dt=F)), "scaled_dot_product_attention: q is float32; allowed: bfloat16, bfloat8_b, bfloat4_b; use typecast"),
        "attention rm": (lambda: sd(t(1, 4, 64, 64, lay=R), t(1, 2, 64, 64), t(1, 2, 64, 64)), "scaled_dot_product_attention: q [1, 4, 64, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "attention rank3": (lambda: sd(t(4, 64, 64), t(2, 64, 64), t(2, 64, 64)), "scaled_dot_product_attention: q [4, 64, 64] must be [batch, heads, tokens, head_dim]"),
        "attention q batch differs": (lambda: sd(t(2, 4, 64, 64), t(1, 2, 64, 64), t(1, 2, 64, 64)), "scaled_dot_product_attention: q [2, 4, 64, 64] and k [1, 2, 64, 64] differ in batch"),
        "paged attention bf8 q": (lambda: pd(q3(dt=B8), pool(), pool(), pt(), ps()), "paged_scaled_dot_product_attention_decode: q is bfloat8_b with 2 kv heads; it must be bfloat16"),
        "paged attention f32 pool": (lambda: pd(q3(), pool(F), pool(F), pt(), ps()), "paged_scaled_dot_product_attention_decode: k is float32; allowed: bfloat16, bfloat8_b, bfloat4_b; use typecast"),
        "paged attention pos uint": (lambda: pd(q3(), pool(), pool(), pt(), t(3, dt=U, lay=R)), "paged_scaled_dot_product_attention_decode: cur_pos is uint32; allowed: int32; use typecast"),
        "paged attention pos short": (lambda: pd(q3(), pool(), pool(), pt(), t(2, dt=I, lay=R)), "paged_scaled_dot_product_attention_decode: cur_pos [2]; it must be [3]"),
        "paged attention pages uint": (lambda: pd(q3(), pool(), pool(), t(3, 4, dt=U, lay=R), ps()), "paged_scaled_dot_product_attention_decode: page table is uint32; allowed: int32; use typecast"),
        "paged attention pages users": (lambda: pd(q3(), pool(), pool(), t(2, 4, dt=I, lay=R), ps()), "paged_scaled_dot_product_attention_decode: q [1, 3, 4, 64] for a page table of 2 users"),
        "paged attention pages tile": (lambda: pd(q3(), pool(), pool(), t(3, 4, dt=I, lay=T), ps()), "paged_scaled_dot_product_attention_decode: page table [3, 4] padded to [32, 32] int32 TILE INTERLEAVED DRAM must be ROW_MAJOR"),
        "paged attention out sharded": (lambda: pd(q3(), pool(), pool(), pt(), ps(), mc=s3), "paged_scaled_dot_product_attention_decode: the emulator does not shard its output, HEIGHT_SHARDED L1, shard [32, 64] on {[0-0 - 2-0]}; leave it interleaved"),
        "paged attention kv heads": (lambda: pd(q3(), t(12, 3, 32, 64, dt=B8), t(12, 3, 32, 64, dt=B8), pt(), ps()), "paged_scaled_dot_product_attention_decode: q [1, 3, 4, 64] over a cache [12, 3, 32, 64]"),
        "paged attention dim": (lambda: pd(q3(), t(12, 2, 32, 32, dt=B8), t(12, 2, 32, 32, dt=B8), pt(), ps()), "paged_scaled_dot_product_attention_decode: q [1, 3, 4, 64] over a cache [12, 2, 32, 32]"),
        "fill dtype": (lambda: X.paged_fill_cache(pool(), t(1, 2, 64, 64), pt(), batch_idx=0), "paged_fill_cache: input is bfloat16, the cache bfloat8_b; typecast to the cache's dtype"),
        "fill heads": (lambda: X.paged_fill_cache(pool(), t(1, 3, 64, 64, dt=B8), pt(), batch_idx=0), "paged_fill_cache: input [1, 3, 64, 64] for a cache [12, 2, 32, 64]"),
        "fill dim": (lambda: X.paged_fill_cache(pool(), t(1, 2, 64, 32, dt=B8), pt(), batch_idx=0), "paged_fill_cache: input [1, 2, 64, 32] for a cache [12, 2, 32, 64]"),
        "fill too long": (lambda: X.paged_fill_cache(pool(), t(1, 2, 160, 64, dt=B8), pt(), batch_idx=0), "paged_fill_cache: 160 tokens for a page table of 128 tokens a user"),
        "fill batch idx": (lambda: X.paged_fill_cache(pool(), t(1, 2, 64, 64, dt=B8), pt(), batch_idx=3), "paged_fill_cache: batch_idx 3; the page table has users 0..2"),
        "fill pages uint": (lambda: X.paged_fill_cache(pool(), t(1, 2, 64, 64, dt=B8), t(3, 4, dt=U, lay=R), batch_idx=0), "paged_fill_cache: page table is uint32; allowed: int32; use typecast"),
        "fill batch 2": (lambda: X.paged_fill_cache(pool(), t(2, 2, 64, 64, dt=B8), pt(), batch_idx=0), "paged_fill_cache: input [2, 2, 64, 64] of 2 users; without batch_idx_tensor it must be of one"),
        "update bf8": (lambda: X.paged_update_cache(pool(), k3(dt=B8), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input is bfloat8_b; allowed: bfloat16, float32; use typecast"),
        "update interleaved": (lambda: X.paged_update_cache(pool(), t(1, 3, 2, 64), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input [1, 3, 2, 64] padded to [1, 3, 32, 64] bfloat16 TILE INTERLEAVED DRAM must be sharded by height, one user a core"),
        "update idx uint": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=t(3, dt=U, lay=R), page_table=pt()), "paged_update_cache: update_idxs is uint32; allowed: int32; use typecast"),
        "update idx 2D": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=t(1, 3, dt=I, lay=R), page_table=pt()), "paged_update_cache: update_idxs [1, 3]; it must be [3]"),
        "update idx short": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=t(2, dt=I, lay=R), page_table=pt()), "paged_update_cache: update_idxs [2]; it must be [3]"),
        "update pages users": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=ps(), page_table=t(2, 4, dt=I, lay=R)), "paged_update_cache: page table for 2 users, input for 3"),
        "update pages uint": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=ps(), page_table=t(3, 4, dt=U, lay=R)), "paged_update_cache: page table is uint32; allowed: int32; use typecast"),
        "update table wider": (lambda: X.paged_update_cache(pool(), k3(), update_idxs_tensor=ps(), page_table=idx([[0]*40]*3)), "paged_update_cache: page table of 40 blocks a user for a pool of 12"),
        "update dim": (lambda: X.paged_update_cache(pool(), t(1, 3, 2, 32, mc=sh(32, 32, 3)), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input [1, 3, 2, 32] for a cache [12, 2, 32, 64]"),
        "update rm": (lambda: X.paged_update_cache(pool(), t(1, 3, 32, 64, lay=R, mc=s3), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input [1, 3, 32, 64] bfloat16 ROW_MAJOR HEIGHT_SHARDED L1, shard [32, 64] on {[0-0 - 2-0]} must be in TILE layout; convert it with to_layout"),
        "add shapes": (lambda: ttnn.add(t(1, 1, 32, 64), t(1, 1, 64, 64)), "add: shapes [1, 1, 32, 64] and [1, 1, 64, 64] differ on axis -2; sizes must be equal, or 1 on the last 6 axes"),
        "add host": (lambda: ttnn.add(t(1, 1, 32, 64), H(1, 1, 32, 64)), "add: input Tensor([1, 1, 32, 64] bfloat16 TILE INTERLEAVED DRAM, 'host') is on the host; move it with from_torch(..., device=mesh)"),
        "mul unknown kw": (lambda: ttnn.mul(t(1, 1, 20, 64), t(1, 1, 20, 64), foo=1), "mul() got an unexpected keyword argument 'foo'"),
        "typecast rm bf8": (lambda: ttnn.typecast(t(1, 1, 32, 64, lay=R), B8), "bfloat8_b in ROW_MAJOR layout; block floats exist in TILE layout only"),
        "argmax bf8": (lambda: ttnn.argmax(t(1, 1, 32, 64, dt=B8), dim=3, keepdim=True), "argmax: input is bfloat8_b; allowed: bfloat16, float32; use typecast"),
        "plus_one bf16": (lambda: ttnn.plus_one(t(1, 32, lay=R)), "plus_one: input is bfloat16; allowed: int32, uint32; use typecast"),
        "plus_one tile": (lambda: ttnn.plus_one(t(1, 32, dt=I)), "plus_one: input [1, 32] padded to [32, 32] int32 TILE INTERLEAVED DRAM must be ROW_MAJOR"),
        "plus_one u16": (lambda: ttnn.plus_one(t(1, 32, dt=ttnn.uint16, lay=R)), "plus_one: input is uint16; allowed: int32, uint32; use typecast"),
        "slice bad": (lambda: ttnn.slice(t(1, 1, 64, 64), [0, 0, 32, 0], [1, 1, 96, 64]), "slice: [32:96] on axis 2 of size 64"),
        "slice rank": (lambda: ttnn.slice(t(1, 1, 64, 64), [0, 32, 0], [1, 64, 64]), "slice: start (0, 32, 0) for [1, 1, 64, 64]: 4 numbers are needed"),
        "reshape count": (lambda: ttnn.reshape(t(1, 1, 32, 64), ttnn.Shape([1, 1, 32, 32])), "reshape: [1, 1, 32, 64] to [1, 1, 32, 32]: the element counts differ"),
        "reshape padded bad": (lambda: ttnn.reshape(t(1, 1, 32, 64), ttnn.Shape([1, 1, 3, 64]), ttnn.Shape([1, 1, 64, 64])), "reshape: [1, 1, 32, 64] to [1, 1, 3, 64] padded to [1, 1, 64, 64]: padded counts or widths differ"),
        "transpose dim 4": (lambda: ttnn.transpose(t(1, 3, 32, 64), 1, 4), "transpose: axis 4; it must be from -4 to 3"),
        "untilize rm": (lambda: ttnn.untilize(t(1, 1, 32, 64, lay=R)), "untilize: input [1, 1, 32, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "to_memory_config no shard": (lambda: ttnn.to_memory_config(t(1, 1, 32, 64), ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG), "HEIGHT_SHARDED L1 lacks a shard spec; make one with create_sharded_memory_config"),
        "to_memory_config too few cores": (lambda: ttnn.to_memory_config(t(1, 1, 128, 64), sh(32, 64, 2)), "4 shards of 32x64 for 2 cores; give a core a shard or larger shards"),
        "to_memory_config width narrower": (lambda: ttnn.to_memory_config(t(1, 1, 64, 128), sh(32, 64, 2)), "height shards are 64 wide, the tensor 128; they must be as wide as the tensor"),
        "to_memory_config 20 wide shard": (lambda: ttnn.to_memory_config(t(1, 1, 32, 64), sh(20, 64, 2)), "shard 20x64 of a tensor in TILE layout; it must be whole tiles of 32x32"),
        "to_memory_config wider shard": (lambda: ttnn.to_memory_config(t(1, 1, 64, 64), sh(32, 96, 2)), "height shards are 96 wide, the tensor 64; they must be as wide as the tensor"),
        "to_memory_config host": (lambda: ttnn.to_memory_config(H(1, 1, 64, 64), L), "to_memory_config: input Tensor([1, 1, 64, 64] bfloat16 TILE INTERLEAVED DRAM, 'host') is on the host; move it with from_torch(..., device=mesh)"),
        "interleaved_to_sharded sharded in": (lambda: ttnn.interleaved_to_sharded(t(1, 1, 64, 64, mc=sh(32, 64, 2)), sh(64, 64, 1)), "interleaved_to_sharded: [1, 1, 64, 64] bfloat16 TILE HEIGHT_SHARDED L1, shard [32, 64] on {[0-0 - 1-0]} is already sharded"),
        "interleaved_to_sharded to interleaved": (lambda: ttnn.interleaved_to_sharded(t(1, 1, 64, 64), L), "interleaved_to_sharded: output INTERLEAVED L1 must be sharded"),
        "interleaved_to_sharded few": (lambda: ttnn.interleaved_to_sharded(t(1, 1, 96, 64), sh(32, 64, 2)), "3 shards of 32x64 for 2 cores; give a core a shard or larger shards"),
        "unsqueeze_to_4D 5D": (lambda: ttnn.unsqueeze_to_4D(t(1, 1, 1, 32, 64)), "unsqueeze_to_4D: [1, 1, 1, 32, 64] has more than 4 axes"),
        "all_gather axis0": (lambda: ttnn.all_gather(t(1, 1, 32, 64), dim=3, cluster_axis=0), "all_gather: cluster_axis 0 of a 1x2 mesh spans one chip; two or more are needed"),
        "all_gather dim 4": (lambda: ttnn.all_gather(t(1, 1, 32, 64), dim=4, cluster_axis=1), "all_gather: dim 4 of a tensor of 4 axes; it must be from -4 to 3"),
        "all_gather sharded": (lambda: ttnn.all_gather(t(1, 1, 64, 64, mc=sh(32, 64, 2)), dim=3, cluster_axis=1), "all_gather: the emulator does not choose the shards of its output for an input [1, 1, 64, 64] bfloat16 TILE HEIGHT_SHARDED L1, shard [32, 64] on {[0-0 - 1-0]}; pass memory_config"),
        "all_reduce axis0": (lambda: ttnn.all_reduce(t(1, 1, 32, 64), cluster_axis=0), "all_reduce: cluster_axis 0 of a 1x2 mesh spans one chip; two or more are needed"),
        "all_reduce axis 2": (lambda: ttnn.all_reduce(t(1, 1, 32, 64), cluster_axis=2), "all_reduce: cluster_axis 2; allowed: 0, 1"),
        "copy to device shape": (lambda: ttnn.copy_host_to_device_tensor(H(1, 64, dt=U, lay=R), t(1, 32, dt=U, lay=R)), "copy_host_to_device_tensor: host [1, 64] uint32 ROW_MAJOR INTERLEAVED DRAM into device [1, 32] uint32 ROW_MAJOR INTERLEAVED DRAM; shape, dtype and layout must match"),
        "copy to device dtype": (lambda: ttnn.copy_host_to_device_tensor(H(1, 32, dt=I, lay=R), t(1, 32, dt=U, lay=R)), "copy_host_to_device_tensor: host [1, 32] int32 ROW_MAJOR INTERLEAVED DRAM into device [1, 32] uint32 ROW_MAJOR INTERLEAVED DRAM; shape, dtype and layout must match"),
        "copy to device layout": (lambda: ttnn.copy_host_to_device_tensor(H(1, 32, lay=T), t(1, 32, lay=R)), "copy_host_to_device_tensor: host [1, 32] padded to [32, 32] bfloat16 TILE INTERLEAVED DRAM into device [1, 32] bfloat16 ROW_MAJOR INTERLEAVED DRAM; shape, dtype and layout must match"),
        "copy to device device src": (lambda: ttnn.copy_host_to_device_tensor(t(1, 32, dt=U, lay=R), t(1, 32, dt=U, lay=R)), "copy_host_to_device_tensor: the source [1, 32] uint32 ROW_MAJOR INTERLEAVED DRAM is on a device; it must be a host tensor"),
        "to_torch multi": (lambda: ttnn.to_torch(t(1, 1, 32, 64)), "to_torch: a tensor on 2 chips; pass mesh_composer=ConcatMeshToTensor(mesh, dim), or read one chip with get_device_tensors"),
        "allocate bf8 rm": (lambda: t(1, 1, 32, 64, dt=B8, lay=R), "bfloat8_b in ROW_MAJOR layout; block floats exist in TILE layout only"),
        "zeros bf8 rm": (lambda: ttnn.zeros([1, 1, 32, 64], dtype=B8, layout=R, device=mesh), "bfloat8_b in ROW_MAJOR layout; block floats exist in TILE layout only"),
        "grid too small": (lambda: ttnn.num_cores_to_corerangeset(100, ttnn.CoreCoord(8, 7), True), "100 cores asked of a grid of 8x7; at most 56 are there"),
    }
    stricter: Rejected = {
        "embedding 3D batch": (lambda: ttnn.embedding(t(2, 3, 32, dt=U, lay=R), t(64, 64, lay=R), layout=T), "embedding: ids [2, 3, 32] must be [batch, 1, 1, length], [batch, length] or [length]"),
        "create heads indivisible": (lambda: X.nlp_create_qkv_heads(t(1, 1, 32, 288), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: width 288 for 4 q and 2 x 2 kv heads; head_dim must be a multiple of 32"),
        "create heads dim 16": (lambda: X.nlp_create_qkv_heads(t(1, 1, 32, 128), num_heads=4, num_kv_heads=2, transpose_k_heads=False), "nlp_create_qkv_heads: width 128 for 4 q and 2 x 2 kv heads; head_dim must be a multiple of 32"),
        "concat decode heads wrong heads": (lambda: X.nlp_concat_heads_decode(t(1, 3, 4, 32, mc=sh(32, 32, 3)), num_heads=3), "nlp_concat_heads_decode: num_heads 3 for input [1, 3, 4, 32], which has 4"),
        "concat decode heads more heads": (lambda: X.nlp_concat_heads_decode(t(1, 3, 4, 32, mc=sh(32, 32, 3)), num_heads=8), "nlp_concat_heads_decode: num_heads 8 for input [1, 3, 4, 32], which has 4"),
        "attention chunk 512 dim 64": (lambda: sd(t(1, 4, 4096, 64), t(1, 2, 4096, 64), t(1, 2, 4096, 64), 512), "scaled_dot_product_attention: q_chunk_size is 512; chunks of 512 overflow L1; use 256 or less"),
        "paged attention kv differ": (lambda: pd(q3(), pool(), t(10, 2, 32, 64, dt=B8), pt(), ps()), "paged_scaled_dot_product_attention_decode: q [1, 3, 4, 64], k [12, 2, 32, 64] and v [10, 2, 32, 64] must have 4 axes, k as v"),
        "fill pages tile": (lambda: X.paged_fill_cache(pool(), t(1, 2, 64, 64, dt=B8), t(3, 4, dt=I, lay=T), batch_idx=0), "paged_fill_cache: page table [3, 4] padded to [32, 32] int32 TILE INTERLEAVED DRAM must be ROW_MAJOR"),
        "fill rm": (lambda: X.paged_fill_cache(t(12, 2, 32, 64), t(1, 2, 64, 64, lay=R), pt(), batch_idx=0), "paged_fill_cache: input [1, 2, 64, 64] bfloat16 ROW_MAJOR INTERLEAVED DRAM must be in TILE layout; convert it with to_layout"),
        "update heads": (lambda: X.paged_update_cache(pool(), t(1, 3, 4, 64, mc=s3), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input [1, 3, 4, 64] for a cache [12, 2, 32, 64]"),
        "update fewer heads": (lambda: X.paged_update_cache(pool(), t(1, 3, 1, 64, mc=s3), update_idxs_tensor=ps(), page_table=pt()), "paged_update_cache: input [1, 3, 1, 64] for a cache [12, 2, 32, 64]"),
        "grid zero": (lambda: ttnn.num_cores_to_corerangeset(0, ttnn.CoreCoord(8, 7), True), "0 cores asked of a grid of 8x7; at most 56 are there"),
        "linear dtype u32": (lambda: ttnn.linear(t(1, 1, 32, 64), t(64, 64), dtype=U), "linear: dtype uint32 of a product of floats; a float is needed"),
        "paged attention block 16": (lambda: pd(q3(), t(12, 2, 16, 64, dt=B8), t(12, 2, 16, 64, dt=B8), pt(), ps()), "paged_scaled_dot_product_attention_decode: the emulator does not hold a cache of 16 tokens a block, [12, 2, 16, 64] padded to [12, 2, 32, 64] bfloat8_b TILE INTERLEAVED DRAM; give it a multiple of 32"),
        "all_reduce u32": (lambda: ttnn.all_reduce(t(1, 1, 32, 64, dt=U), cluster_axis=1), "all_reduce: the emulator does not sum uint32, which ttnn does for some shapes only; use typecast"),
    }
    return rejected, stricter
# fmt: on


def outcome(call: Call) -> str | None:
    """Return the message of the error that a call raises, None when it raises none."""
    try:
        call()
    except Exception as error:  # the real runtime has RuntimeError, TypeError and more
        return str(error)
    return None


if __name__ == "__main__":
    from disagg_tt.device import ttnn

    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    dispatch = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 2), dispatch_core_config=dispatch)
    rejected, stricter = calls(ttnn, mesh)
    print("RESULT", json.dumps({name: outcome(call) for name, (call, _) in {**rejected, **stricter}.items()}))
