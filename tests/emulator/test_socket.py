"""MeshSockets: what is sent arrives exactly, in one process and between ranks, and what would hang says why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from socket_ranks import KINDS, PATIENCE, config, empty, read, sent, values
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError
from disagg_tt.launch import MPI_SETTINGS

PROGRAM = Path(__file__).with_name("socket_ranks.py")
WIRE = {  # bytes of both chips' shards, in whole pages
    "bfloat16": 2 * 2 * 2 * 2 * 2048,
    "bfloat8_b": 2 * 2 * 32 * 2 * 1088,
    "uint32": 2 * 4096,
    "rows": 2 * 5 * 128,
}
MODES = ["fifo", "direct"]
SCENARIOS = ["exact", "mismatch", "unreceived", "late", "different_ends", "mesh_ids", "context"]


@pytest.fixture
def meshes(open_mesh: OpenMesh, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Two meshes of 1x2 chips; what waits for the other end in vain waits half a second."""
    monkeypatch.setenv(PATIENCE, "0.5")
    return open_mesh(1, 2), open_mesh(1, 2)


def pair(meshes: tuple[Any, Any], **options: Any) -> tuple[Any, Any]:
    return ttnn.create_socket_pair(*meshes, config(**options))


def ops(mode: str) -> tuple[Any, Any]:
    x = ttnn.experimental
    return (x.send_async, x.recv_async) if mode == "fifo" else (x.send_direct_async, x.recv_direct_async)


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["send", "receive"])
def test_each_chips_shard_arrives_exactly(meshes: tuple[Any, Any], kind: str, mode: str, first: str) -> None:
    (send, receive), (out, into) = ops(mode), pair(meshes)
    source, target = sent(meshes[0], kind), empty(meshes[1], kind)
    if first == "send":
        assert send(source, out) == []
        assert receive(target, into) == [target]
    else:
        receive(target, into)
        send(source, out)
    expected = read(meshes[0], source)
    assert torch.equal(read(meshes[1], target), expected)
    if kind == "uint32":
        assert torch.equal(expected, values(kind)), "an integer changed on the way to the device"
    ttnn.synchronize_device(meshes[0])
    assert out.bytes_written == WIRE[kind]
    assert into.bytes_written == 0


def test_a_replicated_tensor_arrives_on_every_chip(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    x = torch.arange(64.0).view(1, 1, 2, 32)
    source = ttnn.from_torch(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=meshes[0])
    target = ttnn.allocate_tensor_on_device(source.shape, ttnn.bfloat16, ttnn.TILE_LAYOUT, meshes[1])
    ttnn.experimental.send_async(source, out)
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(read(meshes[1], target), torch.cat([x, x]))


def test_many_transfers_arrive_in_the_order_of_the_sends(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    staging = ttnn.allocate_tensor_on_device(
        ttnn.Shape([1, 1, 32, 32]), ttnn.float32, ttnn.TILE_LAYOUT, meshes[1]
    )
    total = ttnn.zeros_like(staging)
    for i in range(20):
        x = torch.full((1, 1, 32, 32), float(2**i))
        source = ttnn.from_torch(x, dtype=ttnn.float32, layout=ttnn.TILE_LAYOUT, device=meshes[0])
        ttnn.experimental.send_async(source, out)
    for _ in range(20):
        ttnn.experimental.recv_async(staging, into)  # the same staging tensor: the queue keeps the order
        total = ttnn.add(total, staging)
    assert read(meshes[1], total).unique().tolist() == [2**20 - 1]
    assert read(meshes[1], staging).unique().tolist() == [2**19]


def test_sending_does_not_block_the_host_nor_the_other_queue(open_mesh: OpenMesh) -> None:
    ours, theirs = open_mesh(1, 2, num_command_queues=2), open_mesh(1, 2)
    out, into = pair((ours, theirs))
    source = sent(ours, "bfloat16")
    ttnn.wait_for_event(1, ttnn.record_event(ours, 0))
    with ttnn.command_queue(1):
        ttnn.experimental.send_async(source, out)
        done = ttnn.record_event(ours, 1)
    double = read(ours, ttnn.add(source, source))  # computed and read while the send has nobody to take it
    with pytest.raises(DeviceError, match="freed while work on .*queue 1 may still be reading it"):
        ttnn.deallocate(source)
    target = empty(theirs, "bfloat16")
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(2 * read(theirs, target), double)
    ttnn.event_synchronize(done)
    ttnn.deallocate(source)


def test_a_tensor_freed_on_the_sends_own_queue_is_sent_all_the_same(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    source, target = sent(meshes[0], "bfloat16"), empty(meshes[1], "bfloat16")
    expected = read(meshes[0], source)
    ttnn.experimental.send_async(source, out)
    ttnn.deallocate(source)
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(read(meshes[1], target), expected)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda m: empty(m, "bfloat8_b"), "'dtype': 'bfloat8_b'"),
        (lambda m: ttnn.allocate_tensor_on_device(ttnn.Shape([1, 2, 72, 64]), ttnn.bfloat16, ttnn.TILE_LAYOUT, m), r"\[1, 2, 72, 64\]"),
        (lambda m: ttnn.allocate_tensor_on_device(ttnn.Shape([1, 2, 40, 64]), ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, m), "'layout': 'ROW_MAJOR'"),
    ],
    ids=["dtype", "shape", "layout"],
)  # fmt: skip
def test_different_specs_are_an_error_on_both_sides_that_names_both(
    meshes: tuple[Any, Any], other: Any, differs: str
) -> None:
    out, into = pair(meshes)
    ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)
    ttnn.experimental.recv_async(other(meshes[1]), into)
    for mesh in meshes:
        with pytest.raises(
            DeviceError,
            match=rf"sends .*\[1, 2, 40, 64\].*bfloat16.*receives .*{differs}.*hardware this hangs",
        ):
            ttnn.synchronize_device(mesh)


