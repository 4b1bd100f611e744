"""The two forms in which a tensor's values are held: float32, in which ops compute, and torch.bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import tensor as tensors
from disagg_tt.device.emulator.ops import matmul
from disagg_tt.device.emulator.tensor import Values


def _bfloat16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _put(mesh: Any, values: torch.Tensor, dtype: Any = None, **how: Any) -> Any:
    return ttnn.from_torch(values, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh, **how)


def _get(mesh: Any, tensor: Any) -> torch.Tensor:
    values: torch.Tensor = ttnn.to_torch(tensor, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0))
    return values


def test_each_form_is_made_of_the_other_exactly_and_new_values_replace_both() -> None:
    narrow = _bfloat16(2, 32, 32)
    values = Values(narrow)
    assert values.held is narrow and torch.equal(values.data, narrow.float())
    assert values.narrow is narrow, "a small tensor keeps both"
    values.data = values.data + 1
    assert torch.equal(values.bfloat16(), (narrow.float() + 1).to(torch.bfloat16))
    values.hold(narrow)
    assert torch.equal(values.data, narrow.float())
    values.data = None
    assert values.held is None and values.bfloat16() is None


def test_a_large_tensor_keeps_only_the_form_that_was_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SMALL", 100)
    values = Values(_bfloat16(1, 32, 32))
    assert values.data is not None and values.narrow is None
    assert values.bfloat16() is not None and values.wide is None


def test_parts_that_are_one_tensor_expanded_stay_one() -> None:
    values = Values(_bfloat16(1, 32, 32).expand(8, 32, 32))
    data = values.data
    assert data is not None and data.shape == (8, 32, 32) and data.stride(0) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat8_b", "bfloat4_b"])
def test_what_comes_from_the_host_takes_two_bytes_a_value(mesh: Any, dtype: str) -> None:
    there = _put(mesh, torch.randn(1, 1, 32, 64), getattr(ttnn, dtype))
    assert there._values.wide is None and there._values.narrow.nbytes == 2 * 32 * 64
    host = ttnn.from_device(there)
    assert host._values.wide is None


def test_a_tensor_is_of_its_own_whatever_becomes_of_what_it_was_made_of(mesh: Any) -> None:
    given = _bfloat16(1, 1, 32, 32)
    there, before = _put(mesh, given), given.clone()
    given.zero_()
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(there)[0]), before)
    read = ttnn.to_torch(ttnn.get_device_tensors(there)[0])
    read.zero_()
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(there)[0]), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat8_b"])
def test_a_weight_of_native_products_is_not_held_in_float32_too(
    mesh: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(matmul, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(tensors, "SMALL", 0)
    a, b = _bfloat16(1, 1, 32, 64), _bfloat16(1, 1, 64, 32, seed=1)
    weight = _put(mesh, b, getattr(ttnn, dtype))
    for _ in range(2):
        product = ttnn.matmul(_put(mesh, a), weight)
    assert weight._values.wide is None
    expected = a.float() @ ttnn.to_torch(ttnn.get_device_tensors(weight)[0]).float()
    found = ttnn.to_torch(ttnn.get_device_tensors(product)[0]).float()
    assert (found - expected).abs().max() <= 2.0**-8 * expected.abs().max()


def test_the_products_of_a_weight_that_is_written_anew_are_new(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_multiplies_bfloat16", lambda: True)
    a, weight = _put(mesh, torch.ones(1, 1, 32, 32)), _put(mesh, torch.ones(1, 1, 32, 32), ttnn.bfloat16)
    ttnn.matmul(a, weight, dtype=ttnn.bfloat16)
    twos = ttnn.from_torch(torch.full((1, 1, 32, 32), 2.0), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    ttnn.copy_host_to_device_tensor(twos, weight)
    assert (_get(mesh, ttnn.matmul(a, weight, dtype=ttnn.bfloat16)) == 64).all()


def test_what_is_received_into_a_bfloat16_tensor_stays_so_and_in_its_memory(mesh: Any) -> None:
    cores = [
        ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, column), ttnn.CoreCoord(0, 0))
        for column in range(mesh.get_num_devices())
    ]
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, 4096)
    config = ttnn.SocketConfig([ttnn.SocketConnection(core, core) for core in cores], memory)
    out, into = ttnn.create_socket_pair(mesh, mesh, config)
    target = ttnn.allocate_tensor_on_device(ttnn.Shape([1, 1, 32, 32]), ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh)
    places = set()
    for seed in range(2):
        sent = _bfloat16(mesh.get_num_devices(), 1, 32, 32, seed=seed)
        source = _put(mesh, sent, mesh_mapper=ttnn.ShardTensorToMesh(mesh, dim=0))
        # Reading target in between makes a float32 form, which must not outlive the next receive.
        ttnn.experimental.send_async(source, out)
        ttnn.experimental.recv_async(target, into)
        doubled = ttnn.add(target, target)
        assert torch.equal(_get(mesh, target), sent)
        assert torch.equal(_get(mesh, doubled), sent * 2)
        places.add(target._values.narrow.data_ptr())
    assert len(places) == 1


def test_a_cache_that_was_refreshed_from_the_host_does_not_write_into_the_hosts_tensor(mesh: Any) -> None:
    cache = _put(mesh, torch.zeros(1, 1, 64, 32), ttnn.float32)
    values = _put(mesh, torch.ones(1, 1, 32, 32), ttnn.float32)
    ttnn.fill_cache(cache, values, 0)  # from now on the cache has memory of its own
    host = ttnn.from_torch(
        torch.zeros(mesh.get_num_devices(), 1, 64, 32),
        dtype=ttnn.float32,
        layout=ttnn.TILE_LAYOUT,
        mesh_mapper=ttnn.ShardTensorToMesh(mesh, dim=0),
    )
    ttnn.copy_host_to_device_tensor(host, cache)
    ttnn.fill_cache(cache, values, 0)
    assert (host._values.data == 0).all()


def test_the_weights_of_an_embedding_stay_bfloat16(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SMALL", 0)
    rows = _bfloat16(1, 1, 64, 32)
    table = ttnn.from_torch(rows, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh)
    ids = ttnn.from_torch(torch.tensor([[3, 60]], dtype=torch.int32), dtype=ttnn.uint32, device=mesh)
    found = ttnn.to_torch(ttnn.get_device_tensors(ttnn.embedding(ids, table))[0])
    assert torch.equal(found.reshape(2, 32), rows[0, 0, [3, 60]])
    assert table._values.wide is None
