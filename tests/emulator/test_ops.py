"""The numbers of each op against a written-out torch reference, and against ttnn's golden functions where there is one.

Meshes are 1x2 unless a test says otherwise; where an op works chip by chip, each chip has values of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensors import (
    ROW_MAJOR,
    TILE,
    OpenMesh,
    assert_rounded,
    bfloat16,
    chips,
    generator,
    height_sharded,
    put,
    same_on_all,
)

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.types import DataType

NAN = float("nan")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


# ---------------------------------------------------------------- matmul


@pytest.mark.parametrize(
    "op", [ttnn.linear, ttnn.experimental.minimal_matmul], ids=["linear", "minimal_matmul"]
)
@pytest.mark.parametrize("weight", [ttnn.bfloat16, ttnn.bfloat8_b, ttnn.bfloat4_b], ids=lambda d: d.value)
@pytest.mark.parametrize("rows", [1, 32, 50])
def test_matmul_with_weights_cut_by_columns(mesh: Any, op: Any, weight: Any, rows: int) -> None:
    a, b = values(1, 1, rows, 64), values(1, 1, 64, 192, seed=1)
    device = put(mesh, b, weight, cut=3)
    result = op(put(mesh, a), device, dtype=ttnn.bfloat16)
    for got, held in zip(chips(result), chips(device), strict=True):
        assert_rounded(got, a @ held)


def test_matmul_with_rows_cut_and_reduced_is_the_whole_product(mesh: Any) -> None:
    a, b = values(1, 1, 40, 128), values(1, 1, 128, 64, seed=1)
    partial = ttnn.linear(put(mesh, a, cut=3), put(mesh, b, cut=2), dtype=ttnn.float32)
    torch.testing.assert_close(
        same_on_all(ttnn.all_reduce(partial, cluster_axis=1)), a @ b, rtol=1e-5, atol=1e-4
    )


def test_matmul_rounds_once_to_the_dtype_asked_for(mesh: Any) -> None:
    a, b = values(1, 1, 32, 64), values(1, 1, 64, 64, seed=1)
    result = ttnn.linear(put(mesh, a), put(mesh, b), dtype=ttnn.bfloat8_b)
    assert result.dtype is ttnn.bfloat8_b
    torch.testing.assert_close(
        same_on_all(result), round_on_device(a @ b, DataType.BFLOAT8_B), rtol=0.02, atol=0.1
    )
    assert torch.equal(same_on_all(result), round_on_device(same_on_all(result), DataType.BFLOAT8_B))


# ---------------------------------------------------------------- element by element


def test_add_rounds_ties_away_from_zero(mesh: Any) -> None:
    ulp = 2.0**-7
    a, b = (
        torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
        torch.tensor([[ulp / 2, 3 * ulp / 2, -ulp / 2, -3 * ulp / 2]]),
    )
    assert same_on_all(ttnn.add(put(mesh, a), put(mesh, b))).tolist() == [
        [1 + ulp, 1 + 2 * ulp, -1 - ulp, -1 - 2 * ulp]
    ]


@pytest.mark.parametrize("cuts", [(None, None), (None, 1), (1, None), (1, 1)])
def test_add_and_mul_of_replicated_and_cut_tensors(mesh: Any, cuts: tuple[int | None, int | None]) -> None:
    a, b = values(1, 2, 40, 64), values(1, 2, 40, 64, seed=1)
    x, y = ((v[:, :1] if cut is None else v) for v, cut in zip((a, b), cuts, strict=True))
    left, right = put(mesh, x, cut=cuts[0]), put(mesh, y, cut=cuts[1])
    activated = [ttnn.UnaryOpType.SILU]
    for chip in range(2):
        i, j = (
            x[:, chip % x.shape[1] : chip % x.shape[1] + 1],
            y[:, chip % y.shape[1] : chip % y.shape[1] + 1],
        )
        assert_rounded(chips(ttnn.add(left, right))[chip], i + j)
        assert_rounded(chips(ttnn.mul(left, right))[chip], i * j)
        assert_rounded(
            chips(ttnn.mul(left, right, input_tensor_a_activations=activated))[chip], F.silu(i) * j
        )
    assert torch.equal(torch.cat(chips(left), dim=1)[:, : x.shape[1]], x), "an input was modified"


@pytest.mark.parametrize(
    "dtype", [DataType.BFLOAT8_B, DataType.BFLOAT4_B, DataType.BFLOAT16, DataType.FLOAT32]
)
def test_typecast_rounds_as_the_device_packs_and_leaves_its_input(mesh: Any, dtype: DataType) -> None:
    exact = torch.randn(1, 1, 40, 64, generator=generator(2))
    x = put(mesh, exact, ttnn.float32)
    result = ttnn.typecast(x, dtype)
    assert torch.equal(same_on_all(result), round_on_device(exact.clone(), dtype))
    assert torch.equal(same_on_all(x), exact)
    assert result.dtype is dtype


@pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["folded rows", "tile"])
@pytest.mark.parametrize("cut", [None, 1])
def test_rms_norm(mesh: Any, layout: Any, cut: int | None) -> None:
    x, weight = bfloat16(values(1, 2, 50, 128) * 3), values(128, seed=1)
    device = put(
        mesh, weight.reshape((1, 1, 4, 32) if layout is ROW_MAJOR else (1, 1, 1, 128)), layout=layout
    )
    result = ttnn.rms_norm(put(mesh, x, cut=cut), epsilon=1e-5, weight=device)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_rounded(torch.cat(chips(result), dim=1)[:, :2], expected)


def test_rms_norm_without_epsilon_has_ttnns_own_tiny_one(mesh: Any) -> None:
    tiny = torch.full((1, 1, 32, 32), 1e-5)
    weight = put(mesh, torch.ones(1, 1, 1, 32), layout=ROW_MAJOR)
    assert same_on_all(ttnn.rms_norm(put(mesh, tiny), weight=weight)).max().item() == pytest.approx(
        1, rel=0.01
    )
    assert same_on_all(ttnn.rms_norm(put(mesh, tiny), weight=weight, epsilon=1e-5)).max().item() < 0.01


def test_argmax_gives_each_rows_first_largest(mesh: Any) -> None:
    x = values(1, 1, 32, 100)
    x[0, 0, 3, [7, 50]] = 9
    for layout in (ROW_MAJOR, TILE):
        result = ttnn.argmax(put(mesh, x, layout=layout), dim=3, keepdim=True)
        assert (result.dtype, result.layout) == (ttnn.uint32, ROW_MAJOR)
        assert torch.equal(same_on_all(result), x.argmax(-1, keepdim=True))
    assert same_on_all(result)[0, 0, 3].item() == 7


def test_plus_one_is_in_place_and_may_skip_negative_entries(mesh: Any) -> None:
    start = torch.tensor([3, -1, 7], dtype=torch.int32)
    host = ttnn.from_torch(start, dtype=ttnn.int32)
    x = put(mesh, torch.zeros(3, dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    ttnn.copy_host_to_device_tensor(host, x)
    assert ttnn.plus_one(x, skip_negative_entries=True) is x
    assert same_on_all(x).tolist() == [4, -1, 8]
    ttnn.plus_one(x)
    assert same_on_all(x).tolist() == [5, 0, 9]
    assert ttnn.to_torch(host).tolist() == start.tolist() == [3, -1, 7], "the host's values changed"


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (1, 40)])
@pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["rows", "tile"])
def test_embedding_of_a_table_cut_by_columns(mesh: Any, shape: tuple[int, ...], layout: Any) -> None:
    table = values(1, 1, 50, 128)
    ids = torch.randint(0, 50, shape, generator=generator(1))
    result = ttnn.embedding(
        put(mesh, ids, ttnn.uint32, ROW_MAJOR), put(mesh, table, layout=ROW_MAJOR, cut=3), layout=layout
    )
    assert list(result.shape) == [1, 40, 64]
    assert torch.equal(torch.cat(chips(result), dim=-1), table[0, 0][ids.reshape(1, -1)])


def test_embedding_of_a_batch_with_ids_of_their_own_a_chip(mesh: Any) -> None:
    table = values(1, 1, 50, 64)
    ids = torch.randint(0, 50, (4, 7), generator=generator(1))
    result = ttnn.embedding(put(mesh, ids, ttnn.uint32, ROW_MAJOR, cut=0), put(mesh, table, layout=ROW_MAJOR))
    assert torch.equal(torch.cat(chips(result)), table[0, 0][ids])


@pytest.mark.parametrize(("before", "after"), [((1, 32, 64), (1, 1, 32, 64)), ((1, 1, 32, 64), (1, 32, 1, 64)),
                                               ((1, 2, 20, 64), (1, 1, 40, 64)), ((1, 1, 8, 96), (1, 3, 8, 32))])  # fmt: skip
@pytest.mark.parametrize("cut", [None, 0])
def test_reshape_keeps_the_values_in_order(mesh: Any, before: Any, after: Any, cut: int | None) -> None:
    x = values(2, *before[1:]) if cut == 0 else values(*before)
    result = ttnn.reshape(put(mesh, x, cut=cut), ttnn.Shape(after))
    assert list(result.shape) == list(after)
    for chip, got in enumerate(chips(result)):
        assert torch.equal(got, x[chip if cut == 0 else 0].reshape(after))


def test_reshape_with_padding_moves_rows_out_of_and_into_the_logical_part(mesh: Any) -> None:
    x = values(1, 1, 32, 64)
    three = ttnn.reshape(put(mesh, x), ttnn.Shape([1, 1, 3, 64]), ttnn.Shape([1, 1, 32, 64]))
    assert (list(three.shape), list(three.padded_shape)) == ([1, 1, 3, 64], [1, 1, 32, 64])
    assert torch.equal(same_on_all(three), x[:, :, :3])
    back = same_on_all(ttnn.reshape(three, ttnn.Shape([1, 1, 32, 64]), ttnn.Shape([1, 1, 32, 64])))
    assert torch.equal(back[:, :, :3], x[:, :, :3])
    assert back[:, :, 3:].isnan().all(), "rows that the emulator does not keep must read as undefined"


@pytest.mark.parametrize("axes", [(1, 2), (2, 3), (-1, -2), (1, 1)])
def test_transpose(mesh: Any, axes: tuple[int, int]) -> None:
    x = values(2, 3, 5, 64)
    result = ttnn.transpose(put(mesh, x, cut=0), *axes)
    assert torch.equal(torch.cat(chips(result)), x.transpose(*axes))


def test_slice_of_rows_and_columns(mesh: Any) -> None:
    x = values(1, 2, 70, 128)
    device = put(mesh, x, cut=1)
    result = ttnn.slice(device, [0, 0, 32, 64], [1, 1, 70, 128])
    assert torch.equal(torch.cat(chips(result), dim=1), x[:, :, 32:70, 64:])
    assert torch.equal(torch.cat(chips(ttnn.slice(device, [0, 0, 0, 0], [1, 1, 70, 128])), dim=1), x)


def test_layout_and_memory_moves_keep_the_values(mesh: Any) -> None:
    x = values(1, 3, 4, 64)
    device = put(mesh, x)
    place = height_sharded(mesh, 3, 32, 64)
    for moved in (
        ttnn.untilize(device),
        ttnn.to_memory_config(device, ttnn.L1_MEMORY_CONFIG),
        ttnn.interleaved_to_sharded(device, place),
        ttnn.to_memory_config(ttnn.to_memory_config(device, place), ttnn.DRAM_MEMORY_CONFIG),
        ttnn.unsqueeze_to_4D(ttnn.reshape(device, [3, 4, 64])),
    ):
        assert torch.equal(same_on_all(moved), x)
    assert ttnn.untilize(put(mesh, x, ttnn.bfloat8_b)).dtype is ttnn.bfloat16


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


def test_what_is_computed_from_undefined_rows_is_undefined(mesh: Any) -> None:
    q = ttnn.to_memory_config(put(mesh, values(1, 3, 2, 64)), height_sharded(mesh, 3, 32, 64))
    x = ttnn.to_memory_config(
        ttnn.experimental.nlp_concat_heads_decode(q, num_heads=2), ttnn.L1_MEMORY_CONFIG
    )
    whole = put(mesh, values(1, 1, 32, 128), memory=ttnn.L1_MEMORY_CONFIG)
    h = ttnn.add(
        whole,
        ttnn.rms_norm(
            ttnn.mul(x, whole), epsilon=1e-5, weight=put(mesh, torch.ones(1, 1, 4, 32), layout=ROW_MAJOR)
        ),
    )
    h = ttnn.all_reduce(ttnn.linear(h, put(mesh, values(1, 1, 128, 64))), cluster_axis=1)
    logits = ttnn.untilize(ttnn.all_gather(h, dim=3, cluster_axis=1))
    read = same_on_all(logits)
    assert read[0, 0, :3].isfinite().all()
    assert read[0, 0, 3:].isnan().all()
    last = same_on_all(ttnn.slice(logits, [0, 0, 2, 0], [1, 1, 4, 128]))
    assert torch.equal(last.isnan().all(-1).flatten(), torch.tensor([False, True]))
    chosen = ttnn.reshape(ttnn.argmax(logits, dim=3, keepdim=True), ttnn.Shape([1, 32]))
    assert torch.equal(same_on_all(chosen)[0, :3], read[0, 0, :3].argmax(-1))
    embedded = ttnn.embedding(chosen, put(mesh, values(1, 1, 128, 64), layout=ROW_MAJOR), layout=TILE)
    assert torch.equal(same_on_all(embedded)[0].isnan().all(-1), torch.arange(32) >= 3)


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


# ---------------------------------------------------------------- collectives and mesh shapes


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 2), (2, 1)])
def test_gather_and_reduce_over_every_mesh(open_mesh: OpenMesh, shape: tuple[int, int]) -> None:
    mesh, count = open_mesh(*shape), shape[0] * shape[1]
    if min(shape) > 1 or shape == (2, 1):
        mesh.reshape(ttnn.MeshShape(1, count))
    x = values(1, 1, 40, 64 * count)
    device = put(mesh, x, cut=3)
    assert torch.equal(same_on_all(ttnn.all_gather(device, dim=3, cluster_axis=1)), x)
    assert torch.equal(same_on_all(ttnn.all_gather(device, dim=2)), torch.cat(x.chunk(count, 3), dim=2))
    assert_rounded(same_on_all(ttnn.all_reduce(device, cluster_axis=1)), sum(x.chunk(count, 3)))  # type: ignore[arg-type]


def test_gather_and_reduce_of_what_all_chips_share(mesh: Any) -> None:
    x = values(1, 1, 40, 64)
    assert torch.equal(same_on_all(ttnn.all_gather(put(mesh, x), dim=-1)), torch.cat([x, x], dim=-1))
    assert_rounded(same_on_all(ttnn.all_reduce(put(mesh, x))), 2 * x)


def test_gathering_rows_of_which_some_are_undefined_keeps_each_chips_rows_apart(mesh: Any) -> None:
    q = ttnn.to_memory_config(put(mesh, values(1, 3, 2, 64), cut=3), height_sharded(mesh, 3, 32, 32))
    x = ttnn.to_memory_config(
        ttnn.experimental.nlp_concat_heads_decode(q, num_heads=2), ttnn.DRAM_MEMORY_CONFIG
    )
    gathered = same_on_all(ttnn.all_gather(x, dim=2, cluster_axis=1))
    for chip, part in enumerate(chips(x)):
        torch.testing.assert_close(
            gathered[:, :, 32 * chip : 32 * (chip + 1)], part, rtol=0, atol=0, equal_nan=True
        )


def test_a_submesh_computes_on_its_own_chips(open_mesh: OpenMesh) -> None:
    parent = open_mesh(2, 2)
    low = parent.create_submesh(ttnn.MeshShape(1, 2), ttnn.MeshCoordinate(1, 0))
    assert low.get_device_ids() == [2, 3]
    x = values(1, 1, 32, 64)
    assert torch.equal(same_on_all(ttnn.all_gather(put(low, x, cut=3), dim=3, cluster_axis=1)), x)


# ---------------------------------------------------------------- host and device


@pytest.mark.parametrize(
    ("dtype", "numbers"), [(ttnn.uint32, [0, 35308, 2**32 - 1]), (ttnn.int32, [-(2**31), -1, 2**31 - 1]), (ttnn.uint16, [35308])]
)  # fmt: skip
def test_integers_are_exact_on_the_device(mesh: Any, dtype: Any, numbers: list[int]) -> None:
    assert same_on_all(put(mesh, torch.tensor([numbers]), dtype, ROW_MAJOR)).tolist() == [numbers]


def test_changing_the_host_tensor_afterwards_changes_nothing_on_the_device(mesh: Any) -> None:
    for dtype, torch_dtype in ((ttnn.float32, torch.float32), (ttnn.uint32, torch.int64)):
        source = torch.ones(2, 32, dtype=torch_dtype)
        device, host = put(mesh, source, dtype, ROW_MAJOR), ttnn.from_torch(source, dtype=dtype)
        source.fill_(7)
        assert same_on_all(device).unique().tolist() == [1]
        read = ttnn.to_torch(host)
        read.fill_(9)
        assert ttnn.to_torch(host).to(torch.int64).unique().tolist() == [1]


def test_a_composer_joins_the_chips_shards(mesh: Any) -> None:
    x = values(1, 1, 40, 128)
    assert torch.equal(
        ttnn.to_torch(put(mesh, x, cut=3), mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=3)).float(), x
    )
    twice = ttnn.to_torch(put(mesh, x), mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0)).float()
    assert torch.equal(twice, torch.cat([x, x]))


def test_an_allocated_tensor_reads_as_undefined_and_so_does_what_is_computed_from_it(mesh: Any) -> None:
    spec = ttnn.TensorSpec(ttnn.Shape([1, 1, 32, 64]), ttnn.bfloat16, TILE)
    x = ttnn.allocate_tensor_on_device(spec, mesh)
    for tensor in (x, ttnn.add(x, put(mesh, values(1, 1, 32, 64))), ttnn.all_gather(x, dim=3)):
        assert same_on_all(tensor).isnan().all()
    assert (same_on_all(ttnn.argmax(x, dim=3)) == 2**32 - 1).all()
    ttnn.copy_host_to_device_tensor(
        ttnn.from_torch(torch.ones(1, 1, 32, 64), dtype=ttnn.bfloat16, layout=TILE), x
    )
    assert same_on_all(x).unique().tolist() == [1]


# ---------------------------------------------------------------- ttnn's golden functions

GOLDEN = """
import json, torch, ttnn as real
from disagg_tt.device import emulator as ttnn

ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
g = torch.Generator().manual_seed(21)


