"""MeshSockets: what is sent arrives exactly, in one process and between ranks, and what would hang says why."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

import pytest
import torch
from jobs import job
from socket_ranks import KINDS, PATIENCE, config, empty, joined, read, sent, values
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import waits
from disagg_tt.device.emulator.channel import _FAILED
from disagg_tt.errors import DeviceError, NotEmulatedError

WIRE = {  # bytes of both chips' shards, in whole pages
    "bfloat16": 2 * 2 * 2 * 2 * 2048,
    "bfloat8_b": 2 * 2 * 32 * 2 * 1088,
    "uint32": 2 * 4096,
    "rows": 2 * 5 * 128,
}
MODES = ["fifo", "direct"]
SCENARIOS = ["exact", "mismatch", "late", "different_ends", "mesh_ids", "context", "ring"]


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
        (lambda m: empty(m, "bfloat8_b"), "bfloat8_b"),
        (lambda m: ttnn.allocate_tensor_on_device(ttnn.Shape([1, 2, 72, 64]), ttnn.bfloat16, ttnn.TILE_LAYOUT, m), r"\[1, 2, 72, 64\]"),
        (lambda m: ttnn.allocate_tensor_on_device(ttnn.Shape([1, 2, 40, 64]), ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, m), "ROW_MAJOR"),
    ],
    ids=["dtype", "shape", "layout"],
)  # fmt: skip
def test_different_specs_are_an_error_on_both_sides_that_names_both(
    meshes: tuple[Any, Any], other: Any, differs: str
) -> None:
    out, into = pair(meshes, fifo=4096)  # holds less than the tensor, so the sender waits for the receiver
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
    with pytest.raises(DeviceError, match="sends .* through the FIFO; this end receives .* direct"):
        ttnn.synchronize_device(meshes[1])


def test_receives_in_another_order_than_the_sends_are_an_error(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes, fifo=4096)
    for kind in ("bfloat16", "uint32"):
        ttnn.experimental.send_async(sent(meshes[0], kind), out)
    with contextlib.suppress(DeviceError):  # the second is refused if the first has failed by then
        for kind in ("uint32", "bfloat16"):
            ttnn.experimental.recv_async(empty(meshes[1], kind), into)
    for mesh in meshes:
        with pytest.raises(
            DeviceError,
            match="sends number 1, .*bfloat16.* receives number 1, .*uint32.*order of the sends",
        ):
            ttnn.synchronize_device(mesh)


def test_a_fifo_send_is_done_when_the_rest_fits_in_the_fifo(meshes: tuple[Any, Any]) -> None:
    """8 tiles a chip over two connections: 8 KiB of FIFO for each hold them, 4 KiB do not."""
    out, into = pair(meshes, fifo=8192)
    source, target = sent(meshes[0], "bfloat16"), empty(meshes[1], "bfloat16")
    ttnn.experimental.send_async(source, out)
    ttnn.synchronize_device(meshes[0])
    again = ttnn.add(source, source)  # behind the send
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(2 * read(meshes[1], target), read(meshes[0], again))
    ttnn.experimental.send_async(source, out)
    ttnn.experimental.send_async(source, out)
    with pytest.raises(DeviceError, match="send_async number 3 of .*: a matching receive on the other mesh"):
        ttnn.synchronize_device(meshes[0])


def test_a_direct_send_is_done_when_it_is_received(meshes: tuple[Any, Any]) -> None:
    out, _ = pair(meshes, fifo=8192)
    ttnn.experimental.send_direct_async(sent(meshes[0], "uint32"), out)
    with pytest.raises(DeviceError, match="send_direct_async number 1 of .*: a matching receive"):
        ttnn.synchronize_device(meshes[0])


def test_what_is_sent_does_not_change_when_its_tensor_is_written_later(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    relay, back = pair(meshes[::-1])
    source, target = empty(meshes[0], "bfloat16"), empty(meshes[1], "bfloat16")
    first = sent(meshes[1], "bfloat16")
    ttnn.experimental.send_async(first, relay)
    ttnn.experimental.recv_async(source, back)  # now its memory is its own, and may be written in place
    ttnn.experimental.send_async(source, out)
    ttnn.synchronize_device(meshes[0])
    nothing = ttnn.from_torch(
        torch.zeros_like(values("bfloat16")), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=meshes[1],
        mesh_mapper=ttnn.ShardTensorToMesh(meshes[1], dim=0),
    )  # fmt: skip
    ttnn.experimental.send_async(nothing, relay)
    ttnn.experimental.recv_async(source, back)
    assert read(meshes[0], source).unique().tolist() == [0]
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(read(meshes[1], target), read(meshes[1], first))


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "rows"])
def test_connections_may_cross_and_leave_chips_out(
    meshes: tuple[Any, Any], kind: str, replicated: bool
) -> None:
    """Chip 0's shard goes to chip 1; chip 0 of the receiver keeps what it has."""
    out, into = ttnn.create_socket_pair(*meshes, joined({0: 1}))
    source, target = sent(meshes[0], kind), empty(meshes[1], kind)
    if replicated:
        shard = ttnn.to_torch(ttnn.get_device_tensors(source)[0])
        source = ttnn.from_torch(shard, dtype=source.dtype, layout=source.layout, device=meshes[0])
    ttnn.zeros_like(target, optional_tensor=target)
    ttnn.experimental.send_async(source, out)
    ttnn.experimental.recv_async(target, into)
    expected = read(meshes[0], source)[0]
    assert torch.equal(read(meshes[1], target), torch.stack([torch.zeros_like(expected), expected]))
    out, into = ttnn.create_socket_pair(*meshes, joined({0: 1, 1: 0}))
    ttnn.experimental.send_async(source, out)
    ttnn.experimental.recv_async(target, into)
    assert torch.equal(read(meshes[1], target), read(meshes[0], source).flip(0))