def test_a_fifo_send_and_a_direct_receive_do_not_match(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)
    ttnn.experimental.recv_direct_async(empty(meshes[1], "bfloat16"), into)
    with pytest.raises(DeviceError, match="sends .*'mode': 'fifo'.* receives .*'mode': 'direct'"):
        ttnn.synchronize_device(meshes[1])


def test_receives_in_another_order_than_the_sends_are_an_error(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    for kind in ("bfloat16", "uint32"):
        ttnn.experimental.send_async(sent(meshes[0], kind), out)
    for kind in ("uint32", "bfloat16"):
        ttnn.experimental.recv_async(empty(meshes[1], kind), into)
    for mesh in meshes:
        with pytest.raises(
            DeviceError,
            match="sends .*'number': 1.*bfloat16.* receives .*'number': 1.*uint32.*order of the sends",
        ):
            ttnn.synchronize_device(mesh)


def test_a_receive_that_nobody_sends_ends_with_what_it_waits_for(meshes: tuple[Any, Any]) -> None:
    _, into = pair(meshes)
    target = empty(meshes[1], "bfloat16")
    ttnn.experimental.recv_async(target, into)
    behind = ttnn.add(target, target)
    with pytest.raises(DeviceError, match="recv_async"):
        read(meshes[1], behind)


def test_a_send_that_nobody_receives_ends_with_what_it_waits_for(meshes: tuple[Any, Any]) -> None:
    out, _ = pair(meshes)
    ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)
    with pytest.raises(DeviceError, match="send_async"):
        ttnn.synchronize_device(meshes[0])


def test_a_fifo_must_hold_a_page_but_direct_needs_none(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes, fifo=1088)
    source, target = sent(meshes[0], "bfloat16"), empty(meshes[1], "bfloat16")
    with pytest.raises(
        DeviceError, match="send_async: FIFO of 1088 B for pages of 2048 B; make it 2048 B or more"
    ):
        ttnn.experimental.send_async(source, out)
    with pytest.raises(DeviceError, match="recv_async: FIFO of 1088 B for pages of 2048 B"):
        ttnn.experimental.recv_async(target, into)
    ttnn.experimental.send_direct_async(source, out)
    ttnn.experimental.recv_direct_async(target, into)
    ttnn.experimental.send_async(sent(meshes[0], "bfloat8_b"), out)
    staging = empty(meshes[1], "bfloat8_b")
    ttnn.experimental.recv_async(staging, into)
    assert torch.equal(read(meshes[1], target), read(meshes[0], source))


def test_three_connections_a_chip_fail_at_the_first_send(meshes: tuple[Any, Any]) -> None:
    out, _ = pair(meshes, links=3)
    with pytest.raises(DeviceError, match="send_async: 3 connections on one chip; the fabric has 2 links"):
        ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)


