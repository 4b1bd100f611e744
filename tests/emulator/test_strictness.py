"""What the real runtime rejects, the emulator rejects too, and says what was given, what is allowed and what to do.

The calls are in edge_calls.py. The real runtime on a mock cluster is asked the same questions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edge_calls import calls, outcome
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError

PROGRAM = Path(__file__).with_name("edge_calls.py")


@pytest.fixture
def small_grid(open_mesh: OpenMesh) -> Any:
    """A mesh with the cores that a mock cluster has."""
    return open_mesh(1, 2, dispatch_core_config=ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER))


def test_rejected_calls_say_what_was_given_and_what_is_allowed(small_grid: Any) -> None:
    rejected, stricter, _ = calls(ttnn, small_grid)
    wrong = {}
    for name, (call, message) in {**rejected, **stricter}.items():
        answer = outcome(call)
        if answer[0] != "rejected" or message not in answer[1]:
            wrong[name] = {"expected": message, "got": answer}
    assert not wrong, json.dumps(wrong, indent=1)
    assert len(rejected) > 100


def test_rejected_calls_raise_device_errors(small_grid: Any) -> None:
    rejected, stricter, _ = calls(ttnn, small_grid)
    for name, (call, _) in {**rejected, **stricter}.items():
        expected = TypeError if name == "mul unknown kw" else DeviceError
        with pytest.raises(expected):
            call()


def test_a_rejected_call_takes_no_memory_and_leaves_the_mesh_usable(small_grid: Any) -> None:
    rejected, stricter, accepted = calls(ttnn, small_grid)
    for call, _ in [*rejected.values(), *stricter.values()]:
        outcome(call)
    assert set(small_grid.memory.used.values()) == {0}
    assert outcome(accepted["add L1 dram"])[0] == "ok"


@pytest.mark.mock
def test_the_real_runtime_gives_the_same_answers(small_grid: Any, mock_environment: dict[str, str]) -> None:
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
    rejected, stricter, accepted = calls(ttnn, small_grid)
    assert not [name for name in rejected if real[name][0] != "rejected"], "the real runtime takes these"
    assert not [name for name in stricter if real[name][0] != "ok"], (
        "these belong to the calls that both reject"
    )
    differ = {n: {"real": real[n], "emulator": list(outcome(call))} for n, call in accepted.items()}
    differ = {n: pair for n, pair in differ.items() if pair["real"] != pair["emulator"]}
    assert not differ, json.dumps(differ, indent=1)


def test_names_that_the_emulator_lacks_are_named_with_those_that_it_has() -> None:
    with pytest.raises(AttributeError, match=r"no ttnn\.softmax; it has .*add, all_gather"):
        ttnn.softmax  # noqa: B018
    with pytest.raises(AttributeError, match="fused_everything"):
        ttnn.experimental.fused_everything  # noqa: B018


def test_every_function_on_tensors_is_in_the_call_log() -> None:
    """A new op is logged, or it is one of those that take no tensor."""
    from types import FunctionType

    from disagg_tt.device.calls import OPS

    without_tensors = {
        "begin_trace_capture close_mesh_device command_queue create_sharded_memory_config create_socket_pair",
        "end_trace_capture event_synchronize execute_trace init_distributed_context num_cores_to_corerangeset",
        "open_mesh_device record_event release_trace set_fabric_config synchronize_device wait_for_event",
    }
    names = {word for line in without_tensors for word in line.split()}
    functions = {
        (space, name)
        for space, holder in (
            ("", ttnn),
            ("experimental", ttnn.experimental),
            ("transformer", ttnn.transformer),
        )
        for name, value in vars(holder).items()
        if isinstance(getattr(value, "__wrapped__", value), FunctionType)
        and not name.startswith(("_", "distributed_context"))
    }
    logged = {(space, name) for space, ops in OPS.items() for name in ops}
    assert logged == {f for f in functions if f[1] not in names}


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