def test_a_chip_joined_to_two_is_an_error(meshes: tuple[Any, Any]) -> None:
    out, _ = ttnn.create_socket_pair(*meshes, joined({0: 0, (0, 1): 1}))
    with pytest.raises(DeviceError, match=r"send_async: the sending chip \(0, 0\) is joined to 2 chips"):
        ttnn.experimental.send_async(sent(meshes[0], "bfloat16"), out)
    _, into = ttnn.create_socket_pair(*meshes, joined({0: 1, 1: (1, 1)}))
    with pytest.raises(DeviceError, match=r"recv_async: the receiving chip \(0, 1\) is joined to 2 chips"):
        ttnn.experimental.recv_async(empty(meshes[1], "bfloat16"), into)


def test_an_undefined_tensor_arrives_as_undefined(meshes: tuple[Any, Any]) -> None:
    out, into = pair(meshes)
    target = sent(meshes[1], "bfloat16")
    ttnn.experimental.send_async(empty(meshes[0], "bfloat16"), out)
    ttnn.experimental.recv_async(target, into)
    assert read(meshes[1], target).isnan().all()
    assert out.bytes_written == WIRE["bfloat16"]


def test_sockets_that_cannot_be_made_say_why(meshes: tuple[Any, Any]) -> None:
    core = ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, 0), ttnn.CoreCoord(0, 0))
    one = ttnn.SocketConnection(core, core)

    def make(*connections: Any, **memory: Any) -> None:
        place = ttnn.SocketMemoryConfig(
            **{"socket_storage_type": ttnn.BufferType.L1, "fifo_size": 4096, **memory}
        )
        ttnn.create_socket_pair(*meshes, ttnn.SocketConfig(list(connections), place))

    def at(column: int, x: int = 0) -> Any:
        return ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, column), ttnn.CoreCoord(x, 0))

    with pytest.raises(DeviceError, match="no connections"):
        make()
    with pytest.raises(DeviceError, match="two connections share the receiver core"):
        make(one, one)
    with pytest.raises(DeviceError, match=r"core=\(0,0\)\) is not in the mesh of 1x2 chips"):
        make(ttnn.SocketConnection(core, at(2)))
    with pytest.raises(DeviceError, match=r"core=\(9,0\)\) is outside the grid of 8x8 cores"):
        make(ttnn.SocketConnection(at(0, 9), core))
    with pytest.raises(DeviceError, match="out of L1: a MeshSocket needs 2,000,000 B"):
        make(one, fifo_size=2_000_000)
    with pytest.raises(NotEmulatedError, match="the emulator does not have ttnn's hybrid allocator"):
        make(one, per_core_allocation=True)
    with pytest.raises(NotEmulatedError, match="sender_sub_device=0; the emulator does not have sub-devices"):
        make(one, sender_sub_device=0)
    with pytest.raises(TypeError, match="give sender_rank and receiver_rank, or sender_mesh_id and receiver"):
        ttnn.SocketConfig([one], None, sender_mesh_id=0)


def test_a_socket_tells_what_it_is(meshes: tuple[Any, Any]) -> None:
    out, into = ttnn.create_socket_pair(*meshes, joined({0: 1}))
    assert out.get_mesh_device() is meshes[0]
    assert [e.get_socket_endpoint_type().name for e in (out, into)] == ["SENDER", "RECEIVER"]
    (here,), (there,) = out.get_active_cores(), into.get_active_cores()
    assert here.device_coord == ttnn.MeshCoordinate(0, 0)
    assert there.device_coord == ttnn.MeshCoordinate(0, 1)
    (connection,) = out.get_connection_config()
    assert (connection.sender_core, connection.receiver_core) == (here, there)
    with pytest.raises(NotEmulatedError, match="the emulator does not have device addresses"):
        out.get_config_buffer_address()


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