def test_a_chip_without_a_connection_is_an_error(meshes: tuple[Any, Any]) -> None:
    one = config()
    one.connections = one.connections[:2]
    out, _ = ttnn.create_socket_pair(*meshes, one)
    with pytest.raises(
        DeviceError, match="the socket connects 1 of 2 chips; the others' shards would not move"
    ):
        ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)


def test_sockets_that_cannot_be_made_say_why(meshes: tuple[Any, Any]) -> None:
    bad = config()
    bad.connections = []
    with pytest.raises(DeviceError, match="no connections"):
        ttnn.create_socket_pair(*meshes, bad)
    bad = config()
    bad.connections[1] = bad.connections[0]
    with pytest.raises(DeviceError, match="two connections share the receiver core"):
        ttnn.create_socket_pair(*meshes, bad)


def test_the_wrong_end_mesh_or_side_is_an_error(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    x = ttnn.experimental
    with pytest.raises(
        DeviceError, match="send_async: tensor on .*chips \\[2, 3\\].*, socket on .*chips \\[0, 1\\]"
    ):
        x.send_async(sent(meshes[1], "rows"), out)
    with pytest.raises(DeviceError, match="send_async on the socket's receiving end; use the other end"):
        x.send_async(sent(meshes[1], "rows"), into)
    with pytest.raises(DeviceError, match="recv_async on the socket's sending end; use the other end"):
        x.recv_async(empty(meshes[0], "rows"), out)
    host = ttnn.from_torch(torch.ones(32, 32), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    with pytest.raises(DeviceError, match="send_async: input .* is on the host"):
        x.send_async(host, out)


def test_a_socket_needs_a_fabric() -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 2))
    try:
        with pytest.raises(DeviceError, match="MeshSocket without a fabric; call set_fabric_config"):
            ttnn.create_socket_pair(mesh, mesh, config())
    finally:
        ttnn.close_mesh_device(mesh)


# ---------------------------------------------------------------- two ranks


def job(*names: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the scenarios as two ranks; return the job's exit code, each rank's results, and what was printed."""
    root = str(PROGRAM.parents[2])
    settings = {f"OMPI_MCA_{name}": value for name, value in MPI_SETTINGS.items()}
    if os.geteuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": root, PATIENCE: "30"}
    mpirun = Path(sys.executable).with_name("mpirun")
    done = subprocess.run(
        [str(mpirun), "--oversubscribe", "--bind-to", "none", "-np", "2", sys.executable, str(PROGRAM), *names],
        env=environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    lines = [line.split("RESULT", 1)[1] for line in done.stdout.splitlines() if "RESULT" in line]
    return done.returncode, sorted(map(json.loads, lines), key=lambda r: r["rank"]), done.stdout + done.stderr


def test_two_ranks_move_values_exactly_and_learn_what_went_wrong() -> None:
    code, results, printed = job(*SCENARIOS)
    assert (code, len(results)) == (0, 2), printed
    sender, receiver = results

    for name in ("exact", "late", "mesh_ids"):
        assert len(receiver[name]["same"]) == 2 * len(KINDS)
        assert all(receiver[name]["same"].values()), receiver[name]
        assert (sender[name]["bytes"], receiver[name]["bytes"]) == (2 * sum(WIRE.values()), 0)

    waits_for = re.compile(r"rank 1 .*'number': 1.*\[1, 2, 40, 64\].* did not happen within 1 s")
    assert waits_for.search(sender["unreceived"]["error"]), sender["unreceived"]["error"]
    both = re.compile(r"socket transfer mismatch: .* sends .*'bfloat8_b'.* receives .*'bfloat16'")
    for rank in results:
        assert both.search(rank["mismatch"]["error"]), rank["mismatch"]["error"]
        assert rank["mismatch"]["seconds"] < 25, "a rank learnt of the mismatch only from its own timeout"
        assert "timed out trying to establish a socket connection" in rank["late"]["error"]
        assert "socket ends differ" in rank["different_ends"]["error"]
        assert "'fifo': 4096" in rank["different_ends"]["error"]
        assert "'fifo': 8192" in rank["different_ends"]["error"]
        assert (
            "mesh id 9 belongs to 0 ranks; the ranks' mesh ids (TT_MESH_ID) are [7, 8]"
            in rank["mesh_ids"]["error"]
        )
        assert (rank["context"]["all"], rank["context"]["size"]) == ([10, 11], 2)
    assert receiver["context"]["got"] == "prefill\0"


def test_a_rank_that_dies_ends_the_job() -> None:
    code, results, printed = job("early_exit")
    assert code != 0, printed
    assert results == []
