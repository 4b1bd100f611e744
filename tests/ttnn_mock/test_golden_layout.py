"""Every op that moves values against ttnn's golden function of it, bit for bit; none of them needs a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mock

CODE = """
import json, torch, ttnn as real
from disagg_tt.device import emulator as ttnn

ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
g = torch.Generator().manual_seed(31)
x = torch.randn(2, 3, 40, 64, generator=g).bfloat16().float()
y = torch.randn(2, 3, 40, 64, generator=g).bfloat16().float()
ones = torch.randn(2, 1, 40, 1, generator=g).bfloat16().float()
end = real.Shape([1, 2, 30, 50])
calls = [
    ("reshape", (x, (3, 2, 80, 32)), {}), ("view", (x, [6, 1, 40, 64]), {}), ("squeeze", (ones, 1), {}),
    ("squeeze", (ones, [1, 3]), {}), ("unsqueeze", (x, 2), {}), ("unsqueeze_to_4D", (x[0],), {}),
    ("permute", (x, (0, 3, 1, 2)), {}), ("transpose", (x, 1, 3), {}),
    ("slice", (x, [0, 1, 3, 8], [2, 3, 40, 64], [1, 1, 2, 3]), {}),
    ("pad", (x, [(0, 1), (0, 2), (3, 4)]), {"value": 1.5}), ("pad", (x, [2, 3, 45, 70], [0, 0, 2, 3]), {"value": -2.0}),
    ("concat", ([x, y],), {"dim": 2}), ("stack", ([x, y], 1), {}), ("split", (x, [8, 32], 2), {}), ("split", (x, 24, 3), {}),
    ("chunk", (x, 3, 2), {}), ("repeat", (x, [2, 1, 3, 1]), {}), ("repeat_interleave", (x, 2), {"dim": 1}),
    ("expand", (ones, [2, 3, 40, 5]), {}), ("untilize", (x,), {}), ("untilize_with_unpadding", (x, end), {}),
    ("tilize_with_val_padding", (x, real.Shape([2, 3, 64, 64]), 1.0), {}), ("tilize_with_zero_padding", (x,), {}), ("move", (x,), {}),
]


def put(value, layout):
    if isinstance(value, torch.Tensor):
        return ttnn.from_torch(value, dtype=ttnn.bfloat16, layout=layout, device=mesh)
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [put(v, layout) for v in value]
    return value


agreed = {}
for op, args, kwargs in calls:
    golden = real.get_golden_function(getattr(real, op))(*args, **kwargs)
    for layout in (ttnn.ROW_MAJOR_LAYOUT, ttnn.TILE_LAYOUT):
        if (op.startswith("untilize") and layout is ttnn.ROW_MAJOR_LAYOUT) or (op == "pad" and layout is ttnn.TILE_LAYOUT):
            continue
        ours = getattr(ttnn, op)(*(put(a, layout) for a in args), **kwargs)
        pairs = list(zip(ours, golden, strict=True)) if isinstance(ours, list) else [(ours, golden)]
        agreed.setdefault(op, []).append(all(torch.equal(ttnn.to_torch(a).float(), b.float()) for a, b in pairs))
print("RESULT", json.dumps(agreed))
"""


def test_ops_that_move_values_are_equal_to_ttnns_golden_functions(mock_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    agreed = json.loads(done.stdout.split("RESULT", 1)[1])
    assert len(agreed) == 21
    assert all(all(equal) for equal in agreed.values()), agreed
