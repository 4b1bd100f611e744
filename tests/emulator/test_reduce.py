"""Reductions, argmax and topk against float64 references, and what they reject."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensors import ROW_MAJOR, TILE, assert_one_step, bfloat16, chips, generator, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError

REDUCTIONS: dict[str, Any] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
    "std": torch.std,
    "var": torch.var,
}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


def all_axes(dim: Any) -> Any:
    return tuple(range(4)) if dim is None else dim


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize(
    "dtype", [DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B], ids=lambda d: d.value
)
@pytest.mark.parametrize("dim", [-1, 2, 1, 0, None, [-2, -1], [0, 3], (1, 2, 3)], ids=str)
def test_reductions_over_axes(mesh: Any, op: str, dtype: Any, dim: Any) -> None:
    x = put(mesh, values(2, 4, 33, 50), dtype, cut=1)
    for keepdim in (False, True):
        result = getattr(ttnn, op)(x, dim, keepdim)
        assert (result.dtype, result.layout) == (dtype, TILE)
        for got, held in zip(chips(result), chips(x), strict=True):
            expected = REDUCTIONS[op](held.double(), all_axes(dim), keepdim=keepdim)
            assert list(result.shape) == list(expected.shape)
            padded = [-(-d // 32) * 32 for d in [1, 1, *expected.shape][-2:]]
            assert list(result.padded_shape)[-2:] == padded
            if expected.dim():
                assert_one_step(got, expected, dtype)
            else:
                assert got.item() == pytest.approx(expected.item(), rel=2.0**-6, abs=1e-6)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_sums_of_rows_stay_rows_where_ttnns_do(mesh: Any, op: str) -> None:
    x = values(2, 3, 33, 64)
    for dtype in (DataType.BFLOAT16, DataType.FLOAT32):
        device = put(mesh, x, dtype, ROW_MAJOR)
        leading = ROW_MAJOR if dtype is DataType.FLOAT32 or op == "mean" else TILE
        for dim, layout in ((-1, ROW_MAJOR), (2, ROW_MAJOR), ([2, 3], TILE), (0, leading)):
            result = getattr(ttnn, op)(device, dim, keepdim=True)
            assert result.layout is layout, (dtype, dim)
            assert_one_step(same_on_all(result), REDUCTIONS[op](x.double(), dim, keepdim=True), dtype)
    assert getattr(ttnn, op)(put(mesh, x, layout=ROW_MAJOR), -1, output_layout=TILE).layout is TILE


def test_max_and_min_of_rows_are_in_tiles(mesh: Any) -> None:
    x = values(2, 3, 33, 64)
    for op in ("max", "min"):
        assert getattr(ttnn, op)(put(mesh, x, layout=ROW_MAJOR), -1).layout is TILE


@pytest.mark.parametrize(("dtype", "numbers", "total"), [
    (ttnn.int32, [2**31 - 1, 1], -(2**31)), (ttnn.int32, [-(2**31), -1], 2**31 - 1), (ttnn.uint32, [2**32 - 1, 2], 1),
    (ttnn.int32, [-5, 3], -2),
])  # fmt: skip
def test_integers_are_summed_modulo_their_32_bits(
    mesh: Any, dtype: Any, numbers: list[int], total: int
) -> None:
    x = put(mesh, torch.tensor([numbers]), dtype)
    assert same_on_all(ttnn.sum(x, -1)).tolist() == [total]
    assert same_on_all(ttnn.max(x, -1)).tolist() == [max(numbers)]
    assert same_on_all(ttnn.min(x, -1)).tolist() == [min(numbers)]


def test_scalars_scale_what_is_reduced(mesh: Any) -> None:
    x = values(1, 1, 32, 64)
    device = put(mesh, x)
    factor = {"sum": -2.0, "mean": -2.0, "max": -2.0, "min": -2.0, "std": 2.0, "var": 4.0}
    for op, reduction in REDUCTIONS.items():
        got = same_on_all(getattr(ttnn, op)(device, -1, scalar=-2.0))
        assert_one_step(got, factor[op] * reduction(x.double(), -1), DataType.BFLOAT16)
    uncorrected = same_on_all(ttnn.var(device, -1, correction=False))
    assert_one_step(uncorrected, x.double().var(-1, correction=0), DataType.BFLOAT16)


def test_rows_with_nan_and_infinities(mesh: Any) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([[1, inf, 2], [inf, -inf, 0], [nan, 1, 2], [-inf, -inf, 3], [3e38, 3e38, 0]])
    for dtype in (DataType.BFLOAT16, DataType.FLOAT32):
        device = put(mesh, x, dtype)
        for op in ("sum", "max", "min"):
            expected = REDUCTIONS[op](same_on_all(device).double(), -1)
            expected[expected > torch.finfo(torch.float32).max] = inf
            assert_one_step(same_on_all(getattr(ttnn, op)(device, -1)), expected, dtype)


def test_undefined_rows_make_their_results_undefined(mesh: Any) -> None:
    x, whole = values(1, 1, 32, 64), ttnn.Shape([1, 1, 32, 64])
    part = ttnn.reshape(ttnn.reshape(put(mesh, x), ttnn.Shape([1, 1, 3, 64]), whole), whole, whole)
    got = same_on_all(ttnn.sum(part, -1))
    assert torch.equal(got[0, 0].isnan(), torch.arange(32) >= 3)
    assert same_on_all(ttnn.max(part, 2)).isnan().all()
    best, at = ttnn.topk(part, 2)
    assert torch.equal(same_on_all(best)[0, 0].isnan().all(-1), torch.arange(32) >= 3)
    assert torch.equal(
        same_on_all(at)[0, 0, :3], x[0, 0, :3].sort(dim=-1, descending=True, stable=True).indices[:, :2]
    )


# ---------------------------------------------------------------- argmax


@pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["rows", "tiles"])
@pytest.mark.parametrize("dim", [-1, 3, 2, 1, 0])
def test_argmax_gives_the_first_largest_along_every_axis(mesh: Any, layout: Any, dim: int) -> None:
    x = torch.randint(0, 4, (4, 2, 33, 50), generator=generator(0)).float()  # so that there are many ties
    for keepdim in (False, True):
        result = ttnn.argmax(put(mesh, x, layout=layout, cut=0), dim=dim, keepdim=keepdim)
        assert (result.dtype, result.layout) == (ttnn.uint32, ROW_MAJOR)
        for got, part in zip(chips(result), x.chunk(2), strict=True):
            largest = part.amax(dim, keepdim=True)
            first = torch.where(part == largest, 0, 1).sort(dim=dim, stable=True).indices.narrow(dim, 0, 1)
            assert torch.equal(got, first if keepdim else first.squeeze(dim))


def test_argmax_of_everything_and_of_integers(mesh: Any) -> None:
    x = torch.randint(-100, 100, (2, 3, 40), generator=generator(0))
    x[1, 2, 7] = 1000
    result = ttnn.argmax(put(mesh, x, ttnn.int32, ROW_MAJOR))
    assert list(result.shape) == []
    assert same_on_all(result).item() == 40 * 5 + 7
    assert torch.equal(same_on_all(ttnn.argmax(put(mesh, x, ttnn.int32, ROW_MAJOR), dim=-1)), x.argmax(-1))


def test_argmax_takes_nan_for_the_largest_and_writes_into_a_given_tensor(mesh: Any) -> None:
    x = torch.tensor([[1, math.nan, math.inf], [-math.inf, -math.inf, -math.inf], [1, math.inf, 2]])
    out = put(mesh, torch.zeros(3, 1, dtype=torch.int32), ttnn.uint32, ROW_MAJOR)
    assert ttnn.argmax(put(mesh, x, layout=ROW_MAJOR), dim=1, keepdim=True, output_tensor=out) is out
    assert same_on_all(out).flatten().tolist() == [1, 0, 1]


# ---------------------------------------------------------------- topk


@pytest.mark.parametrize(
    "dtype", [DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B], ids=lambda d: d.value
)
@pytest.mark.parametrize("dim", [-1, 2, 0])
@pytest.mark.parametrize("largest", [True, False])
def test_topk_gives_the_best_first_and_ties_in_order(mesh: Any, dtype: Any, dim: int, largest: bool) -> None:
    x = torch.randint(0, 8, (8, 2, 33, 50), generator=generator(0)).float()
    best, at = ttnn.topk(put(mesh, x, dtype, cut=0), 3, dim, largest)
    assert at.dtype is (ttnn.uint32 if dtype is DataType.FLOAT32 else ttnn.uint16)
    for got, where, part in zip(chips(best), chips(at), x.chunk(2), strict=True):
        ordered, indices = part.sort(dim=dim, descending=largest, stable=True)
        assert torch.equal(got, ordered.narrow(dim, 0, 3))
        assert torch.equal(where, indices.narrow(dim, 0, 3))


def test_topk_of_many_values_has_wide_indices(mesh: Any) -> None:
    x = torch.zeros(1, 1, 32, 65600)
    x[..., 65590] = 1
    best, at = ttnn.topk(put(mesh, x), 1)
    assert at.dtype is ttnn.uint32
    assert same_on_all(at).unique().tolist() == [65590]
    assert ttnn.topk(put(mesh, x[..., :65536].contiguous()), 1)[1].dtype is ttnn.uint16


def test_topk_gives_each_chip_its_labels(mesh: Any) -> None:
    x = values(1, 1, 32, 64)
    labels = torch.randint(0, 30000, (1, 2, 32, 64), generator=generator(1))
    best, named = ttnn.topk(put(mesh, x), 5, indices_tensor=put(mesh, labels, ttnn.uint32, cut=1))
    at = x.sort(dim=-1, descending=True, stable=True).indices[..., :5]
    assert torch.equal(same_on_all(best), x.gather(-1, at))
    for chip, got in enumerate(chips(named)):
        assert torch.equal(got, labels[:, chip : chip + 1].gather(-1, at))


def test_reductions_argmax_and_topk_reject_what_the_device_rejects(mesh: Any) -> None:
    x = put(mesh, values(1, 1, 32, 64))
    small, rows = (
        put(mesh, values(1, 1, 32, 64), ttnn.bfloat8_b),
        put(mesh, values(1, 1, 32, 64), layout=ROW_MAJOR),
    )
    integers = put(mesh, torch.zeros(1, 1, 32, 64, dtype=torch.int32), ttnn.int32)
    place = ttnn.create_sharded_memory_config((32, 64), core_grid=ttnn.num_cores_to_corerangeset(1, ttnn.CoreCoord(8, 7)),
                                              strategy=ttnn.ShardStrategy.HEIGHT, use_height_and_width_as_shard_shape=True)  # fmt: skip
    calls = {
        "sum: dim 4 of": lambda: ttnn.sum(x, 4),
        "names an axis twice": lambda: ttnn.sum(x, [3, -1]),
        "mean: input is int32": lambda: ttnn.mean(integers),
        "exists in TILE layout only": lambda: ttnn.sum(small, -1, output_layout=ROW_MAJOR),
        "must be a number": lambda: ttnn.sum(x, scalar="2"),
        "sum: the emulator does not reduce from or into shards": lambda: ttnn.sum(ttnn.to_memory_config(x, place), -1),
        "the emulator does not scale integers by 0.5": lambda: ttnn.sum(integers, scalar=0.5),
        "min: fast_and_approximate_mode": lambda: ttnn.min(put(mesh, values(32, 64), ttnn.float32), fast_and_approximate_mode=True),
        "argmax: dim -5 of": lambda: ttnn.argmax(x, -5),
        "all axes at once need ROW_MAJOR": lambda: ttnn.argmax(x),
        "argmax: input is bfloat8_b": lambda: ttnn.argmax(small, -1),
        "argmax: input is int32": lambda: ttnn.argmax(integers, -1),
        "argmax: output_tensor": lambda: ttnn.argmax(rows, -1, output_tensor=rows),
        "k 65 of 64 values": lambda: ttnn.topk(x, 65),
        "topk: input .* must be in TILE layout": lambda: ttnn.topk(rows, 2),
        "stable=True together with indices_tensor": lambda: ttnn.topk(x, 2, stable=True, indices_tensor=integers),
        "topk: the emulator does not take output_tensor": lambda: ttnn.topk(x, 2, output_tensor=(x, integers)),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(DeviceError, match=message):
            call()


def test_a_sum_that_wrapped_around_is_small_for_the_next_op_too(mesh: Any) -> None:
    rows = put(mesh, torch.tensor([[2**31 - 1, 1], [0, 0]]), ttnn.int32)
    assert same_on_all(ttnn.max(ttnn.sum(rows, 1, keepdim=True), 0)).tolist() == [0]
