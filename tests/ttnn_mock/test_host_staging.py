"""Staging in host memory on the real runtime: every call is accepted, and the bytes are those of the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, cli

# In a process of its own: ttnn does not leave a process as it was.
SCRIPT = """
import json, sys, torch, ttnn
from disagg_tt.device import emulator

workers = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
meshes = {}
for module, more in ((ttnn, {"dispatch_core_config": workers}), (emulator, {})):
    module.set_fabric_config(module.FabricConfig.FABRIC_2D)
    meshes[module] = module.open_mesh_device(module.MeshShape(1, 2), **more)

def observed(module, shape, dtype, layout):
    mesh, kind, order = meshes[module], getattr(module, dtype), getattr(module, layout)
    generator = torch.Generator().manual_seed(4)
    values = torch.randint(0, 1000, shape, generator=generator, dtype=torch.int32)
    if "float" in dtype:
        values = torch.randn(shape, generator=generator)
    made = module.from_torch(values, dtype=kind, layout=order)
    packed = torch.from_dlpack(made.host_buffer().get_shard(module.MeshCoordinate(0, 0)))
    spec = module.TensorSpec(module.Shape(shape), kind, order)
    host = module.allocate_tensor_on_host(spec, mesh)
    buffer = host.host_buffer()
    parts = [torch.from_dlpack(buffer.get_shard(place)) for place in module.MeshCoordinateRange(mesh.shape)]
    parts[1].copy_(packed)
    back = module.to_torch(host, mesh_composer=module.ConcatMeshToTensor(mesh, 0)).float()
    device = module.allocate_tensor_on_device(spec, mesh)
    module.copy_host_to_device_tensor(host, device)
    for blocking in (True, False):
        module.copy_device_to_host_tensor(device, host, blocking=blocking)
    module.event_synchronize(module.record_event(mesh, 0))
    again = torch.from_dlpack(host.host_buffer().get_shard(module.MeshCoordinate(0, 1)))
    return [packed, [part.numel() for part in parts], back, again.data_ptr() == parts[1].data_ptr()]

different, seen = [], 0
for shape in ([1, 2, 64, 96], [1, 1, 33, 40], [5, 7], [17], [1, 2, 3, 32, 64]):
    for dtype in ("bfloat16", "float32", "uint32", "int32", "uint16", "bfloat8_b", "bfloat4_b"):
        for layout in ("TILE_LAYOUT", "ROW_MAJOR_LAYOUT")[: 1 if dtype.endswith("_b") else 2]:
            one, other = (observed(module, shape, dtype, layout) for module in (ttnn, emulator))
            seen += 1
            if not (torch.equal(one[0], other[0]) and torch.equal(one[2], other[2]) and one[1::2] == other[1::2]):
                different.append([shape, dtype, layout])
print("\\n" + json.dumps([seen, different]))
"""


def test_bytes_sizes_values_and_addresses_are_those_of_ttnn(mock_environment):
    env = {**os.environ, **mock_environment, "DISAGG_TT_DEVICE": "ttnn", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert json.loads(lines[-1]) == [60, []]


@pytest.mark.parametrize("kv_dtype", ["bfloat8_b", "bfloat16"])
def test_two_ranks_stream_over_tcp_with_the_real_runtimes_staging(mock_environment, kv_dtype):
    flags = ["--transport", "tcp", "--kv-dtype", kv_dtype, "--max-new-tokens", "3", "--ignore-eos", "--raw"]
    done = cli("generate", "--json", "--prompt", "Hello", *flags, DISAGG_TT_DEVICE="ttnn", **mock_environment)
    (answer,) = done.answers()
    perf = answer["perf"]
    assert (
        perf["kv_bytes"]
        == perf["kv_bytes_sent"]
        == 2 * 4 * 4 * 2 * (1088 if kv_dtype == "bfloat8_b" else 2048)
    )
    assert done.left == []


def test_mpi_beside_a_wheels_own_mpi_is_refused_with_a_reason(mock_environment):
    done = cli("generate", "--transport", "mpi", DISAGG_TT_DEVICE="ttnn", **mock_environment)
    assert (done.code, done.left) == (2, [])
    assert "mpi4py cannot share" in done.err
