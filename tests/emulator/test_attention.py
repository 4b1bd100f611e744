"""Heads, rotary embedding and attention against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensors import ROW_MAJOR, assert_rounded, bfloat16, chips, generator, height_sharded, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError, NotEmulatedError


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


# ---------------------------------------------------------------- heads and rotary embedding


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (4, 4, 64), (8, 1, 32)])
def test_splitting_and_joining_heads_in_prefill(mesh: Any, heads: int, kv_heads: int, dim: int) -> None:
    x = values(1, 2, 50, (heads + 2 * kv_heads) * dim)
    parts = ttnn.experimental.nlp_create_qkv_heads(
        put(mesh, x, cut=1), num_heads=heads, num_kv_heads=kv_heads, transpose_k_heads=False
    )
    for chip in range(2):
        split = x[0, chip].view(50, -1, dim).transpose(0, 1)[None]
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        for got, expected in zip(parts, (q, k, v), strict=True):
            assert torch.equal(chips(got)[chip], expected)
        joined = chips(ttnn.experimental.nlp_concat_heads(parts[0]))[chip]
        assert torch.equal(joined, x[:, chip : chip + 1, :, : heads * dim])


@pytest.mark.parametrize("users", [1, 3, 32])
def test_splitting_and_joining_heads_in_decode(mesh: Any, users: int) -> None:
    x = values(1, 2, 32, 8 * 32)
    device = put(mesh, x, cut=1)
    if users < 32:
        device = ttnn.reshape(device, ttnn.Shape([1, 1, users, 256]), ttnn.Shape([1, 1, 32, 256]))
    q, k, v = ttnn.experimental.nlp_create_qkv_heads_decode(
        device, num_heads=4, num_kv_heads=2, memory_config=ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG
    )
    for chip in range(2):
        split = x[:, chip, :users].view(1, users, 8, 32).split([4, 2, 2], dim=2)
        for got, expected in zip((q, k, v), split, strict=True):
            assert torch.equal(chips(got)[chip], expected)
    moved = ttnn.to_memory_config(q, height_sharded(mesh, users, 32, 32))
    joined = ttnn.experimental.nlp_concat_heads_decode(moved, num_heads=4)
    assert list(joined.shape) == [1, 1, 32, 128]
    for chip, got in enumerate(chips(joined)):
        assert torch.equal(got[0, 0, :users], x[0, chip, :users, :128])
        assert got[0, 0, users:].isnan().all(), "rows past the users are undefined and must not look computed"


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def test_rotary_embedding_in_prefill_uses_the_first_rows(mesh: Any) -> None:
    x, cos, sin = values(1, 4, 40, 64), values(1, 1, 96, 64, seed=1), values(1, 1, 96, 64, seed=2)
    result = ttnn.experimental.rotary_embedding_hf(
        put(mesh, x, cut=1), put(mesh, cos), put(mesh, sin), is_decode_mode=False
    )
    assert_rounded(torch.cat(chips(result), dim=1), rotate_half(x, cos[:, :, :40], sin[:, :, :40]))


def test_rotary_embedding_in_decode_uses_each_users_row(mesh: Any) -> None:
    place = height_sharded(mesh, 3, 32, 64)
    x, cos, sin = values(1, 3, 4, 64), values(1, 3, 1, 64, seed=1), values(1, 3, 1, 64, seed=2)
    device = [
        ttnn.to_memory_config(put(mesh, v, cut=c), place) for v, c in ((x, 2), (cos, None), (sin, None))
    ]
    result = ttnn.experimental.rotary_embedding_hf(*device, is_decode_mode=True)
    assert_rounded(torch.cat(chips(result), dim=2), rotate_half(x, cos, sin))


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (2, 2)])
@pytest.mark.parametrize("tokens", [1, 33, 70])
@pytest.mark.parametrize("dtype", [ttnn.bfloat16, ttnn.bfloat8_b], ids=lambda d: d.value)
def test_causal_attention(mesh: Any, heads: int, kv_heads: int, tokens: int, dtype: Any) -> None:
    q, k, v = (values(1, n, tokens, 32, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    device = [put(mesh, q, cut=1), *(put(mesh, x, dtype, cut=1) for x in (k, v))]
    result = ttnn.transformer.scaled_dot_product_attention(*device, is_causal=True, scale=0.3)
    for qs, ks, vs, got in zip(*map(chips, device), chips(result), strict=True):
        group = heads // kv_heads
        ks, vs = (x.repeat_interleave(group, dim=1) for x in (ks, vs))
        scores = (qs @ ks.transpose(-1, -2) * 0.3).masked_fill(
            torch.ones(tokens, tokens).triu(1).bool(), -torch.inf
        )
        assert_rounded(got, scores.softmax(-1) @ vs)


def test_causal_attention_of_a_batch(mesh: Any) -> None:
    q, k, v = (values(2, 4, 40, 32, seed=i) for i in range(3))
    result = ttnn.transformer.scaled_dot_product_attention(
        *(put(mesh, x, cut=1) for x in (q, k, v)), is_causal=True
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_rounded(torch.cat(chips(result), dim=1), expected)


@pytest.mark.parametrize("mask", [None, (2, 4), (1, 4), (1, 1)])
@pytest.mark.parametrize("concat", [False, True])
def test_attention_under_a_mask_or_over_all(mesh: Any, mask: tuple[int, int] | None, concat: bool) -> None:
    q, k, v = values(2, 4, 33, 32), values(2, 2, 40, 32, seed=1), values(2, 2, 40, 32, seed=2)
    added = None if mask is None else values(*mask, 33, 40, seed=3)
    result = ttnn.transformer.scaled_dot_product_attention(
        *(put(mesh, x) for x in (q, k, v)),
        is_causal=False,
        attn_mask=None if added is None else put(mesh, added),
        output_concat_heads=concat,
    )
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / 32**0.5 + (0 if added is None else added)
    expected = scores.softmax(-1) @ v
    if concat:
        expected = expected.transpose(1, 2).reshape(2, 1, 33, 128)
    assert_rounded(same_on_all(result), expected)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("start", "tokens", "block"), [(0, 64, 32), (64, 64, 32), (96, 33, 64), (128, 32, 64)]
)
def test_chunked_attention_is_causal_attention_from_its_start(
    mesh: Any, start: int, tokens: int, block: int, as_tensor: bool
) -> None:
    pages = torch.randperm(2 * 8, generator=generator(4)).view(2, 8).to(torch.int32)
    q = values(2, 8, tokens, 32)  # cut over the chips: 4 heads each
    history = [values(2, 4, 8 * block, 32, seed=s) for s in (1, 2)]  # [users, kv_heads, tokens, dim]
    pools = []
    for tokens_ in history:
        pool = torch.zeros(16, 4, block, 32)
        blocks = tokens_.unflatten(2, (8, block)).transpose(1, 2)
        pool[pages.reshape(-1).long()] = blocks.flatten(0, 1)
        pools.append(put(mesh, pool, cut=1))
    where: dict[str, Any] = {"chunk_start_idx": start}
    if as_tensor:
        index = torch.tensor([start], dtype=torch.int32)
        where = {"chunk_start_idx_tensor": put(mesh, index, ttnn.int32, ROW_MAJOR)}
    table = put(mesh, pages, ttnn.int32, ROW_MAJOR)
    result = ttnn.transformer.chunked_scaled_dot_product_attention(
        put(mesh, q, cut=1), *pools, table, **where
    )
    k, v = (x[:, :, : start + tokens].repeat_interleave(2, dim=1) for x in history)
    scores = q @ k.transpose(-1, -2) / 32**0.5
    seen = torch.arange(start + tokens) <= start + torch.arange(tokens)[:, None]
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert_rounded(torch.cat(chips(result), dim=1), expected)


def test_chunked_attention_past_the_cache_or_off_a_chunk_is_rejected(mesh: Any) -> None:
    pools = [put(mesh, torch.zeros(8, 1, 32, 32)) for _ in range(2)]
    table = put(mesh, torch.arange(8, dtype=torch.int32)[None], ttnn.int32, ROW_MAJOR)
    q = put(mesh, values(1, 2, 64, 32))
    attend = ttnn.transformer.chunked_scaled_dot_product_attention
    with pytest.raises(DeviceError, match="64 queries from 224 on for 256 tokens a user"):
        attend(q, *pools, table, 224)
    chunks = ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=ttnn.CoreCoord(8, 7), q_chunk_size=64, k_chunk_size=64
    )
    with pytest.raises(DeviceError, match="chunk_start_idx 32; it must be 0 or more and a multiple of .* 64"):
        attend(q, *pools, table, 32, program_config=chunks)


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("positions", [[0, 31, 95], [64, 5, 33], [200, 3, 1]])
def test_decode_attention_over_a_plain_cache(mesh: Any, positions: list[int], by_value: bool) -> None:
    q = values(1, 3, 8, 32)  # cut over the chips: 4 heads each
    k, v = values(3, 4, 256, 32, seed=1), values(3, 4, 256, 32, seed=2)
    where: dict[str, Any] = {"cur_pos": positions}
    if not by_value:
        where = {
            "cur_pos_tensor": put(mesh, torch.tensor(positions, dtype=torch.int32), ttnn.int32, ROW_MAJOR)
        }
    result = ttnn.transformer.scaled_dot_product_attention_decode(
        put(mesh, q, cut=2), *(put(mesh, x, cut=1) for x in (k, v)), scale=0.3, **where
    )
    expected = torch.zeros(1, 3, 8, 32)
    for user, position in enumerate(positions):
        keys, held = (x[user, :, : position + 1].repeat_interleave(2, dim=0) for x in (k, v))
        scores = torch.einsum("hd,htd->ht", q[0, user], keys) * 0.3
        expected[0, user] = torch.einsum("ht,htd->hd", scores.softmax(-1), held)
    assert_rounded(torch.cat(chips(result), dim=2), expected)


def test_rotary_embedding_llama_turns_pairs_of_neighbours(mesh: Any) -> None:
    matrix = torch.zeros(32, 32)
    even = torch.arange(0, 32, 2)
    matrix[even, even + 1], matrix[even + 1, even] = 1, -1
    half = torch.randn(1, 1, 96, 32, generator=generator(3))
    cos, sin = (bfloat16(f(half)).repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))

    def expected(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        c, s = c[..., 0::2], s[..., 0::2]
        return torch.stack([first * c - second * s, second * c + first * s], dim=-1).flatten(-2)

    x = values(1, 4, 40, 64)
    result = ttnn.experimental.rotary_embedding_llama(
        put(mesh, x, cut=1),
        put(mesh, cos),
        put(mesh, sin),
        put(mesh, matrix[None, None]),
        is_decode_mode=False,
    )
    assert_rounded(torch.cat(chips(result), dim=1), expected(x, cos[:, :, :40], sin[:, :, :40]))

    place, tile = height_sharded(mesh, 3, 32, 64), height_sharded(mesh, 3, 32, 32)
    x, c, s = values(1, 3, 8, 64), cos[:, :, 5:8].transpose(1, 2), sin[:, :, 5:8].transpose(1, 2)
    device = [ttnn.to_memory_config(put(mesh, v), place) for v in (x, c, s)]
    many = ttnn.to_memory_config(put(mesh, matrix.repeat(3, 1)[None, None]), tile)
    result = ttnn.experimental.rotary_embedding_llama(*device, many, is_decode_mode=True)
    assert_rounded(same_on_all(result), expected(x, c, s))


def test_heads_with_keys_transposed_and_from_two_inputs(mesh: Any) -> None:
    x, both = values(2, 1, 40, 4 * 32), values(2, 1, 40, 2 * 2 * 32, seed=1)
    q, k, v = ttnn.experimental.nlp_create_qkv_heads(
        put(mesh, x), put(mesh, both), num_heads=4, num_kv_heads=2
    )
    assert torch.equal(same_on_all(q), x.view(2, 40, 4, 32).transpose(1, 2))
    assert torch.equal(same_on_all(k), both[..., :64].reshape(2, 40, 2, 32).permute(0, 2, 3, 1))
    assert torch.equal(same_on_all(v), both[..., 64:].reshape(2, 40, 2, 32).transpose(1, 2))


def test_what_is_not_emulated_says_so(mesh: Any) -> None:
    q = put(mesh, values(1, 2, 32, 32))
    with pytest.raises(NotEmulatedError, match="the emulator does not take sliding_window_size"):
        ttnn.transformer.scaled_dot_product_attention(q, q, q, sliding_window_size=32)
    with pytest.raises(NotEmulatedError, match="the emulator does not shard its output"):
        ttnn.transformer.scaled_dot_product_attention(q, q, q, memory_config=height_sharded(mesh, 2, 32, 32))
    mask = put(mesh, values(1, 1, 32, 32), memory=ttnn.L1_MEMORY_CONFIG)
    with pytest.raises(DeviceError, match="attn_mask .* must be interleaved in DRAM"):
        ttnn.transformer.scaled_dot_product_attention(q, q, q, is_causal=False, attn_mask=mask)
