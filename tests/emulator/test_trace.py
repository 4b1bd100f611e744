"""Traces: captured work does not run, replayed work does, on the values that are there by then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import OpenMesh, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError


@pytest.fixture
def mesh(open_mesh: OpenMesh) -> Any:
    return open_mesh(1, 2, trace_region_size=1 << 20)


def test_a_trace_runs_when_executed_and_reads_what_its_inputs_hold_then(mesh):
    x, target = put(mesh, torch.full((32, 32), 2.0)), put(mesh, torch.zeros(32, 32))
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    ttnn.copy(ttnn.add(x, x), target)
    ttnn.end_trace_capture(mesh, trace, cq_id=0)
    assert same_on_all(target).unique().tolist() == [0.0], "captured work must not have run"
    for value in (2.0, 5.0):
        ttnn.copy_host_to_device_tensor(
            ttnn.from_torch(torch.full((32, 32), value), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT), x
        )
        ttnn.execute_trace(mesh, trace, cq_id=0, blocking=False)
        assert same_on_all(target).unique().tolist() == [2 * value]
    ttnn.release_trace(mesh, trace)
    with pytest.raises(DeviceError, match="does not exist"):
        ttnn.execute_trace(mesh, trace, cq_id=0)


def test_the_host_cannot_wait_for_a_queue_that_captures(mesh):
    ttnn.begin_trace_capture(mesh, cq_id=0)
    with pytest.raises(DeviceError, match="captures a trace"):
        ttnn.synchronize_device(mesh)
    with pytest.raises(DeviceError, match="captures a trace already"):
        ttnn.begin_trace_capture(mesh, cq_id=0)


def test_a_mesh_without_a_trace_region_captures_nothing(open_mesh):
    with pytest.raises(DeviceError, match="trace_region_size is 0"):
        ttnn.begin_trace_capture(open_mesh(1, 2), cq_id=0)


def test_copy_needs_equal_specs(mesh):
    with pytest.raises(DeviceError, match="must be the same"):
        ttnn.copy(put(mesh, torch.zeros(32, 32)), put(mesh, torch.zeros(32, 64)))
