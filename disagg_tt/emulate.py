"""`disagg-tt emulate`: an unmodified ttnn script on the emulator, as one process or as the ranks of a rank binding.

    disagg-tt emulate SCRIPT.py                                     one process: this one
    disagg-tt emulate --rank-binding FILE SCRIPT.py                 a process for each rank, started by mpirun
    tt-run --rank-binding FILE disagg-tt emulate SCRIPT.py          the same, started by tt-run
    mpirun -n 2 disagg-tt emulate SCRIPT.py                         ranks without a rank binding

The script runs as `python SCRIPT.py` (or `python -m MODULE`) would run it, except that its `import ttnn` finds the emulator.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO, TYPE_CHECKING

from disagg_tt.errors import InputError, RankBindingError
from disagg_tt.job_output import JobOutput
from disagg_tt.mpirun import in_job, job_folder, mpi_environment, mpirun_command
from disagg_tt.processes import TERMINATE_SECONDS, end_session, signals_raise, start, tied

if TYPE_CHECKING:
    from disagg_tt.rank_binding import RankBinding


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command; everything from the script's name, or -m, on is the script's."""
    top = argparse.ArgumentParser(
        prog="disagg-tt emulate",
        usage="disagg-tt emulate [-h] [--rank-binding FILE] (SCRIPT.py | -m MODULE) [ARGUMENTS ...]",
        description="Run an unmodified ttnn script on the emulator.",
        epilog="Inside an MPI job (started by tt-run or mpirun) this process is that job's rank.",
    )
    top.add_argument(
        "--rank-binding", metavar="FILE", help="start a process for each rank of tt-run's YAML file"
    )
    top.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module instead of a script")
    top.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")
    return top


def main(argv: Sequence[str]) -> int:
    """Run what `argv` names and return its exit code. Raises InputError for what is no script, binding or job."""
    os.environ["DISAGG_TT_DEVICE"] = "emulator"
    arguments = parser().parse_args(argv)
    program = ["-m", *arguments.module] if arguments.module else arguments.script
    if not program:
        parser().error("name a script, or a module with -m")
    try:
        code = None if arguments.module else compiled(program[0])
    except SyntaxError as error:  # said once, before any rank starts
        return _raised(error)
    if arguments.rank_binding is not None:
        return run_ranks(program, arguments.rank_binding)
    return run_here(program, code)


def compiled(script: str) -> CodeType:
    """Return the code of the script file; raises InputError when it cannot be read, SyntaxError as python does."""
    path = Path(script)
    if not path.is_file():
        seen = "there is no such file" if not path.exists() else "it is not a file"
        raise InputError(f"script {script}: {seen}. Give the path of a Python script, or a module with -m.")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"script {script}: {error.strerror}. Give a file that can be read.") from error
    return compile(source, script, "exec", dont_inherit=True)


# ---------------------------------------------------------------- this process as one rank


def run_here(program: Sequence[str], code: CodeType | None) -> int:
    """Run a script (its compiled `code`), or "-m" and a module, in this process and return its exit code."""
    _check_host_rank(os.environ)
    ended = [0]
    if in_job():
        from mpi4py import MPI  # noqa: F401  MPI_Init waits for all ranks, so also for one whose script uses no device

        # The first to be registered is the last to run. MPI's own exit would wait for the other ranks, which may be
        # waiting for this one; without it mpirun sees the failure and ends them.
        atexit.register(_leave_if_failed, ended)

    from disagg_tt import device
    from disagg_tt.device.emulator.namespace import stand_in_for_ttnn

    stand_in_for_ttnn(device.ttnn)
    ended[0] = _run(list(program), code)
    return ended[0]


def _check_host_rank(environ: Mapping[str, str]) -> None:
    if environ.get("TT_MESH_HOST_RANK", "0") not in ("", "0"):
        raise RankBindingError(
            f"TT_MESH_HOST_RANK is {environ['TT_MESH_HOST_RANK']}: the emulator does not run a mesh that several ranks share; "
            "allowed: 0, one rank a mesh. Give each rank a mesh_id of its own."
        )


