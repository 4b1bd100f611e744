"""Running socket_ranks.py as ranks of a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from socket_ranks import PATIENCE

from disagg_tt.mpirun import job_folder, mpi_environment, mpirun_command

PROGRAM = Path(__file__).with_name("socket_ranks.py")


def job(*names: str, ranks: int = 2, **environ: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the scenarios as a job; return its exit code, each rank's results, and what was printed."""
    program = [sys.executable, str(PROGRAM), *names]
    with job_folder() as folder:
        environment = {
            **mpi_environment(folder),
            "PYTHONPATH": str(PROGRAM.parents[2]),
            PATIENCE: "30",
            **environ,
        }
        done = subprocess.run(
            mpirun_command(program, [{}] * ranks),
            env=environment,
            capture_output=True,
            text=True,
            timeout=150,
        )
    lines = [line.split("RESULT", 1)[1] for line in done.stdout.splitlines() if "RESULT" in line]
    return done.returncode, sorted(map(json.loads, lines), key=lambda r: r["rank"]), done.stdout + done.stderr
