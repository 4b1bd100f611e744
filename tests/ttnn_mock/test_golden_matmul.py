"""Products, attention, caches and collectives against ttnn's own golden functions, on the same inputs.

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
one = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
four = ttnn.open_mesh_device(ttnn.MeshShape(2, 2))
g = torch.Generator().manual_seed(21)
worst = {}


def values(*shape):
    return torch.randn(shape, generator=g).bfloat16().double()


def put(x, mesh=one, mapper=None):
    if not isinstance(x, torch.Tensor):
        return x
    if x.is_floating_point():
        return ttnn.from_torch(
            x.float(), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=mapper
        )
    return ttnn.from_torch(x, dtype=ttnn.int32, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh)


def op(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


def note(name, got, golden):
    golden = golden.double().reshape(got.shape)
    error = ((got.double() - golden).abs() / golden.abs().clamp(min=2.0**-7)).max().item()
    worst[name] = max(worst.get(name, 0.0), error)


def check(name, *args, **options):
    golden = real.get_golden_function(op(real, name))
    expected = golden(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args], **options)
    result = op(ttnn, name)(*map(put, args), **{k: put(v) for k, v in options.items()})
    note(name, ttnn.to_torch(result), expected)


for name in ("matmul", "linear"):
    for turns in ((False, False), (True, False), (False, True), (True, True)):
        for lead_a, lead_b in (((), ()), ((2, 3), ()), ((2, 3), (2, 3)), ((1, 1), (2, 3))):
            a, b = values(*lead_a, 33, 64), values(*lead_b, 64, 40)
            a, b = (x.transpose(-1, -2) if turn else x for x, turn in zip((a, b), turns))
            check(name, a, b, transpose_a=turns[0], transpose_b=turns[1])
    check(name, values(64), values(64, 40))
    check(name, values(2, 33, 64), values(64))
    for activation in ("relu", "gelu", "silu"):
        check(name, values(33, 64), values(64, 40), activation=activation)
check("linear", values(2, 33, 64), values(64, 40), bias=values(40))
check("linear", values(2, 33, 64), values(64, 40), bias=values(40), activation="silu")

attend = "transformer.scaled_dot_product_attention"
q, k, v = values(2, 4, 33, 32), values(2, 2, 33, 32), values(2, 2, 33, 32)
check(attend, q, k, v)
check(attend, q, k, v, scale=0.3)
check(attend, q, k, v, is_causal=False)
check(attend, q, k, v, is_causal=False, attn_mask=values(2, 1, 33, 33))

q, k, v = values(1, 3, 8, 32), values(3, 2, 128, 32), values(3, 2, 128, 32)
positions = torch.tensor([0, 77, 127], dtype=torch.int32)
check("transformer.scaled_dot_product_attention_decode", q, k, v, cur_pos_tensor=positions)
check("transformer.scaled_dot_product_attention_decode", q, k, v, cur_pos=positions.tolist(), scale=0.3)
for block in (32, 64):
    pools = values(12, 2, block, 32), values(12, 2, block, 32)
    pages = torch.randperm(12, generator=g).view(3, 4).to(torch.int32)
    paged = "transformer.paged_scaled_dot_product_attention_decode"
    check(paged, q, *pools, pages, cur_pos_tensor=positions)
    chunked = "transformer.chunked_scaled_dot_product_attention"
    for start in (0, 32, 64):
        check(chunked, values(3, 4, 64, 32), *pools, pages, chunk_start_idx=start)

for prefix, fill, update in (
    ("", "fill_cache", "update_cache"),
    ("kv_cache.", "fill_cache_for_user_", "update_cache_for_token_"),
):
    check(prefix + fill, values(4, 2, 128, 32), values(1, 2, 64, 32), 2, update_idx=32)
    check(prefix + update, values(4, 2, 128, 32), values(1, 2, 4, 32), 77)
    check(prefix + update, values(4, 2, 128, 32), values(1, 2, 32, 32), 5, batch_offset=7)

# each chip of a 2x2 mesh with values of its own, cut along axes 0 and 1
x = values(2, 2, 64, 128)
mapper = ttnn.ShardTensor2dMesh(four, dims=(0, 1), mesh_shape=(2, 2))
shards = [x[r : r + 1, c : c + 1] for r in range(2) for c in range(2)]
joined = {"reduce_scatter": 3, "all_reduce": None}  # how a line's results lie: along this axis, or all the same


def composed(parts, dims):
    rows = [join(parts[2 * r : 2 * r + 2], dims[1]) for r in range(2)]
    return join(rows, dims[0])


def join(parts, dim):
    return parts[0] if dim is None else torch.cat(parts, dim=dim)


for name, args in (("all_gather", (3,)), ("reduce_scatter", (3,)), ("all_reduce", ())):
    for axis in (0, 1):
        result = getattr(ttnn, name)(put(x, four, mapper), *args, cluster_axis=axis)
        parts = [ttnn.to_torch(t) for t in ttnn.get_device_tensors(result)]
        golden = real.get_golden_function(getattr(real, name))(
            [s.clone() for s in shards],
            *args,
            cluster_axis=axis,
            _ttnn_golden_mesh_shape=(2, 2),
            _ttnn_golden_mesh_shard_dims=(0, 1),
        )
        note(name, composed(parts, [joined.get(name, (0, 1)[a]) if a == axis else a for a in (0, 1)]), golden)
print("RESULT", json.dumps(worst))
"""


def test_products_attention_caches_and_collectives_agree_with_golden_functions(
    mock_environment: dict[str, str],
) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.split("RESULT", 1)[1])
    assert len(worst) == 13
    for op, error in worst.items():
        # 2^-8: half of the last of bfloat16's eight bits, and a little for float32 sums of what nearly cancels.
        exact = "fill" in op or "update" in op or op == "all_gather"
        assert error <= (0 if exact else 1.2 * 2.0**-8), f"{op} is off by {error}"