def values(*shape):
    return torch.randn(shape, generator=g).bfloat16().float()


def put(x, layout=ttnn.TILE_LAYOUT, dtype=ttnn.bfloat16):
    return ttnn.from_torch(x, dtype=dtype, layout=layout, device=mesh)


rows = ttnn.ROW_MAJOR_LAYOUT
x, y, w, norm = values(1, 1, 64, 128), values(1, 1, 64, 128), values(1, 1, 128, 64), values(1, 1, 1, 128)
q, k, v = values(1, 4, 64, 32), values(1, 4, 64, 32), values(1, 4, 64, 32)
ids, table = torch.randint(0, 50, (1, 40), generator=g), values(50, 64)
attend, sdpa = ttnn.transformer.scaled_dot_product_attention, real.transformer.scaled_dot_product_attention
cases = {
    "add": (ttnn.add(put(x), put(y)), real.add, (x, y), {}),
    "mul": (ttnn.mul(put(x), put(y)), real.mul, (x, y), {}),
    "linear": (ttnn.linear(put(x), put(w)), real.linear, (x, w), {}),
    "rms_norm": (
        ttnn.rms_norm(put(x), epsilon=1e-5, weight=put(norm)), real.rms_norm, (x,), {"epsilon": 1e-5, "weight": norm[0, 0, 0]}
    ),
    "embedding": (ttnn.embedding(put(ids, rows, ttnn.uint32), put(table, rows)), real.embedding, (ids, table), {}),
    "argmax": (ttnn.argmax(put(x, rows), dim=3), real.argmax, (x,), {"dim": 3}),
    "slice": (ttnn.slice(put(x), [0, 0, 32, 0], [1, 1, 64, 64]), real.slice, (x, [0, 0, 32, 0], [1, 1, 64, 64]), {}),
    "transpose": (ttnn.transpose(put(q), 1, 2), real.transpose, (q, 1, 2), {}),
    "attention": (attend(put(q), put(k), put(v), is_causal=True), sdpa, (q, k, v), {"is_causal": True}),
}
worst = {}
for name, (ours, op, args, kwargs) in cases.items():
    golden = real.get_golden_function(op)(*args, **kwargs)
    got = ttnn.to_torch(ours).double()
    worst[name] = ((got - golden.double().reshape(got.shape)).abs() / golden.double().abs().clamp(min=1).reshape(got.shape)).max().item()
print("RESULT", json.dumps(worst))
"""


@pytest.mark.mock
def test_ops_agree_with_ttnns_golden_functions(mock_environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", GOLDEN],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.split("RESULT", 1)[1])
    assert len(worst) == 9
    for op, error in worst.items():
        assert error <= (0 if op in ("embedding", "argmax", "slice", "transpose") else 2.0**-8), (
            f"{op} is off by {error}"
        )
