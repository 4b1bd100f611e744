"""Ops that place values in another way, between layouts and memory configs: each bit-exact, on chips with values of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import (
    ROW_MAJOR,
    TILE,
    check_halves,
    generator,
    height_sharded,
    put,
    put_halves,
    same_on_all,
    values,
)

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.errors import DeviceError

LAYOUTS = pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["rows", "tile"])


@pytest.mark.parametrize("shape", [(1, 3, 4, 64), (33,), (7, 40), (1, 2, 3, 5, 6)])
@pytest.mark.parametrize(
    "dtype", [ttnn.bfloat16, ttnn.float32, ttnn.uint32, ttnn.int32, ttnn.uint16], ids=lambda d: d.value
)
def test_to_layout_there_and_back_on_device_and_host(mesh: Any, shape: Any, dtype: Any) -> None:
    x = torch.randint(0, 250, shape, generator=generator(3)).float()
    for start in (put(mesh, x, dtype, ROW_MAJOR), ttnn.from_torch(x, dtype=dtype)):
        tiles = ttnn.to_layout(start, TILE)
        rows = ttnn.to_layout(tiles, ROW_MAJOR)
        assert (tiles.layout, rows.layout, rows.dtype) == (TILE, ROW_MAJOR, dtype)
        assert all(d % 32 == 0 for d in tiles.padded_shape[-2:])
        for tensor in (tiles, rows):
            read = ttnn.to_torch(tensor) if tensor.device() is None else same_on_all(tensor)
            assert torch.equal(read.float(), x)


def test_layout_ops_convert_as_the_device_packs(mesh: Any) -> None:
    exact = torch.randn(1, 1, 32, 64, generator=generator(2))
    rows = put(mesh, exact, ttnn.float32, ROW_MAJOR)
    for result in (
        ttnn.to_layout(rows, TILE, dtype=ttnn.bfloat8_b),
        ttnn.tilize(rows, dtype=ttnn.bfloat8_b),
        ttnn.tilize_with_zero_padding(rows, output_dtype=ttnn.bfloat8_b),
        ttnn.to_memory_config(ttnn.tilize(rows), ttnn.L1_MEMORY_CONFIG, ttnn.bfloat8_b),
    ):
        assert torch.equal(same_on_all(result), round_on_device(exact.clone(), ttnn.bfloat8_b))
    assert torch.equal(same_on_all(rows), exact), "the input was modified"
    for tiles in (put(mesh, exact, ttnn.bfloat8_b),):
        for back in (ttnn.untilize(tiles), ttnn.to_layout(tiles, ROW_MAJOR)):
            assert back.dtype is ttnn.bfloat16
            assert torch.equal(same_on_all(back), same_on_all(tiles))


def test_tilize_and_untilize(mesh: Any) -> None:
    x = values(1, 2, 20, 40)
    rows = put(mesh, x, layout=ROW_MAJOR)
    with pytest.raises(DeviceError, match="not whole tiles"):
        ttnn.tilize(rows)
    for tiles in (
        ttnn.tilize_with_zero_padding(rows),
        ttnn.tilize_with_val_padding(rows, ttnn.Shape([1, 2, 32, 96]), 1.5),
    ):
        assert torch.equal(same_on_all(tiles), x)
        assert torch.equal(same_on_all(ttnn.untilize(tiles)), x)
        part = ttnn.untilize_with_unpadding(tiles, ttnn.Shape([0, 1, 9, 39]))
        assert torch.equal(same_on_all(part), x[:, :, :10])
    assert list(tiles.padded_shape) == [1, 2, 32, 96]
    with pytest.raises(DeviceError, match="must be in TILE layout"):
        ttnn.untilize(rows)
    with pytest.raises(DeviceError, match="at least as large"):
        ttnn.tilize_with_val_padding(rows, ttnn.Shape([1, 2, 32, 32]), 0.0)
    with pytest.raises(DeviceError, match="is past"):
        ttnn.untilize_with_unpadding(tiles, ttnn.Shape([0, 1, 20, 39]))
    with pytest.raises(DeviceError, match="bfloat4_b cannot be written as rows"):
        ttnn.untilize(put(mesh, x, ttnn.bfloat4_b))


def test_moves_between_memory_configs_keep_the_values(mesh: Any) -> None:
    x = values(2, 3, 4, 64)
    place, other = height_sharded(mesh, 3, 32, 64), height_sharded(mesh, 2, 64, 64)
    shards = ttnn.interleaved_to_sharded(put_halves(mesh, x), place)
    for moved, where in (
        (ttnn.to_memory_config(put_halves(mesh, x), ttnn.L1_MEMORY_CONFIG), ttnn.L1_MEMORY_CONFIG),
        (shards, place),
        (ttnn.reshard(shards, other), other),
        (ttnn.to_memory_config(shards, other), other),
        (ttnn.sharded_to_interleaved(shards), ttnn.DRAM_MEMORY_CONFIG),
        (ttnn.sharded_to_interleaved(shards, ttnn.L1_MEMORY_CONFIG), ttnn.L1_MEMORY_CONFIG),
    ):
        check_halves(moved, x)
        assert moved.memory_config() == where
    for call, message in (
        (lambda: ttnn.interleaved_to_sharded(shards, other), "already sharded"),
        (lambda: ttnn.interleaved_to_sharded(put_halves(mesh, x), ttnn.L1_MEMORY_CONFIG), "must be sharded"),
        (lambda: ttnn.sharded_to_interleaved(shards, place), "must be interleaved"),
        (lambda: ttnn.reshard(put_halves(mesh, x), place), "is not sharded"),
    ):
        with pytest.raises(DeviceError, match=message):
            call()


def test_move_and_reallocate_free_their_input(mesh: Any) -> None:
    x = values(2, 3, 4, 64)
    for op in (ttnn.move, ttnn.reallocate):
        tensor = put_halves(mesh, x)
        result = op(tensor, memory_config=ttnn.L1_MEMORY_CONFIG)
        check_halves(result, x)
        assert result.memory_config() == ttnn.L1_MEMORY_CONFIG
        assert not tensor.is_allocated()
        with pytest.raises(DeviceError, match="deallocated"):
            op(tensor)


def test_undefined_rows_stay_undefined_when_they_move(mesh: Any) -> None:
    spec = ttnn.TensorSpec(ttnn.Shape([1, 1, 32, 64]), ttnn.bfloat16, TILE)
    x = ttnn.allocate_tensor_on_device(spec, mesh)
    for moved in (
        ttnn.transpose(x, 2, 3),
        ttnn.reshape(x, [1, 2, 16, 64]),
        ttnn.concat([x, x], 3),
        ttnn.to_layout(x, ROW_MAJOR),
    ):
        assert same_on_all(moved).isnan().all()
