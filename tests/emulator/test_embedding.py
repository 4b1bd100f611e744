"""embedding: its values, layouts and dtypes, and what it rejects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import ROW_MAJOR, TILE, bfloat16, chips, generator, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.errors import DeviceError


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (1, 40), (40,)], ids=str)
@pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["rows", "tile"])
def test_embedding_of_a_table_cut_by_columns(mesh: Any, shape: tuple[int, ...], layout: Any) -> None:
    table = values(1, 1, 50, 128)
    ids = torch.randint(0, 50, shape, generator=generator(1))
    result = ttnn.embedding(
        put(mesh, ids, ttnn.uint32, ROW_MAJOR), put(mesh, table, layout=ROW_MAJOR, cut=3), layout=layout
    )
    assert list(result.shape) == ([40, 64] if len(shape) == 1 else [1, 40, 64])
    assert result.layout is layout
    assert torch.equal(
        torch.cat(chips(result), dim=-1),
        table[0, 0][ids.reshape(-1, 40).squeeze(0)].view(*result.shape[:-1], 128),
    )


def test_embedding_of_a_batch_with_ids_of_their_own_a_chip(mesh: Any) -> None:
    table = values(1, 1, 50, 64)
    ids = torch.randint(0, 50, (4, 7), generator=generator(1))
    result = ttnn.embedding(put(mesh, ids, ttnn.uint32, ROW_MAJOR, cut=0), put(mesh, table, layout=ROW_MAJOR))
    assert torch.equal(torch.cat(chips(result)), table[0, 0][ids])


def test_layout_dtype_and_place_follow_the_table_the_argument_and_the_ids(mesh: Any) -> None:
    table, ids = values(50, 64), torch.arange(32).view(1, 32)
    device = put(mesh, ids, ttnn.uint32, ROW_MAJOR, memory=ttnn.L1_MEMORY_CONFIG)
    result = ttnn.embedding(device, put(mesh, table))
    assert (result.layout, result.memory_config()) == (TILE, ttnn.L1_MEMORY_CONFIG)
    small = ttnn.embedding(
        device, put(mesh, table), dtype=ttnn.bfloat8_b, memory_config=ttnn.DRAM_MEMORY_CONFIG
    )
    assert (small.dtype, small.memory_config()) == (ttnn.bfloat8_b, ttnn.DRAM_MEMORY_CONFIG)
    assert torch.equal(same_on_all(small), round_on_device(table[ids], ttnn.bfloat8_b))
    rows = ttnn.embedding(
        put(mesh, ids.float(), layout=TILE), put(mesh, table), layout=ROW_MAJOR, dtype=ttnn.float32
    )
    assert (rows.layout, rows.dtype) == (ROW_MAJOR, ttnn.bfloat16)
    assert torch.equal(same_on_all(rows), table[ids])
    assert torch.equal(same_on_all(result), table[ids]), "the table or an earlier result was modified"


def test_an_id_outside_of_the_table_is_an_error(mesh: Any) -> None:
    ids = put(mesh, torch.tensor([[3, 50]]), ttnn.uint32, ROW_MAJOR)
    with pytest.raises(DeviceError, match=r"ids reach from 3 to 50; the table has rows 0\.\.49"):
        ttnn.to_torch(
            ttnn.get_device_tensors(ttnn.embedding(ids, put(mesh, values(50, 64), layout=ROW_MAJOR)))[0]
        )


def test_embedding_rejects_what_the_device_rejects(mesh: Any) -> None:
    ids = put(mesh, torch.zeros(1, 32, dtype=torch.int32), ttnn.uint32, ROW_MAJOR)
    table = put(mesh, values(64, 64), layout=ROW_MAJOR)
    calls = {
        "ids is int32": lambda: ttnn.embedding(put(mesh, torch.zeros(1, 32), ttnn.int32, ROW_MAJOR), table),
        "table is float32": lambda: ttnn.embedding(ids, put(mesh, values(64, 64), ttnn.float32, ROW_MAJOR)),
        r"ids \[2, 3, 32\] must be": lambda: ttnn.embedding(put(mesh, torch.zeros(2, 3, 32), ttnn.uint32, ROW_MAJOR), table),
        "with leading axes of 1": lambda: ttnn.embedding(ids, put(mesh, values(2, 1, 64, 64), layout=ROW_MAJOR)),
        "without a layout": lambda: ttnn.embedding(ids, table, dtype=ttnn.float32),
        "of a table of floats": lambda: ttnn.embedding(ids, table, layout=TILE, dtype=ttnn.uint32),
        "needs padding_idx": lambda: ttnn.embedding(ids, table, embeddings_type=ttnn.EmbeddingsType.PADDED),
        "the emulator does not have EmbeddingsType.BINARY": lambda: ttnn.embedding(
            ids, table, embeddings_type=ttnn.EmbeddingsType.BINARY
        ),
        "the emulator does not take output_tensor": lambda: ttnn.embedding(ids, table, output_tensor=table),
        "the emulator does not take or make shards": lambda: ttnn.embedding(
            ids, table, layout=TILE, memory_config=ttnn.create_sharded_memory_config(
                (32, 64), core_grid=ttnn.num_cores_to_corerangeset(1, ttnn.CoreCoord(8, 7)), strategy=ttnn.ShardStrategy.HEIGHT,
                use_height_and_width_as_shard_shape=True)),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(DeviceError, match=message):
            call()
