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


@pytest.fixture
def socket_pair(open_mesh: OpenMesh) -> Any:
    """(sending mesh, receiving mesh, sending end, receiving end) in this process."""
    whole = open_mesh(1, 2, trace_region_size=1 << 20)
    ends = whole.create_submeshes(ttnn.MeshShape(1, 1))
    place = ttnn.MeshCoordinate(0, 0)
    connection = ttnn.SocketConnection(
        ttnn.MeshCoreCoord(place, ttnn.CoreCoord(0, 0)), ttnn.MeshCoreCoord(place, ttnn.CoreCoord(0, 1))
    )
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, 16384)
    return *ends, *ttnn.create_socket_pair(*ends, ttnn.SocketConfig([connection], memory))


def test_a_trace_sends_and_receives_anew_each_time(socket_pair):
    a, b, sender, receiver = socket_pair
    x, landed, doubled = put(a, torch.zeros(32, 32)), put(b, torch.zeros(32, 32)), put(b, torch.zeros(32, 32))
    sending = ttnn.begin_trace_capture(a, cq_id=0)
    ttnn.experimental.send_async(ttnn.add(x, 1.0), sender)
    ttnn.end_trace_capture(a, sending, cq_id=0)
    receiving = ttnn.begin_trace_capture(b, cq_id=0)
    ttnn.experimental.recv_async(landed, receiver)
    ttnn.copy(ttnn.add(landed, landed), doubled)
    ttnn.end_trace_capture(b, receiving, cq_id=0)
    assert sender.bytes_written == 0, "captured work must not have run"
    for value in (2.0, 5.0, 7.0):
        ttnn.copy_host_to_device_tensor(
            ttnn.from_torch(torch.full((32, 32), value), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT), x
        )
        ttnn.execute_trace(
            b, receiving, cq_id=0, blocking=False
        )  # waits for the send, without blocking the host
        ttnn.execute_trace(a, sending, cq_id=0, blocking=False)
        assert same_on_all(doubled).unique().tolist() == [2 * (value + 1)]


def test_a_trace_captures_neither_writes_of_the_host_nor_events(open_mesh):
    mesh = open_mesh(1, 2, trace_region_size=1 << 20, num_command_queues=2)
    x, event = put(mesh, torch.zeros(32, 32)), ttnn.record_event(mesh, 1)
    host = ttnn.from_torch(torch.zeros(32, 32), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    for call in (
        lambda: put(mesh, torch.zeros(32, 32)),
        lambda: ttnn.to_device(host, mesh),
        lambda: ttnn.copy_host_to_device_tensor(host, x),
        lambda: ttnn.zeros((32, 32), device=mesh),
        lambda: ttnn.record_event(mesh, 0),
        lambda: ttnn.wait_for_event(0, event),
    ):
        with pytest.raises(DeviceError, match="captures a trace"):
            call()
    ttnn.end_trace_capture(mesh, trace, cq_id=0)


def test_a_trace_makes_its_zeros_anew_where_the_chips_make_them(mesh):
    x, target = put(mesh, torch.ones(32, 32)), put(mesh, torch.zeros(32, 32))
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    sums = ttnn.zeros_like(x)
    ttnn.add(sums, x, output_tensor=sums)
    ttnn.copy(sums, target)
    ttnn.end_trace_capture(mesh, trace, cq_id=0)
    for _ in range(2):
        ttnn.execute_trace(mesh, trace, cq_id=0)
        assert same_on_all(target).unique().tolist() == [1.0]


def test_a_trace_is_ended_by_its_own_id(mesh):
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    with pytest.raises(DeviceError, match=f"end_trace_capture of {trace + 1}: .* captures trace {trace}"):
        ttnn.end_trace_capture(mesh, trace + 1, cq_id=0)
    ttnn.end_trace_capture(mesh, trace, cq_id=0)
    with pytest.raises(DeviceError, match="captures no trace"):
        ttnn.end_trace_capture(mesh, trace, cq_id=0)