def _run(program: list[str], code: CodeType | None) -> int:
    try:
        if code is None:
            sys.argv = program[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            script = ModuleType("__main__")
            script.__file__ = program[0]
            vars(script)["__builtins__"] = builtins
            sys.modules["__main__"] = script
            sys.argv = program
            sys.path[0] = str(Path(program[0]).resolve().parent)
            exec(code, vars(script))
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException as error:
        return _raised(error)
    return 0


def _raised(error: BaseException) -> int:
    """Show what the script raised, without the frames of this file, and return the exit code."""
    below = error.__traceback__
    while below is not None and below.tb_frame.f_code.co_filename == __file__:
        below = below.tb_next
    sys.last_value = (
        error  # as at the interpreter's own top level; the other ranks are told (waits.end_of_process)
    )
    sys.excepthook(type(error), error.with_traceback(below), below)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _leave_if_failed(ended: list[int]) -> None:
    if ended[0]:
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ended[0] & 0xFF)


# ---------------------------------------------------------------- a process for each rank


def run_ranks(program: Sequence[str], rank_binding: str) -> int:
    """Run `program` as the ranks of the binding and return the exit code of the first that failed, else 0.

    Their output and errors go where this process's go. When one fails, or this process is ended, all are ended.
    """
    from disagg_tt.rank_binding import RankBinding
    from disagg_tt.report import configure_logging

    configure_logging("launcher")
    if in_job():
        raise InputError(
            f"--rank-binding {rank_binding} inside an MPI job, whose ranks run already; leave it out"
        )
    binding = RankBinding.load(rank_binding)
    _check_meshes(binding)
    rank_command = tied([sys.executable, "-m", "disagg_tt", "emulate", *program], signal.SIGKILL)
    with job_folder() as folder:
        command = mpirun_command(rank_command, [_surroundings() | rank.env for rank in binding.ranks])
        threads = max(1, (os.cpu_count() or 1) // len(binding.ranks))
        environment = {"OMP_NUM_THREADS": str(threads)} | mpi_environment(folder)
        with signals_raise():
            process, errors = start(tied(command, signal.SIGTERM), environment, keep_stdout=True)
            output = JobOutput(sys.stderr)
            with errors:
                try:
                    _forward(process, errors, output)
                finally:
                    end_session(process)
    output.close()
    if process.returncode == 0:
        return 0
    _, _, noticed = output.first_failure()
    who = "rank 0" if len(binding.ranks) == 1 else "mpirun"  # which says nothing of a rank that was alone
    print(f"disagg-tt: {noticed or f'{who} ended with exit code {process.returncode}'}", file=sys.stderr)
    return process.returncode if 0 < process.returncode < 256 else 1


def _check_meshes(binding: RankBinding) -> None:
    owner: dict[int, int] = {}
    for rank in binding.ranks:
        _check_host_rank(rank.env)
        if owner.setdefault(rank.mesh_id, rank.rank) != rank.rank:
            raise RankBindingError(
                f"rank binding {binding.path}: ranks {owner[rank.mesh_id]} and {rank.rank} share mesh {rank.mesh_id}: the "
                "emulator does not run a mesh that several ranks share; allowed: one rank a mesh. Give each rank a mesh_id "
                "of its own."
            )


def _surroundings() -> dict[str, str]:
    """What tt-run sets for every rank apart from its mesh; the user's own settings win."""
    here = os.getcwd()
    home = os.environ.get("TT_METAL_HOME", here)
    defaults = {"TT_METAL_HOME": home, "TT_METAL_RUNTIME_ROOT": home, "PYTHONPATH": here}
    return {name: os.environ.get(name, value) for name, value in defaults.items()} | {
        "TT_RUN_ORIGINAL_CWD": here
    }


def _forward(process: subprocess.Popen[bytes], errors: IO[bytes], output: JobOutput) -> None:
    """Forward the ranks' errors until mpirun has ended."""
    while select.select([errors], [], [], 0.1)[0] or process.poll() is None:
        if select.select([errors], [], [], 0)[0]:
            data = os.read(errors.fileno(), 1 << 16)
            if not data:  # mpirun is about to exit
                with suppress(subprocess.TimeoutExpired):  # end_session ends it
                    process.wait(TERMINATE_SECONDS)
                return
            output.feed(data)
