"""Norms, softmax, reductions, argmax, topk and embedding against ttnn's own golden functions, on the same inputs.

Golden functions run on torch tensors, here float64: they are compared before any rounding but the emulator's one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, torch, ttnn as real
from disagg_tt.device import emulator as ttnn

ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
g = torch.Generator().manual_seed(21)


def values(*shape):
    return torch.randn(shape, generator=g).bfloat16().double()


def put(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT):
    return ttnn.from_torch(x.float() if x.is_floating_point() else x, dtype=dtype, layout=layout, device=mesh)


x, residual, weight, bias = values(2, 3, 33, 96), values(2, 3, 33, 96), values(96), values(96)
cases = []


def case(name, args, **options):
    cases.append((name, args, options))


rows = {"weight": weight, "bias": bias, "residual_input_tensor": residual}


for name in ("rms_norm", "layer_norm"):
    for parts in ((), ("weight",), ("weight", "bias"), ("weight", "bias", "residual_input_tensor")):
        case(name, [x], epsilon=1e-5, **{part: rows[part] for part in parts})
for dim in (-1, 2, 1, 0):
    case("softmax", [x], dim=dim)
for name in ("sum", "mean", "max", "min", "std", "var"):
    for dim in (None, -1, 2, 1, 0, (2, 3)):
        for keepdim in (False, True):
            case(name, [x], dim=dim, keepdim=keepdim)
    case(name, [x], dim=-1, scalar=-1.5)
for dim in (-1, 2, 1, 0):
    case("argmax", [x], dim=dim, keepdim=True)
case("topk", [x], k=7, stable=True)
case("topk", [x], k=7, dim=2, largest=False, stable=True)
case("embedding", [torch.randint(0, 50, (2, 40), generator=g), values(50, 64)])

worst = {}
for name, args, options in cases:
    layout = ttnn.ROW_MAJOR_LAYOUT if name == "embedding" else ttnn.TILE_LAYOUT
    device = [put(a, ttnn.bfloat16 if a.is_floating_point() else ttnn.uint32, layout) for a in args]
    got = getattr(ttnn, name)(*device, **{k: put(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()})
    golden = real.get_golden_function(getattr(real, name))(*[a.clone() for a in args], **options)
    for a, b in zip(got if isinstance(got, tuple) else [got], golden if isinstance(golden, tuple) else [golden]):
        a, b = ttnn.to_torch(a).double(), b.double()
        error = ((a - b.reshape(a.shape)).abs() / b.abs().clamp(min=2.0**-7).reshape(a.shape)).max().item()
        worst[name] = max(worst.get(name, 0.0), error)
print("RESULT", json.dumps({"cases": len(cases), "worst": worst}))
"""


def test_norms_reductions_and_embedding_agree_with_golden_functions(mock_environment: dict[str, str]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT", 1)[1])
    assert result["cases"] > 80
    assert len(result["worst"]) == 12
    for op, error in result["worst"].items():
        # 2^-8: half of the last of bfloat16's eight bits. max and min are exact but for the scalar of one case.
        assert error <= (0 if op in ("argmax", "embedding", "topk") else 1.01 * 2.0**-8), (
            f"{op} is off by {error}"
        )
