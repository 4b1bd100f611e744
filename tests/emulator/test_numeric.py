"""Rounding and packing: bit for bit what ttnn's host and, as far as seen on a simulated Wormhole, its device do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import generator

from disagg_tt.device.emulator.numeric import pack, round_on_device, round_on_host, unpack
from disagg_tt.device.emulator.types import DataType

BLOCK_FLOATS = [DataType.BFLOAT8_B, DataType.BFLOAT4_B]
BITS = {DataType.BFLOAT8_B: 7, DataType.BFLOAT4_B: 3}
NAN, INF = float("nan"), float("inf")


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


ON_TTNN = """
import json, sys, torch, ttnn
from disagg_tt.device.emulator.numeric import round_on_host
from disagg_tt.device.emulator.types import DataType

g = torch.Generator().manual_seed(5)
tie = torch.arange(4096).reshape(64, 64) / 16.0 + 0.5
spread = torch.randn(128, 256, generator=g) * torch.exp2(torch.randint(-60, 60, (128, 256), generator=g).float())
infinite = torch.randn(32, 64, generator=g)
infinite[0, 3], infinite[5, 40] = float("inf"), float("-inf")
cases = {
    "normal": torch.randn(128, 256, generator=g), "spread": spread, "ties": tie, "negative ties": -tie,
    "bfloat16": torch.randn(64, 64, generator=g).bfloat16().float(), "zeros": torch.zeros(32, 32),
    "negative zeros": -torch.zeros(32, 32), "huge": torch.randn(32, 64, generator=g) * 3e38, "infinite": infinite,
    "carry": torch.full((32, 32), 1.9999999), "not whole tiles": torch.randn(40, 50, generator=g),
}
different = []
for name, values in cases.items():
    for dtype in ("bfloat8_b", "bfloat4_b", "bfloat16"):
        real = ttnn.to_torch(ttnn.from_torch(values, dtype=getattr(ttnn, dtype), layout=ttnn.TILE_LAYOUT)).float()
        ours = round_on_host(values, DataType(dtype))
        wrong = (real.view(torch.int32) != ours.view(torch.int32)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            different.append([name, dtype, len(wrong), at, values[at].item(), real[at].item(), ours[at].item()])
print("RESULT", json.dumps(different))
"""


@pytest.mark.mock
def test_host_rounding_is_bit_for_bit_that_of_ttnn(mock_environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", ON_TTNN],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    different = json.loads(done.stdout.split("RESULT", 1)[1])
    assert not different, f"[case, dtype, values that differ, first, its input, ttnn's, ours]: {different}"