def test_a_direct_transfer_needs_a_fifo_in_l1(meshes: tuple[Any, Any]) -> None:
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.DRAM, 8192)
    out, into = ttnn.create_socket_pair(*meshes, joined({0: 0, 1: 1}, memory))
    with pytest.raises(
        DeviceError, match="send_direct_async: a FIFO in DRAM; direct transfers need one in L1"
    ):
        ttnn.experimental.send_direct_async(sent(meshes[0], "rows"), out)
    ttnn.experimental.send_async(sent(meshes[0], "rows"), out)
    ttnn.experimental.recv_async(empty(meshes[1], "rows"), into)
    ttnn.synchronize_device(meshes[1])


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


@pytest.mark.parametrize("engine", ["shared memory", "MPI"])
def test_two_ranks_move_values_exactly_and_learn_what_went_wrong(engine: str) -> None:
    code, results, printed = job(*SCENARIOS, ENGINE=engine)
    assert (code, len(results)) == (0, 2), printed
    sender, receiver = results

    for name in ("exact", "late", "mesh_ids"):
        assert len(receiver[name]["same"]) == 2 * len(KINDS)
        assert all(receiver[name]["same"].values()), receiver[name]
        assert (sender[name]["bytes"], receiver[name]["bytes"]) == (2 * sum(WIRE.values()), 0)

    both = re.compile(r"socket transfer mismatch: .* sends .*bfloat8_b.* receives .*bfloat16")
    for rank in results:
        assert both.search(rank["mismatch"]["error"]), rank["mismatch"]["error"]
        assert rank["mismatch"]["seconds"] < 25, "a rank learnt of the mismatch only from its own timeout"
        assert rank["exact"]["engine"] == {"shared memory": "RingChannel", "MPI": "MpiChannel"}[engine]
        assert "timed out trying to establish a socket connection" in rank["late"]["error"]
        assert "socket ends differ" in rank["different_ends"]["error"]
        assert "FIFO of 4096 B" in rank["different_ends"]["error"]
        assert "FIFO of 8192 B" in rank["different_ends"]["error"]
        assert (
            "mesh id 9 belongs to 0 ranks; the ranks' mesh ids (TT_MESH_ID) are [7, 8]"
            in rank["mesh_ids"]["error"]
        )
        assert (rank["context"]["all"], rank["context"]["size"]) == ([10, 11], 2)
        assert rank["ring"]["sums"] == [3.0]
    assert receiver["context"]["got"] == "prefill\0"
    assert "sent 3; both ranks must name the same number" in receiver["context"]["short"]
    assert "rank 5; allowed are the other ranks of 0..1" in sender["context"]["nobody"]
    assert "tag -1; allowed" in sender["context"]["tag"]


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_ring_of_ranks_passes_its_tensors_round(ranks: int) -> None:
    code, results, printed = job("ring", ranks=ranks)
    assert (code, len(results)) == (0, ranks), printed
    assert [r["ring"]["sums"] for r in results] == [[sum(range(1, ranks + 1))]] * ranks


@pytest.mark.parametrize(("ranks", "seed"), [(2, 1), (2, 2), (3, 3)])
def test_programs_that_cannot_deadlock_are_never_said_to(ranks: int, seed: int) -> None:
    code, results, printed = job("stress", ranks=ranks, SEED=str(seed), STEPS="150")
    assert (code, len(results)) == (0, ranks), f"seed {seed}: {printed}"
    assert [r["stress"]["wrong"] for r in results] == [0] * ranks, f"seed {seed}"
    assert sum(r["stress"]["moved"] for r in results) > 10


def test_a_host_that_is_slow_to_post_its_second_receive_is_no_deadlock(
    meshes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE, "60")
    send, receive = ops("direct")
    out, into = pair(meshes)
    tensor, target = sent(meshes[0], "bfloat16"), empty(meshes[1], "bfloat16")
    for _ in range(2):  # the second is packed while the first has not been received
        send(tensor, out)
    receive(target, into)
    ttnn.synchronize_device(meshes[1])
    end, polls = time.monotonic() + 60, 0
    while polls < 8 and time.monotonic() < end and not out._channel._get(_FAILED):
        polls = max((record[1] for record in waits.board.waiting().values()), default=0)
    receive(target, into)
    for mesh in meshes:
        ttnn.synchronize_device(mesh)
    assert polls >= 8  # while the second send waited
    assert torch.equal(read(meshes[1], target), read(meshes[0], tensor))


def test_a_rank_that_dies_ends_the_job() -> None:
    code, results, printed = job("early_exit")
    assert code != 0, printed
    assert results == []
