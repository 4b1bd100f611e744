"""Rounding and packing: ties, special values, the wire. tests/ttnn_mock/test_numeric_host.py asks ttnn's own host code."""

from __future__ import annotations

import pytest
import torch
from tensors import generator

from disagg_tt.device.emulator.numeric import pack, round_on_device, round_on_host, unpack
from disagg_tt.device.emulator.types import DataType

BLOCK_FLOATS = [DataType.BFLOAT8_B, DataType.BFLOAT4_B]
BITS = {DataType.BFLOAT8_B: 7, DataType.BFLOAT4_B: 3}
NAN, INF = float("nan"), float("inf")
INFINITY = torch.tensor(INF)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def test_bfloat16_on_host_rounds_ties_to_even_and_on_device_away_from_zero() -> None:
    ulp = 2.0**-7
    ties = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2, -1 - 3 * ulp / 2])
    assert round_on_host(ties, DataType.BFLOAT16).tolist() == [1, 1 + 2 * ulp, -1, -1 - 2 * ulp]
    assert round_on_device(ties.clone(), DataType.BFLOAT16).tolist() == [
        1 + ulp,
        1 + 2 * ulp,
        -1 - ulp,
        -1 - 2 * ulp,
    ]


def test_bfloat16_roundings_agree_wherever_there_is_no_tie() -> None:
    values = torch.randn(4096, generator=generator(1)) * torch.exp2(torch.randint(-90, 90, (4096,)).float())
    tie = bits(values) & 0xFFFF == 0x8000
    host, device = (
        round_on_host(values, DataType.BFLOAT16),
        round_on_device(values.clone(), DataType.BFLOAT16),
    )
    assert torch.equal(host[~tie], device[~tie])


def test_device_rounding_keeps_what_bfloat16_can_hold() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16  # every bfloat16 there is
    values = every.view(torch.float32)
    number = ~values.isnan()
    rounded = round_on_device(values.clone(), DataType.BFLOAT16)
    assert torch.equal(bits(rounded)[number], every[number])


def test_nan_stays_nan_and_infinity_stays_infinite_on_the_device() -> None:
    # All NaNs that reach the device: from the host, and those that arithmetic makes.
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    made = torch.tensor([INF]) - INF
    values = torch.cat([round_on_host(odd, DataType.FLOAT32), made, torch.tensor([INF, -INF])])
    rounded = round_on_device(values, DataType.BFLOAT16)
    assert rounded[:4].isnan().all()
    assert rounded[4:].tolist() == [INF, -INF]


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_block_float_ties_go_to_even_on_host_and_away_from_zero_on_device(dtype: DataType) -> None:
    step = 2.0 ** (1 - BITS[dtype])  # in a block whose largest magnitude is in [1, 2)
    block = torch.zeros(16)
    block[0], block[1], block[2], block[3] = 1.0, 0.5 * step, 1.5 * step, -0.5 * step
    assert round_on_host(block, dtype)[:4].tolist() == [1, 0, 2 * step, 0]
    assert round_on_device(block, dtype)[:4].tolist() == [1, step, 2 * step, -step]


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
@pytest.mark.parametrize("rounding", [round_on_host, round_on_device])
def test_block_float_equals_a_scalar_reference(dtype: DataType, rounding) -> None:  # type: ignore[no-untyped-def]
    seed = 2
    values = torch.randn(8, 64, generator=generator(seed)) * torch.exp2(
        torch.randint(-20, 20, (8, 64)).float()
    )
    values[3] = 0
    rounded = rounding(values.clone(), dtype)
    for block, got in zip(values.reshape(-1, 16).tolist(), rounded.reshape(-1, 16).tolist(), strict=True):
        largest = max(map(abs, block))
        step = 2.0 ** (torch.frexp(torch.tensor(largest)).exponent.item() - BITS[dtype]) if largest else 1.0
        for value, result in zip(block, got, strict=True):
            whole = abs(value) / step
            near = int(whole + 0.5) if rounding is round_on_device else round(whole)
            expected = min(near, 2 ** BITS[dtype] - 1) * step
            assert result == (expected if value >= 0 else -expected)


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_block_float_of_a_width_that_is_no_whole_block(dtype: DataType) -> None:
    values = torch.randn(3, 40, generator=generator(3))
    padded = torch.nn.functional.pad(values, (0, 8))
    assert torch.equal(round_on_host(values, dtype), round_on_host(padded, dtype)[:, :40])


@pytest.mark.parametrize("dtype", [*BLOCK_FLOATS, DataType.BFLOAT16, DataType.FLOAT32])
def test_packing_round_trips_floats_exactly(dtype: DataType) -> None:
    shape = (2, 1, 3, 64, 96)
    values = torch.randn(shape, generator=generator(4)) * torch.exp2(torch.randint(-30, 30, shape).float())
    values[0, 0, 0, 0] = 0
    held = round_on_device(values, dtype)
    back = unpack(pack(held, dtype), shape, dtype)
    assert torch.equal(bits(back), bits(held))


