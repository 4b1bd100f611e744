"""What from_torch makes of values is bit for bit what ttnn's host code makes of them: every dtype from every torch dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: ttnn does not leave a process as it was.
SCRIPT = """
import json, sys, torch, ttnn
from disagg_tt.device.emulator.numeric import round_on_host
from disagg_tt.device.emulator.types import DataType

seed = 5
g = torch.Generator().manual_seed(seed)
rows, width = 512, 64  # whole tiles and blocks

def random(low, high, shape=(rows, width), dtype=torch.int64):
    return torch.randint(low, high, shape, generator=g, dtype=dtype)

def floats(exponents, mantissas=(0, 2**23)):
    raw = random(*mantissas) | random(*exponents) << 23 | random(0, 2) << 31
    return raw.to(torch.int32).view(torch.float32)

normal = torch.randn(rows, width, generator=g)
mixed = floats((0, 24))
mixed[::2] = 0
infinite = normal.clone()
infinite[0, 3], infinite[5, 40] = float("inf"), float("-inf")
with_nans = normal.clone()
with_nans.view(-1)[random(0, rows * width, (50,))] = float("nan")
FLOATS = {
    "normal": normal,
    "any bits": random(0, 2**32).to(torch.int32).view(torch.float32),
    "spread": normal * torch.exp2(random(-60, 60).float()),
    "ties": torch.arange(4096).reshape(64, 64) / 16.0 + 0.5,
    "negative ties": -torch.arange(4096).reshape(64, 64) / 16.0 - 0.5,
    "just above ties": (random(0, 256) << 15 | random(0, 3) | random(110, 130) << 23).to(torch.int32).view(torch.float32),
    "tiny": floats((0, 12)), "tiny and zero": mixed, "denormal": floats((0, 1)), "huge": floats((240, 255)),
    "least exact": floats((20, 30)), "infinities and NaNs": floats((244, 256)),
    "infinite": infinite, "some NaNs": with_nans, "zeros": torch.zeros(32, 32), "negative zeros": -torch.zeros(32, 32),
    "carry": torch.full((32, 32), 1.9999999), "not whole tiles": normal[:40, :50], "one value": normal[:1, :1],
    "three axes": normal[:60].reshape(3, 20, 64)[..., :33],
}
small = (random(-2**20, 2**20, (64, 64)) / 64).float()
edges = [0, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, -2**31, -2**31 - 1]
integers = torch.tensor(edges + random(-2**40, 2**40, (64 * 64 - len(edges),)).tolist()).reshape(64, 64)
wide = torch.randn(64, 64, generator=g) * torch.exp2(random(-8, 40, (64, 64)).float())
wide[3, 5], wide[4, 6], wide[5, 7] = float("nan"), float("inf"), float("-inf")
INTEGERS = {
    dtype: integers.to(getattr(torch, dtype))
    for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64")
}
MIXED = {"fractions": small, "out of range": wide, "bfloat16": wide.bfloat16(), "fractions of float64": small.double(),
         "fractions of float16": small.clamp(-65000, 65000).half()}

def bits(values, dtype):
    return values.float().contiguous().view(torch.int32) if dtype.is_float else values.to(torch.int64)

def compare(name, values, dtype):
    real = ttnn.to_torch(ttnn.from_torch(values, dtype=getattr(ttnn, dtype.value), layout=ttnn.TILE_LAYOUT))
    ours = round_on_host(values, dtype)
    wrong = bits(real, dtype) != bits(ours, dtype)
    if not dtype.is_block_float:  # which of the NaNs it is depends on torch's build
        wrong &= ~(real.isnan() & ours.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        different.append([name, dtype.value, int(wrong.sum()), at, *[str(v[at].item()) for v in (values, real, ours)]])

different, made = [], 0
for name, values in FLOATS.items():
    for dtype in (DataType.BFLOAT8_B, DataType.BFLOAT4_B, DataType.BFLOAT16, DataType.FLOAT32):
        compare(name, values, dtype)
        if dtype.is_block_float:
            compare(name + ", of bfloat16", values.bfloat16(), dtype)
        made += 1
for name, values in {**INTEGERS, **MIXED}.items():
    for dtype in DataType:
        compare(name, values, dtype)
        made += 1
print("RESULT", json.dumps([made, different]))
"""


@pytest.mark.timeout(120)
def test_host_conversion_is_bit_for_bit_that_of_ttnn(mock_environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made, different = json.loads(done.stdout.split("RESULT", 1)[1])
    assert made > 150
    assert not different, f"[case, dtype, values that differ, first, its input, ttnn's, ours]: {different}"
