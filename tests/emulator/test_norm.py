"""rms_norm, layer_norm and softmax against float64 references, and what they reject."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensors import ROW_MAJOR, TILE, assert_one_step, bfloat16, chips, generator, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError, NotEmulatedError

FLOATS = [DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


def partly_undefined(mesh: Any, x: torch.Tensor, rows: int) -> Any:
    """Return x, [1, 1, 32, width], of which only the first `rows` rows are defined."""
    whole = ttnn.Shape([1, 1, 32, x.shape[-1]])
    cut = ttnn.reshape(put(mesh, x), ttnn.Shape([1, 1, rows, x.shape[-1]]), whole)
    return ttnn.reshape(cut, whole, whole)


def folded(row: torch.Tensor) -> torch.Tensor:
    return row.reshape(1, 1, -1, 32)


def reference(op: Any, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    if op is ttnn.layer_norm:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("op", [ttnn.rms_norm, ttnn.layer_norm], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.value)
@pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["folded rows", "tile"])
@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("parts", ["", "weight", "bias", "weight bias", "weight bias residual_input_tensor"])
def test_norms(mesh: Any, op: Any, dtype: Any, layout: Any, cut: int | None, parts: str) -> None:
    x, residual = (
        put(mesh, values(1, 2, 50, 96) * 3, dtype, cut=cut),
        put(mesh, values(1, 2, 50, 96, seed=3), cut=cut),
    )
    rows = {"weight": values(96, seed=1), "bias": values(96, seed=2)}
    given = {
        name: put(
            mesh, folded(rows[name]) if layout is ROW_MAJOR else rows[name].view(1, 1, 1, 96), layout=layout
        )
        for name in ("weight", "bias")
        if name in parts
    }
    if "residual" in parts:
        given["residual_input_tensor"] = residual
    result = op(x, epsilon=1e-3, **given)
    assert (result.dtype, result.layout, result.shape) == (dtype, TILE, x.shape)
    for got, held, added in zip(chips(result), chips(x), chips(residual), strict=True):
        expected = reference(op, held + added if "residual" in parts else held, 1e-3)
        expected = expected * (rows["weight"] if "weight" in parts else 1)
        assert_one_step(got, expected + (rows["bias"] if "bias" in parts else 0), dtype)


@pytest.mark.parametrize("op", [ttnn.rms_norm, ttnn.layer_norm], ids=["rms_norm", "layer_norm"])
def test_each_chip_has_its_own_weight_and_bias(mesh: Any, op: Any) -> None:
    x, weights, biases = values(1, 1, 32, 64), values(1, 2, 1, 64, seed=1), values(1, 2, 1, 64, seed=2)
    result = op(put(mesh, x), weight=put(mesh, weights, cut=1), bias=put(mesh, biases, cut=1))
    for chip, got in enumerate(chips(result)):
        assert_one_step(got, reference(op, x, 0) * weights[:, chip] + biases[:, chip], DataType.BFLOAT16)


def test_norms_of_rows_and_of_one_axis(mesh: Any) -> None:
    x = values(3, 33, 64)
    result = ttnn.layer_norm(put(mesh, x, layout=ROW_MAJOR))
    assert result.layout is ROW_MAJOR
    assert_one_step(same_on_all(result), reference(ttnn.layer_norm, x, 0), DataType.BFLOAT16)
    row = values(100)
    got = same_on_all(ttnn.rms_norm(put(mesh, row), weight=put(mesh, row)))
    assert_one_step(got, reference(ttnn.rms_norm, row, 0) * row, DataType.BFLOAT16)


def test_rms_norm_without_epsilon_has_ttnns_own_tiny_one(mesh: Any) -> None:
    tiny = torch.full((1, 1, 32, 32), 1e-5)
    weight = put(mesh, torch.ones(1, 1, 1, 32), layout=ROW_MAJOR)
    largest = same_on_all(ttnn.rms_norm(put(mesh, tiny), weight=weight)).max().item()
    assert largest == pytest.approx(1, rel=0.01)
    assert same_on_all(ttnn.rms_norm(put(mesh, tiny), weight=weight, epsilon=1e-5)).max().item() < 0.01


def width_sharded(cores: int, height: int, width: int) -> Any:
    return ttnn.create_sharded_memory_config(
        (height, width),
        core_grid=ttnn.num_cores_to_corerangeset(cores, ttnn.CoreCoord(8, 7), True),
        strategy=ttnn.ShardStrategy.WIDTH,
        use_height_and_width_as_shard_shape=True,
    )


def blocks(height: int, width: int, subblock: int = 1, **more: Any) -> Any:
    return ttnn.LayerNormShardedMultiCoreProgramConfig(
        compute_with_storage_grid_size=ttnn.CoreCoord(4, 1),
        subblock_w=subblock,
        block_h=height,
        block_w=width,
        **more,
    )


def test_a_sharded_norm_stays_where_it_is_and_checks_its_blocks(mesh: Any) -> None:
    x, place = values(1, 1, 32, 256), width_sharded(4, 32, 64)
    device = ttnn.to_memory_config(put(mesh, x), place)
    result = ttnn.rms_norm(device, program_config=blocks(1, 2, 2))
    assert result.memory_config() == place
    assert_one_step(same_on_all(result), reference(ttnn.rms_norm, x, 0), DataType.BFLOAT16)
    for wrong in (blocks(1, 1), blocks(2, 2), blocks(1, 2, 4)):
        with pytest.raises(DeviceError, match="blocks of"):
            ttnn.rms_norm(device, program_config=wrong)
    with pytest.raises(DeviceError, match="must be width or block sharded"):
        ttnn.rms_norm(device, memory_config=ttnn.DRAM_MEMORY_CONFIG)
    with pytest.raises(DeviceError, match="interleaved input"):
        ttnn.rms_norm(put(mesh, x), program_config=blocks(1, 2))
    with pytest.raises(NotEmulatedError, match="the emulator does not write into its input"):
        ttnn.rms_norm(device, program_config=blocks(1, 2, inplace=True))


def test_norms_compute_the_defined_rows_only(mesh: Any) -> None:
    x, y = values(1, 1, 32, 64), values(1, 1, 32, 64, seed=1)
    result = ttnn.layer_norm(partly_undefined(mesh, x, 5), residual_input_tensor=partly_undefined(mesh, y, 3))
    got = same_on_all(result)
    assert_one_step(got[:, :, :3], reference(ttnn.layer_norm, (x + y)[:, :, :3], 0), DataType.BFLOAT16)
    assert got[:, :, 3:].isnan().all()
    line = ttnn.reshape(partly_undefined(mesh, x, 3), ttnn.Shape([1, 1, 1, 32 * 64]))
    for undefined in (ttnn.softmax(line), ttnn.rms_norm(line)):
        assert same_on_all(undefined).isnan().all()
    for dim, defined in ((-1, 3), (2, 0)):
        got = same_on_all(ttnn.softmax(partly_undefined(mesh, x, 3), dim=dim))
        assert got[:, :, defined:].isnan().all()
        assert got[:, :, :defined].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.value)
@pytest.mark.parametrize("dim", [-1, 3, -2, 1, 0])
@pytest.mark.parametrize("cut", [None, 1])
def test_softmax_over_every_axis(mesh: Any, dtype: Any, dim: int, cut: int | None) -> None:
    x = put(mesh, values(2, 4, 33, 50) * 4, dtype, cut=cut)
    result = ttnn.softmax(x, dim)
    assert (result.dtype, result.layout, result.shape) == (dtype, TILE, x.shape)
    for got, held in zip(chips(result), chips(x), strict=True):
        assert_one_step(got, held.double().softmax(dim), dtype)


def test_softmax_of_huge_infinite_and_nan_values(mesh: Any) -> None:
    inf = math.inf
    x = torch.tensor(
        [[3e38, 3e38, 0, -3e38], [-inf, 0, 1, -inf], [inf, 0, 1, 2], [-inf] * 4, [math.nan, 0, 1, 2]]
    )
    for dtype in (DataType.BFLOAT16, DataType.FLOAT32):
        device = put(mesh, x, dtype)
        for stable in (True, False):
            got = same_on_all(ttnn.softmax(device, numeric_stable=stable))
            assert_one_step(got, same_on_all(device).double().softmax(-1), dtype)
            assert got[:2].isfinite().all()


def test_softmax_tilizes_rows_of_rank_4_only(mesh: Any) -> None:
    x = values(1, 2, 5, 40)
    result = ttnn.softmax(put(mesh, x, layout=ROW_MAJOR))
    assert result.layout is TILE
    assert_one_step(same_on_all(result), x.double().softmax(-1), DataType.BFLOAT16)
    for shape, dim in (((2, 5, 40), -1), ((1, 2, 5, 40), 2)):
        with pytest.raises(DeviceError, match="TILE layout"):
            ttnn.softmax(put(mesh, x.view(shape), layout=ROW_MAJOR), dim)


def test_norms_and_softmax_reject_what_the_device_rejects(mesh: Any) -> None:
    x, weight = put(mesh, values(1, 1, 32, 64)), put(mesh, values(1, 1, 2, 32), layout=ROW_MAJOR)
    integers = put(mesh, torch.zeros(1, 1, 32, 64, dtype=torch.int32), ttnn.int32)
    rows = put(mesh, values(1, 1, 32, 64), layout=ROW_MAJOR)
    norm, layer, softmax = ttnn.rms_norm, ttnn.layer_norm, ttnn.softmax
    welford = ttnn.LayerNormDefaultProgramConfig(use_welford=True)
    calls = {
        "input is int32": lambda: norm(integers),
        "must be in TILE layout": lambda: norm(rows),
        r"must be folded to \[1, 1, 2, 32\]": lambda: norm(x, weight=put(mesh, values(1, 1, 1, 64), layout=ROW_MAJOR)),
        "the widths must be the same": lambda: norm(x, weight=put(mesh, values(1, 1, 1, 96))),
        "must be one row of tiles": lambda: norm(x, bias=put(mesh, values(1, 1, 40, 64))),
        "must have the same layout": lambda: norm(x, weight=weight, bias=put(mesh, values(1, 1, 1, 64))),
        "their shapes must be the same": lambda: norm(x, residual_input_tensor=put(mesh, values(1, 1, 64, 64))),
        "must be a number": lambda: norm(x, epsilon="1e-5"),
        "is for layer_norm only": lambda: norm(x, program_config=welford),
        "needs an input in TILE layout": lambda: layer(rows, program_config=welford),
        "does not take a recip_tensor": lambda: layer(x, recip_tensor=weight),
        "it must be from -4 to 3": lambda: softmax(x, dim=4),
        "softmax: input is int32": lambda: softmax(integers),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(DeviceError, match=message):
            call()