@pytest.mark.parametrize("dtype", [DataType.UINT32, DataType.INT32, DataType.UINT16, DataType.UINT8])
def test_packing_round_trips_integers_exactly(dtype: DataType) -> None:
    edges = {
        DataType.UINT32: [0, 1, 35308, 2**31, 2**32 - 1],
        DataType.INT32: [0, 1, -1, -(2**31), 2**31 - 1],
        DataType.UINT16: [0, 1, 35308, 2**16 - 1],
        DataType.UINT8: [0, 1, 255],
    }[dtype]
    values = torch.tensor(edges)
    assert unpack(pack(values, dtype), (len(edges),), dtype).tolist() == edges


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (DataType.BFLOAT8_B, 1088),
        (DataType.BFLOAT4_B, 576),
        (DataType.BFLOAT16, 2048),
        (DataType.FLOAT32, 4096),
        (DataType.UINT32, 4096),
    ],
)
def test_a_packed_tile_has_the_bytes_of_a_page(dtype: DataType, size: int) -> None:
    tiles = torch.ones(2, 1, 1, 64, 96, dtype=dtype.storage)
    assert pack(tiles, dtype).numel() == 2 * 6 * size == 12 * dtype.bytes_of(1024)


def of_bits(*patterns: int) -> torch.Tensor:
    """Return a block of 16 float32 values with these bit patterns, then zeros."""
    block = torch.zeros(16)
    block[: len(patterns)] = torch.tensor(patterns).to(torch.int32).view(torch.float32)
    return block


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_block_float_rounds_to_the_nearest_also_next_to_a_tie(dtype: DataType) -> None:
    step = 2.0 ** (1 - BITS[dtype])
    block = torch.zeros(16)
    block[0] = 1.0
    for place, tie in enumerate((0.5, 1.5, 2.5, 3.5)):
        tie = torch.tensor(tie * step)
        block[1 + 3 * place : 4 + 3 * place] = torch.stack(
            [tie.nextafter(torch.tensor(0.0)), tie, tie.nextafter(INFINITY)]
        )
    got = (round_on_device(block.clone(), dtype) / step).tolist()
    assert got[1:13] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    # ttnn's host cuts off what is below the last place of the block's largest value: just above a tie is a tie.
    got = (round_on_host(block, dtype) / step).tolist()
    assert got[1:13] == [0, 0, 0] + (
        [1, 2, 2, 2, 2, 2, 3, 4, 4] if dtype is DataType.BFLOAT8_B else got[4:13]
    )


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_host_block_floats_keep_the_least_normal_numbers_and_no_denormals(dtype: DataType) -> None:
    least = of_bits(0x00800000, 0x80C00000, 0x007FFFFF, 0x00000001)
    assert torch.equal(bits(round_on_host(least, dtype)), bits(of_bits(0x00800000, 0x80C00000)))
    assert torch.equal(bits(round_on_host(of_bits(0x007FFFFF, 0x80400000), dtype)), bits(torch.zeros(16)))


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_host_block_floats_with_infinities_and_nans_keep_them_and_lose_the_small(dtype: DataType) -> None:
    block = of_bits(0x7FC00000, 0xFF800000, 0x7F7FFFFF, 0x7E800000, 0x3F800000)
    expected = of_bits(0x7FC00000, 0xFF800000, 0x7F800000, 0x7E800000, 0)
    assert torch.equal(bits(round_on_host(block, dtype)), bits(expected))


@pytest.mark.parametrize("dtype", BLOCK_FLOATS)
def test_packing_round_trips_what_the_host_and_the_device_can_hold(dtype: DataType) -> None:
    seed = generator(6)
    raw = torch.randint(-(2**31), 2**31, (64, 64, 16), generator=seed).to(torch.int32)
    raw[:24] &= -0x78000001  # exponents below 16: blocks of the least numbers
    values = raw.view(torch.float32)
    values[40] = 0
    values[41:, :, 5] = INF
    host = round_on_host(values, dtype)
    assert torch.equal(bits(unpack(pack(host, dtype), host.shape, dtype)), bits(host))
    values = torch.randn(64, 64, 16, generator=seed)
    values[3, 4, 5] = NAN
    device = round_on_device(values, dtype)
    torch.testing.assert_close(
        unpack(pack(device, dtype), device.shape, dtype), device, rtol=0, atol=0, equal_nan=True
    )
    assert device[3, 4, 5].isnan() and device[4].isfinite().all()


def test_floats_become_integers_cut_off_wrapped_or_saturated() -> None:
    values = torch.tensor([1.9, -1.9, 300.5, 70000.0, 3e9, 5e9, NAN, -INF])
    assert (
        round_on_host(values, DataType.UINT32).tolist() == [1, 2**32 - 1, 300, 70000, 3 * 10**9] + [2**31] * 3
    )
    assert round_on_host(values, DataType.INT32).tolist() == [1, -1, 300, 70000] + [-(2**31)] * 4
    assert round_on_host(values, DataType.UINT16).tolist() == [1, 0, 300, 65535, 0, 0, 0, 0]
    assert round_on_host(values, DataType.UINT8).tolist() == [1, 0, 255, 255, 0, 0, 0, 0]
    assert round_on_host(values.double(), DataType.UINT8).tolist()[:4] == [1, 255, 44, 112]


@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.int16])
def test_integers_wrap_around_in_narrower_dtypes(source: torch.dtype) -> None:
    values = torch.tensor([-1, 0, 300, -(2**15)], dtype=source)
    assert round_on_host(values, DataType.UINT32).tolist() == [2**32 - 1, 0, 300, 2**32 - 2**15]
    assert round_on_host(values, DataType.UINT16).tolist() == [65535, 0, 300, 2**15]
    assert round_on_host(values, DataType.UINT8).tolist() == [255, 0, 44, 0]
    assert round_on_host(values, DataType.INT32).tolist() == [-1, 0, 300, -(2**15)]
