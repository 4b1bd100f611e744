"""What the real runtime rejects, the emulator rejects too, and says what was given, what is allowed and what to do.

The calls are in edge_calls.py; the real runtime on a mock cluster is asked which of them it rejects.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edge_calls import calls, outcome
from jobs import job
from socket_ranks import config, empty, read, sent
from tensors import OpenMesh, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.calls import OPS
from disagg_tt.errors import DeviceError

PROGRAM = Path(__file__).with_name("edge_calls.py")


@pytest.fixture
def small_grid(open_mesh: OpenMesh) -> Any:
    """A mesh with the cores that a mock cluster has."""
    return open_mesh(1, 2, dispatch_core_config=ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER))


def test_rejected_calls_say_what_was_given_and_what_is_allowed(small_grid: Any) -> None:
    rejected, stricter = calls(ttnn, small_grid)
    wrong = {}
    for name, (call, message) in {**rejected, **stricter}.items():
        answer = outcome(call)
        if answer is None or message not in answer:
            wrong[name] = {"expected": message, "got": answer}
    assert not wrong, json.dumps(wrong, indent=1)
    assert len(rejected) > 100


def test_rejected_calls_raise_device_errors(small_grid: Any) -> None:
    rejected, stricter = calls(ttnn, small_grid)
    for name, (call, _) in {**rejected, **stricter}.items():
        expected = TypeError if name == "mul unknown kw" else DeviceError
        with pytest.raises(expected):
            call()


def test_a_rejected_call_takes_no_memory_and_leaves_the_mesh_usable(small_grid: Any) -> None:
    rejected, stricter = calls(ttnn, small_grid)
    for call, _ in [*rejected.values(), *stricter.values()]:
        outcome(call)
    assert set(small_grid.memory.used.values()) == {0}
    x = ttnn.ones([1, 1, 32, 32], layout=ttnn.TILE_LAYOUT, device=small_grid)
    assert same_on_all(ttnn.add(x, x)).unique().tolist() == [2]


@pytest.mark.mock
def test_the_real_runtime_rejects_what_is_said_to_be_rejected(
    small_grid: Any, mock_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={
            **os.environ,
            "PYTHONPATH": str(PROGRAM.parents[2]),
            "DISAGG_TT_DEVICE": "ttnn",
            **mock_environment,
        },
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    real = json.loads(done.stdout.split("RESULT", 1)[1])
    rejected, stricter = calls(ttnn, small_grid)
    assert not [name for name in rejected if real[name] is None], "the real runtime takes these"
    wrong = {name: real[name] for name in stricter if real[name] is not None}
    assert not wrong, "these belong to the calls that both reject"


def test_names_that_the_emulator_lacks_are_named_with_those_that_it_has() -> None:
    with pytest.raises(
        AttributeError, match=r"does not have ttnn\.fused_everything; it has .*add, .*all_gather"
    ):
        ttnn.fused_everything  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"ttnn\.experimental\.fused_everything; it has .*nlp_concat_heads"
    ):
        ttnn.experimental.fused_everything  # noqa: B018


def test_every_function_on_tensors_is_in_the_call_log() -> None:
    """By its annotations; the log may name others too, such as from_torch, but none that is not there."""
    spaces = {
        "": ttnn,
        "experimental": ttnn.experimental,
        "transformer": ttnn.transformer,
        "kv_cache": ttnn.kv_cache,
    }
    functions = {
        (space, name): inspect.unwrap(value)
        for space, holder in spaces.items()
        for name, value in vars(holder).items()
        if not name.startswith("_") and inspect.isfunction(inspect.unwrap(value))
    }
    on_tensors = {
        name
        for name, function in functions.items()
        if any(re.search(r"\bTensor\b", str(hint)) for hint in function.__annotations__.values())
    }
    logged = {(space, name) for space, ops in OPS.items() for name in ops}
    assert len(on_tensors) > 100
    assert on_tensors <= logged <= set(functions)


def test_a_fabric_must_be_chosen_before_a_mesh_is_opened(mesh: Any) -> None:
    with pytest.raises(DeviceError, match=r"set_fabric_config\(DISABLED\) after a mesh was opened"):
        ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


def test_meshes_end_at_the_chips_that_are_there(open_mesh: OpenMesh) -> None:
    open_mesh(2, 2)
    with pytest.raises(DeviceError, match=r"open_mesh_device\(\(1, 5\)\): 5 chips asked, 4 of 8 are free"):
        open_mesh(1, 5)
    parent = open_mesh(2, 2)
    with pytest.raises(DeviceError, match=r"1x2 at \(0, 1\) leaves the mesh of 2x2"):
        parent.create_submesh(ttnn.MeshShape(1, 2), ttnn.MeshCoordinate(0, 1))
    with pytest.raises(DeviceError, match="holds another number of chips than 4"):
        parent.reshape(ttnn.MeshShape(1, 3))


def test_a_closed_mesh_rejects_work(mesh: Any) -> None:
    x = ttnn.zeros([1, 1, 32, 32], layout=ttnn.TILE_LAYOUT, device=mesh)
    ttnn.close_mesh_device(mesh)
    with pytest.raises(DeviceError, match=r"the mesh of chips \[0, 1\] is closed"):
        ttnn.add(x, x)


# ---------------------------------------------------------------- what hangs or corrupts on hardware


@pytest.mark.parametrize(
    ("scenario", "waits"),
    [
        ("unreceived", "rank 0 waits for send_async number 2 of .*: a matching receive on rank 1.*rank 1 waits for the barrier"),
        ("unsent", "rank 0 waits for rank 0: 8 bytes from rank 1.*rank 1 waits for recv_async number 1 .*: a matching send on rank 0"),
        ("both_receive_first", "rank 0 waits for recv_async number 1 .*rank 1 waits for recv_async number 1 "),
        ("both_make_their_sending_end_first", "rank 0 waits for rank 1 making its end.*rank 1 waits for rank 0 making its end"),
    ],
)  # fmt: skip
def test_ranks_that_wait_for_each_other_are_told_at_once(scenario: str, waits: str) -> None:
    _, results, printed = job(scenario)
    assert len(results) == 2, printed
    for rank in results:
        found = rank[scenario]
        assert re.search(f"deadlock, on hardware this hangs: .*{waits}.*(Post|Make)", found["error"]), found[
            "error"
        ]
        assert found["seconds"] < 10, "found by a time limit"


@pytest.mark.parametrize("wait", ["send", "barrier"])
@pytest.mark.parametrize(
    ("how", "says"), [("exit", "it exited"), ("raise", "ValueError: no weights"), ("kill", "was killed")]
)
def test_a_rank_that_ends_early_ends_the_waits_for_it(how: str, says: str, wait: str) -> None:
    _, results, printed = job("exits", HOW=how, WAIT=wait)
    assert len(results) == 1, printed
    waited = {"send": "a matching receive on rank 1", "barrier": "the barrier with the other ranks"}[wait]
    pattern = f"{waited}: rank 1 has ended .*{says}.*on hardware this hangs"
    assert re.search(pattern, results[0]["exits"]["error"]), results[0]["exits"]["error"]


def test_waiting_in_one_process_for_what_is_posted_later_is_a_deadlock() -> None:
    # In a process of its own: an idle thread that another test left behind might be about to post.
    _, results, printed = job("within_process", ranks=1)
    assert len(results) == 1, printed
    found = results[0]["within_process"]
    assert re.search("deadlock, on hardware this hangs: .*a matching send on the other mesh", found["error"])
    assert found["seconds"] < 10, "found by a time limit"


def test_reading_what_a_receive_on_another_queue_writes_needs_an_event(open_mesh: OpenMesh) -> None:
    ours, theirs = open_mesh(1, 2), open_mesh(1, 2, num_command_queues=2)
    out, into = ttnn.create_socket_pair(ours, theirs, config())
    target = empty(theirs, "rows")
    ttnn.wait_for_event(1, ttnn.record_event(theirs, 0))
    with ttnn.command_queue(1):
        ttnn.experimental.recv_async(target, into)
    with pytest.raises(
        DeviceError, match="queue 0 uses a tensor that .*queue 1 writes, without waiting for it"
    ):
        read(theirs, target)
    ttnn.experimental.send_async(sent(ours, "rows"), out)
    ttnn.wait_for_event(0, ttnn.record_event(theirs, 1))
    read(theirs, target)


def test_freeing_what_a_receive_on_another_queue_writes_is_an_error(open_mesh: OpenMesh) -> None:
    ours, theirs = open_mesh(1, 2), open_mesh(1, 2, num_command_queues=2)
    _, into = ttnn.create_socket_pair(ours, theirs, config())
    target = empty(theirs, "rows")
    ttnn.wait_for_event(1, ttnn.record_event(theirs, 0))
    with ttnn.command_queue(1):
        ttnn.experimental.recv_async(target, into)
    with pytest.raises(DeviceError, match="freed while work on .*queue 1 may still be reading it"):
        ttnn.deallocate(target)


def test_closing_a_mesh_with_something_unreceived_is_an_error(open_mesh: OpenMesh) -> None:
    ours, theirs = open_mesh(1, 2), open_mesh(1, 2)
    out, into = ttnn.create_socket_pair(ours, theirs, config())
    for _ in range(2):
        ttnn.experimental.send_async(sent(ours, "rows"), out)
    ttnn.experimental.recv_async(empty(theirs, "rows"), into)
    ttnn.synchronize_device(ours)
    ttnn.synchronize_device(theirs)
    with pytest.raises(
        DeviceError, match="closed with transfer number 2 from the other mesh .* not received"
    ):
        ttnn.close_mesh_device(theirs)


@pytest.mark.parametrize("kind", ["DRAM", "L1"])
def test_memory_ends_where_the_chips_does(small_grid: Any, kind: str) -> None:
    """12 DRAM banks of 1,072,693,184 B; 56 cores with 1,393,312 B of L1."""
    banks, each = {"DRAM": (12, 1_072_693_184), "L1": (56, 1_393_312)}[kind]
    place = ttnn.DRAM_MEMORY_CONFIG if kind == "DRAM" else ttnn.L1_MEMORY_CONFIG
    tiles = each // 2048 * banks

    def allocate(count: int) -> Any:
        shape = ttnn.Shape([1, 1, 32 * count, 32])
        return ttnn.allocate_tensor_on_device(shape, ttnn.bfloat16, ttnn.TILE_LAYOUT, small_grid, place)

    whole = allocate(tiles)
    with pytest.raises(DeviceError, match=f"out of {kind}: .* needs 2,048 B of each"):
        allocate(1)
    ttnn.deallocate(whole)
    with pytest.raises(DeviceError, match=f"out of {kind}: .* of {each:,} B are free"):
        allocate(tiles + 1)
