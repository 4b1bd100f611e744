"""What ops have in common: undefined values, integers, host and device tensors that do not share memory.

Meshes are 1x2 unless a test says otherwise; where an op works chip by chip, each chip has values of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import (
    ROW_MAJOR,
    TILE,
    height_sharded,
    put,
    same_on_all,
    values,
)

from disagg_tt.device import emulator as ttnn

NAN = float("nan")


# ---------------------------------------------------------------- undefined values


def test_what_is_computed_from_undefined_rows_is_undefined(mesh: Any) -> None:
    q = ttnn.to_memory_config(put(mesh, values(1, 3, 2, 64)), height_sharded(mesh, 3, 32, 64))
    x = ttnn.to_memory_config(
        ttnn.experimental.nlp_concat_heads_decode(q, num_heads=2), ttnn.L1_MEMORY_CONFIG
    )
    whole = put(mesh, values(1, 1, 32, 128), memory=ttnn.L1_MEMORY_CONFIG)
    h = ttnn.add(
        whole,
        ttnn.rms_norm(
            ttnn.mul(x, whole), epsilon=1e-5, weight=put(mesh, torch.ones(1, 1, 4, 32), layout=ROW_MAJOR)
        ),
    )
    h = ttnn.all_reduce(ttnn.linear(h, put(mesh, values(1, 1, 128, 64))), cluster_axis=1)
    logits = ttnn.untilize(ttnn.all_gather(h, dim=3, cluster_axis=1))
    read = same_on_all(logits)
    assert read[0, 0, :3].isfinite().all()
    assert read[0, 0, 3:].isnan().all()
    last = same_on_all(ttnn.slice(logits, [0, 0, 2, 0], [1, 1, 4, 128]))
    assert torch.equal(last.isnan().all(-1).flatten(), torch.tensor([False, True]))
    chosen = ttnn.reshape(ttnn.argmax(logits, dim=3, keepdim=True), ttnn.Shape([1, 32]))
    assert torch.equal(same_on_all(chosen)[0, :3], read[0, 0, :3].argmax(-1))
    embedded = ttnn.embedding(chosen, put(mesh, values(1, 1, 128, 64), layout=ROW_MAJOR), layout=TILE)
    assert torch.equal(same_on_all(embedded)[0].isnan().all(-1), torch.arange(32) >= 3)


# ---------------------------------------------------------------- host and device


@pytest.mark.parametrize(
    ("dtype", "numbers"), [(ttnn.uint32, [0, 35308, 2**32 - 1]), (ttnn.int32, [-(2**31), -1, 2**31 - 1]), (ttnn.uint16, [35308])]
)  # fmt: skip
def test_integers_are_exact_on_the_device(mesh: Any, dtype: Any, numbers: list[int]) -> None:
    assert same_on_all(put(mesh, torch.tensor([numbers]), dtype, ROW_MAJOR)).tolist() == [numbers]


def test_changing_the_host_tensor_afterwards_changes_nothing_on_the_device(mesh: Any) -> None:
    for dtype, torch_dtype in ((ttnn.float32, torch.float32), (ttnn.uint32, torch.int64)):
        source = torch.ones(2, 32, dtype=torch_dtype)
        device, host = put(mesh, source, dtype, ROW_MAJOR), ttnn.from_torch(source, dtype=dtype)
        source.fill_(7)
        assert same_on_all(device).unique().tolist() == [1]
        read = ttnn.to_torch(host)
        read.fill_(9)
        assert ttnn.to_torch(host).to(torch.int64).unique().tolist() == [1]


def test_a_composer_joins_the_chips_shards(mesh: Any) -> None:
    x = values(1, 1, 40, 128)
    assert torch.equal(
        ttnn.to_torch(put(mesh, x, cut=3), mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=3)).float(), x
    )
    twice = ttnn.to_torch(put(mesh, x), mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0)).float()
    assert torch.equal(twice, torch.cat([x, x]))


def test_an_allocated_tensor_reads_as_undefined_and_so_does_what_is_computed_from_it(mesh: Any) -> None:
    spec = ttnn.TensorSpec(ttnn.Shape([1, 1, 32, 64]), ttnn.bfloat16, TILE)
    x = ttnn.allocate_tensor_on_device(spec, mesh)
    for tensor in (x, ttnn.add(x, put(mesh, values(1, 1, 32, 64))), ttnn.all_gather(x, dim=3)):
        assert same_on_all(tensor).isnan().all()
    assert (same_on_all(ttnn.argmax(x, dim=3)) == 2**32 - 1).all()
    ttnn.copy_host_to_device_tensor(
        ttnn.from_torch(torch.ones(1, 1, 32, 64), dtype=ttnn.bfloat16, layout=TILE), x
    )
    assert same_on_all(x).unique().tolist() == [1]
