"""The emulator makes the same calls, with the same specs in and out, as the real runtime: its log is the real one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from logged_program import CASES, MODELS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("logged_program.py")
pytestmark = pytest.mark.xdist_group(
    "call_log"
)  # one worker runs the two programs, all cases read their logs


def _run(folder: Path, environment: dict[str, str]) -> Path:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("calls") / "emulator", {"DISAGG_TT_DEVICE": "emulator"})


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, mock_environment: dict[str, str]) -> Path:
    return _run(tmp_path_factory.mktemp("calls") / "real", {"DISAGG_TT_DEVICE": "ttnn", **mock_environment})


def first_difference(emulated: list[str], real: list[str]) -> str:
    """Return "" for equal logs, else the first line that differs, part by part, and the call before it."""
    for number, (ours, theirs) in enumerate(zip(emulated, real, strict=False), start=1):
        if ours != theirs:
            before = json.loads(real[number - 2])["op"] if number > 1 else "nothing"
            ours_parts, theirs_parts = json.loads(ours), json.loads(theirs)
            parts = [
                f"  {part}:\n    emulator {ours_parts[part]}\n    real     {theirs_parts[part]}"
                for part in theirs_parts
                if ours_parts[part] != theirs_parts[part]
            ]
            return f"line {number}, after {before}, {theirs_parts['op']}:\n" + "\n".join(parts)
    if len(emulated) != len(real):
        longer = max(emulated, real, key=len)
        more = "the emulator's" if longer is emulated else "the real"
        rest = longer[min(len(emulated), len(real))]
        return f"{len(emulated)} calls on the emulator, {len(real)} real; {more} log goes on with {rest}"
    return ""


@pytest.mark.parametrize("case", CASES)
def test_emulator_logs_the_calls_and_specs_of_the_real_runtime(case: str, emulated: Path, real: Path) -> None:
    logs = [(folder / f"{case}.jsonl").read_text().splitlines() for folder in (emulated, real)]
    layers = MODELS[case.split("-")[0]].num_hidden_layers
    assert len(logs[1]) > 12 * layers, "the log is too short to be a whole step"
    difference = first_difference(*logs)
    assert not difference, f"{case}: {difference}"


def test_first_difference_names_the_part_that_differs() -> None:
    line = {"op": "add", "inputs": ["[1]"], "arguments": {}, "outputs": ["[1] DRAM"]}
    other = {**line, "outputs": ["[1] L1"]}
    same, changed = json.dumps(line), json.dumps(other)
    assert first_difference([same], [same]) == ""
    assert "line 2, after add, add" in first_difference([same, same], [same, changed])
    assert "outputs" in first_difference([same], [changed])
    assert "inputs" not in first_difference([same], [changed])
    assert "1 calls on the emulator, 2 real" in first_difference([same], [same, changed])
