"""The call log: what each call was given and gave, once, and nothing replaced afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import height_sharded, put

from disagg_tt.device import calls
from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_the_op_its_inputs_arguments_and_outputs(mesh: Any, tmp_path: Path) -> None:
    x = put(mesh, torch.ones(1, 3, 20, 64))
    place = height_sharded(mesh, 3, 32, 64)
    with calls.log_calls(ttnn, tmp_path / "log"):
        ttnn.add(x, x, memory_config=ttnn.L1_MEMORY_CONFIG)
        ttnn.interleaved_to_sharded(x, place)
        ttnn.mul(x, x, input_tensor_a_activations=[ttnn.UnaryOpType.SILU])
    spec = "[1, 3, 20, 64] padded to [1, 3, 32, 64] BFLOAT16 TILE"
    shard = "L1 HEIGHT_SHARDED shard [32, 64] ROW_MAJOR on 3 cores 0-0..2-0"
    add, move, mul = lines(tmp_path / "log")
    assert add == {
        "op": "add",
        "inputs": [f"{spec} DRAM INTERLEAVED"] * 2,
        "arguments": {"memory_config": "L1 INTERLEAVED"},
        "outputs": [f"{spec} L1 INTERLEAVED"],
    }
    assert (move["arguments"], move["outputs"]) == ({"1": shard}, [f"{spec} {shard}"])
    assert mul["arguments"] == {"input_tensor_a_activations": ["SILU"]}


def test_ops_are_their_own_again_after_the_block_whatever_happens(mesh: Any, tmp_path: Path) -> None:
    x, y, add = put(mesh, torch.ones(32, 32)), put(mesh, torch.ones(64, 32)), ttnn.add
    with pytest.raises(DeviceError), calls.log_calls(ttnn, tmp_path / "log"):
        _ = ttnn.add(x, x), ttnn.add(x, y)
    assert ttnn.add is add
    ttnn.add(x, x)
    assert [line["op"] for line in lines(tmp_path / "log")] == ["add"], "a rejected call was logged"


@pytest.mark.parametrize(("rank", "name"), [(None, "log"), ("1", "log.rank1")])
def test_the_environment_turns_it_on_for_a_process(
    mesh: Any, tmp_path: Path, rank: str | None, name: str
) -> None:
    environ = {
        "DISAGG_TT_LOG_CALLS": str(tmp_path / "log"),
        **({"OMPI_COMM_WORLD_RANK": rank} if rank else {}),
    }
    add = ttnn.add
    calls.log_process(ttnn, {})
    assert ttnn.add is add, "calls are logged though nobody asked"
    calls.log_process(ttnn, environ)
    with calls.process_log:
        put(mesh, torch.ones(32, 32))
    assert ttnn.add is add
    assert [line["op"] for line in lines(tmp_path / name)] == ["from_torch"]


def test_the_log_module_loads_nothing_heavy() -> None:
    program = "import sys, disagg_tt.device; sys.exit('torch' in sys.modules or 'ttnn' in sys.modules)"
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
