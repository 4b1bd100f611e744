"""Elementwise ops of the emulator give what ttnn's golden functions give, every element within one step of its dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: ttnn does not leave a process as it was.
SCRIPT = """
import json, torch, ttnn as real
from disagg_tt.device import emulator as ttnn

ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
g = torch.Generator().manual_seed(31)
finite = torch.randn(64, 64, generator=g).bfloat16().float()
other = torch.randn(64, 64, generator=g).bfloat16().float()
row = other[:1]
words = torch.randint(-2**31, 2**31, (64, 64), generator=g, dtype=torch.int64)
more = torch.randint(-2**31, 2**31, (64, 64), generator=g, dtype=torch.int64)


def put(x, dtype):
    return ttnn.from_torch(x, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh)


def steps(got, golden, dtype):
    got, golden = ttnn.to_torch(got).double(), golden.double()
    if not dtype.is_float:
        return (got - golden).abs().max().item()
    bits = 8 if dtype is ttnn.bfloat16 else 24
    step = torch.exp2((torch.frexp(golden.abs().clamp(min=2.0**-100)).exponent - bits).double())
    return ((got - golden).abs() / step).max().item()


worst = {}
for dtype in (ttnn.bfloat16, ttnn.float32):
    for name in "relu gelu silu exp neg abs sigmoid tanh square identity sqrt rsqrt log reciprocal".split():
        x = (finite.abs() + 0.125).bfloat16().float() if name in ("sqrt", "rsqrt", "log", "reciprocal") else finite
        golden = real.get_golden_function(getattr(real, name))(x.double())
        worst[f"{name} {dtype.value}"] = steps(getattr(ttnn, name)(put(x, dtype)), golden, dtype)
    for name in "add subtract multiply div rsub maximum minimum eq ne lt gt le ge".split():
        for b in (other, row, finite):
            golden = real.get_golden_function(getattr(real, name))(finite.double(), b.double())
            got = getattr(ttnn, name)(put(finite, dtype), put(b, dtype))
            key = f"{name} {dtype.value} {list(b.shape)}"
            worst[key] = max(worst.get(key, 0), steps(got, golden, dtype))
    golden = real.get_golden_function(real.clamp)(finite.double(), -0.5, 1.5)
    worst[f"clamp {dtype.value}"] = steps(ttnn.clamp(put(finite, dtype), -0.5, 1.5), golden, dtype)
for name in "add subtract multiply eq ne lt gt le ge maximum minimum".split():
    golden = real.get_golden_function(getattr(real, name))(words.int(), more.int())
    got = getattr(ttnn, name)(put(words, ttnn.int32), put(more, ttnn.int32))
    worst[f"{name} int32"] = steps(got, golden, ttnn.int32)
for source, values in ((ttnn.int32, words), (ttnn.bfloat16, finite * 50)):
    for dtype, torch_dtype in ((ttnn.float32, torch.float32), (ttnn.bfloat16, torch.bfloat16), (ttnn.int32, torch.int32)):
        held = ttnn.to_torch(put(values, source)).to(torch.float32 if source.is_float else torch.int32)
        golden = real.get_golden_function(real.typecast)(held, getattr(real, dtype.value))
        worst[f"typecast {source.value} {dtype.value}"] = steps(ttnn.typecast(put(values, source), dtype), golden, dtype)
count = real.get_golden_function(real.plus_one)(words[:1].int())
got = ttnn.plus_one(ttnn.from_torch(words[:1], dtype=ttnn.int32, device=mesh, layout=ttnn.ROW_MAJOR_LAYOUT))
worst["plus_one"] = steps(got, count, ttnn.int32)
print("RESULT", json.dumps(worst))
"""


def test_elementwise_ops_agree_with_ttnns_golden_functions(mock_environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.split("RESULT", 1)[1])
    assert len(worst) > 80
    far = {name: steps for name, steps in worst.items() if not steps <= 1}
    assert not far, far
