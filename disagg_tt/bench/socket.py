"""A MeshSocket between two ranks of the emulator against a plain copy of as many bytes, both in the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from disagg_tt.bench.table import Row
from disagg_tt.errors import PeerError
from disagg_tt.mpirun import job_folder, mpi_environment, mpirun_command

GOAL = ">= 0.9"
LIMIT_S = 300.0


def socket(repeats: int) -> list[Row]:
    """Measure; ranks compute with one thread each. Rates are of packed bytes, medians of `repeats`."""
    program = [sys.executable, "-m", "disagg_tt.bench.socket_ranks", str(repeats)]
    with job_folder() as folder:
        environment = {**mpi_environment(folder), "DISAGG_TT_DEVICE": "emulator"}
        done = subprocess.run(
            mpirun_command(program, [{}, {}]),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    results = [line.split("RESULT", 1)[1] for line in done.stdout.splitlines() if "RESULT" in line]
    if done.returncode or not results:
        raise PeerError(f"the two ranks of the benchmark ended with {done.returncode}; their output is above")
    found = json.loads(results[0])
    rows = []
    for name, size in found["bytes"].items():
        ours, copy = (size / statistics.median(found[what][name]) / 1e9 for what in ("seconds", "copy"))
        goal = GOAL if name == "bfloat16" else ""
        rows.append(
            Row("socket", f"{size / 1e6:.0f} MB of {name}, reference a copy", ours, copy, "GB/s", goal)
        )
    rows.append(Row("socket", "one tile a chip, one way", statistics.median(found["tile"]) * 1e6, 0, "us"))
    return rows
