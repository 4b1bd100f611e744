"""A rank binding becomes a running job: one process a rank, their events and their end.

    run_job --> mpirun (emulator) or tt-run (ttnn, mock) --> python -m disagg_tt ... as rank 0, rank 1, ...
       ^                                                              |
       +---------- events, one JSON object each, zmq on loopback -----+

run_job returns only when every process that it started has ended, whatever happened.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
import zmq
from loguru import logger

from disagg_tt.device import mock
from disagg_tt.errors import DisaggError, RankBindingError
from disagg_tt.job_output import JobOutput
from disagg_tt.mpirun import (
    MPI_SETTINGS,
    in_job,
    job_folder,
    job_rank,
    job_size,
    mpi_environment,
    mpirun_command,
    tool,
)
from disagg_tt.processes import TERMINATE_SECONDS, end_session, signals_raise, start, tied
from disagg_tt.rank_binding import Rank, RankBinding, default_binding
from disagg_tt.report import ADDRESS_VARIABLE, MAX_EVENT_BYTES, Event, decode_event

__all__ = [
    "MPI_SETTINGS",
    "Rank",
    "RankBinding",
    "check_launch",
    "default_binding",
    "in_job",
    "job_rank",
    "job_size",
    "run_job",
]

TOGETHER_SECONDS = (
    60.0  # between the first rank's start and the last one's; a rank that waits in MPI_Init cannot give up
)

LAUNCHER_FAILED = 213  # PRTE_ERR_SILENT: mpirun could not start itself, and has said why

_POLL_MS = 100
_FAILED_SECONDS = 10.0  # from the first report of a failure to the end of the job
_DRAIN_SECONDS = 1.0  # for events still on their way when the last process has ended


def check_launch(
    binding: RankBinding, environ: Mapping[str, str] = os.environ, argv: Sequence[str] = ()
) -> None:
    """Check that this process was started as one of the binding's ranks; `argv` is the program to show.

    Raises RankBindingError, with the command to use, when MPI started no job or one of another size.
    """
    wanted = len(binding.ranks)
    if in_job(environ) and job_size(environ) == wanted:
        return
    seen = f"{job_size(environ)} ranks" if in_job(environ) else "one process without MPI"
    program = shlex.join(["python", *(argv or sys.argv)])
    raise RankBindingError(
        f"this program was started as {seen}; rank binding {binding.path} needs {wanted} ranks. Start it with\n"
        f"  tt-run --rank-binding {shlex.quote(str(binding.path))} {program}\n"
        f"or, on the emulator without ttnn,\n  DISAGG_TT_DEVICE=emulator mpirun --oversubscribe -n {wanted} {program}"
    )


def run_job(
    argv: Sequence[str],
    binding: RankBinding,
    device: str,
    env: Mapping[str, str] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    *,
    deadline: float | None = None,
    start_deadline: float = 120.0,
    program: Sequence[str] = (sys.executable, "-m", "disagg_tt"),
) -> int:
    """Run `program` (its first word an absolute path) + `argv` as the binding's ranks and return the job's exit code.

    Args:
        device: "emulator" (started by mpirun), "ttnn" or "mock" (started by tt-run).
        env: variables for all ranks, over this process's environment and under the binding's.
        on_event: called with each event of the ranks, in this thread; a failure that no rank could report itself
            arrives as {"event": "failed", "rank", "exit_code", "reason"} too.
        deadline: seconds for the whole job, None for no limit (ranks find a hang by their heartbeats).
        start_deadline: seconds in which the job must say anything at all, an event or output.

    The exit code is that of the first rank which failed, 1 for one killed by a signal. Ranks' output goes to stderr.
    On an exception (Ctrl-C, SIGTERM, one from on_event) all processes are ended and it is raised on. Raises
    RankBindingError when the binding's roles or meshes do not fit, PeerError when the launcher program is missing.
    """
    binding.check()
    with job_folder() as folder, _event_socket() as (socket, address):
        # should this process be killed, the kernel ends mpirun (tt-run ends its mpirun on SIGINT only), and its death
        # ends the ranks
        ranks_command = tied([*program, *argv], signal.SIGKILL)
        on_death = signal.SIGTERM if device == "emulator" else signal.SIGINT
        command = tied(_command(ranks_command, binding, device, Path(folder)), on_death)
        job_env = _environment(device, folder, env or {}) | {ADDRESS_VARIABLE: address}
        logger.debug(f"starting {shlex.join(command)}")
        began = time.monotonic()
        with signals_raise():
            job = _followed(command, job_env, socket, on_event, len(binding.ranks), deadline, start_deadline)
            if job.launcher_failed:
                logger.warning(
                    f"the launcher failed before any rank; once more. It said: {job.output.last_words()}"
                )
                left = deadline and max(deadline - (time.monotonic() - began), 0.0)
                job = _followed(command, job_env, socket, on_event, len(binding.ranks), left, start_deadline)
        return job.exit_code()


def _followed(
    command: list[str],
    env: Mapping[str, str],
    socket: zmq.Socket[bytes],
    on_event: Callable[[Event], None],
    ranks: int,
    deadline: float | None,
    start_deadline: float,
) -> _Job:
    """Start a launcher, follow its job, and return that when the last of its processes has ended."""
    process, pipe = start(command, env)
    with pipe:
        job = _Job(process, pipe.fileno(), socket, on_event, ranks)
        try:
            job.follow(deadline, start_deadline)
        finally:
            end_session(process)
        job.drain()
    return job


class _Job:
    """The running job as its events, its output and its exit status tell it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        pipe: int,
        socket: zmq.Socket[bytes],
        on_event: Callable[[Event], None],
        ranks: int,
    ) -> None:
        self.ranks = ranks
        self.process, self.pipe, self.socket, self.on_event = process, pipe, socket, on_event
        self.output = JobOutput(sys.stderr)
        self.alive: set[int] = set()  # ranks that reported "started" and not yet "closed"
        self.started: dict[int, float] = {}  # when each rank did
        self.failure: Event | None = None
        self.heard = False
        self.overrun = ""  # the limit that was hit, if one was

    def follow(self, deadline: float | None, start_deadline: float) -> None:
        """Deliver events and output until the job has ended or must be."""
        began = time.monotonic()
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.pipe, zmq.POLLIN)
        failed_at, reason = None, ""
        while not reason:
            ready = dict(poller.poll(_POLL_MS))
            self._take_events()
            if self.pipe in ready and not self._take_output():
                break
            if not ready and self.process.poll() is not None:
                break
            now = time.monotonic()
            failed_at = failed_at or (now if self.failure else None)
            if failed_at is not None and now - failed_at > _FAILED_SECONDS:
                break
            if deadline is not None and now - began > deadline:
                reason = f"the job did not end within {deadline:g} s"
            elif not self.heard and now - began > start_deadline:
                reason = f"no rank reported anything within {start_deadline:g} s"
            elif 0 < len(self.started) < self.ranks and now - min(self.started.values()) > TOGETHER_SECONDS:
                missing = sorted(set(range(self.ranks)) - set(self.started))
                reason = f"rank {missing[0]} never came: the first started {TOGETHER_SECONDS:g} s ago"
        if not reason and failed_at is None:  # at the end of output mpirun itself is about to exit
            with suppress(subprocess.TimeoutExpired):  # end_session ends it
                self.process.wait(TERMINATE_SECONDS)
        self.overrun = reason

    @property
    def launcher_failed(self) -> bool:
        """Whether mpirun itself failed before it started a rank, as it may on a busy host; nothing has happened then."""
        return self.process.returncode == LAUNCHER_FAILED and not (
            self.started or self.failure or self.overrun
        )

    def exit_code(self) -> int:
        """After `drain`: tell of a failure that no rank told of, and return the job's exit code."""
        reason, ended = self.overrun, self.process.returncode
        if self.failure is None and not reason and ended == 0:
            return 0
        if self.failure is None:  # no rank reported one: a limit was hit, or the launcher noticed one
            rank, exit_code, noticed = self.output.first_failure()
            if reason or not noticed:
                exit_code = DisaggError.exit_code if reason else ended
            said = self.output.last_words()
            ended_so = f"the launcher ended with exit code {ended}{said and ': '}{said}"
            reason = reason or noticed or ended_so
            self.failure = {"event": "failed", "rank": rank, "exit_code": exit_code, "reason": reason}
            self.on_event(self.failure)
        code = self.failure.get("exit_code")
        return code if isinstance(code, int) and 0 < code < 128 else DisaggError.exit_code

    def _take_events(self) -> None:
        while self.socket.poll(0):
            event = decode_event(self.socket.recv())
            if event is None:
                continue
            self.heard = True
            if event["event"] == "started":
                self.alive.add(event["rank"])
                self.started.setdefault(event["rank"], time.monotonic())
            elif event["event"] == "closed":
                self.alive.discard(event["rank"])
            elif event["event"] == "failed" and self.failure is None:
                self.failure = event
            self.on_event(event)

    def _take_output(self) -> bool:
        data = os.read(self.pipe, 1 << 16)
        self.heard = self.heard or bool(data)
        self.output.feed(data)
        return bool(data)

    def drain(self) -> None:
        """After the last process ended: deliver what is still on its way."""
        until = time.monotonic() + _DRAIN_SECONDS
        # a rank that was killed never says "closed": wait for it only where all went well
        while self.alive and self.process.returncode == 0 and time.monotonic() < until:
            self.socket.poll(_POLL_MS)
            self._take_events()
        while self.socket.poll(20) and time.monotonic() < until:
            self._take_events()
        while select.select([self.pipe], [], [], 0)[0] and self._take_output() and time.monotonic() < until:
            pass
        self.output.close()


def _environment(device: str, folder: str, env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a job: its own settings win over our defaults, but not over the mock cluster's."""
    defaults = {"LOGURU_LEVEL": "WARNING"}  # ttnn logs at import; our own commands set their level
    needed = mock.environment() if device == "mock" else {}
    chosen = {"DISAGG_TT_DEVICE": "emulator" if device == "emulator" else "ttnn"}
    # tt-run looks for mpirun on the PATH, where a virtual environment that was not activated is missing
    chosen["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return defaults | mpi_environment(folder) | needed | chosen | dict(env)


def _command(program: list[str], binding: RankBinding, device: str, folder: Path) -> list[str]:
    """The launcher's command line; `folder` takes the files that it names."""
    if device == "emulator":
        return mpirun_command(program, [rank.env | {"DISAGG_TT_ROLE": rank.role} for rank in binding.ranks])

    # tt-run looks for the descriptor from where it starts: give it the paths that were found
    ranks = [
        {
            "rank": rank.rank,
            "mesh_id": rank.mesh_id,
            **({} if rank.mesh_host_rank is None else {"mesh_host_rank": rank.mesh_host_rank}),
            "env_overrides": {**rank.env, "DISAGG_TT_ROLE": rank.role},
        }
        for rank in binding.ranks
    ]
    resolved = folder / "rank_binding.yaml"
    document = {"rank_bindings": ranks, "mesh_graph_desc_path": str(binding.mesh_graph_desc_path)}
    resolved.write_text(yaml.safe_dump(document))
    command = [tool("tt-run", "ttnn"), "--rank-binding", str(resolved)]
    if device == "mock":
        command += ["--mock-cluster-rank-binding", str(mock.write_rank_mapping(folder, len(ranks)))]
    settings = " ".join(f"--mca {name} {value}" for name, value in MPI_SETTINGS.items())
    return [*command, "--mpi-args", f"--oversubscribe {settings}", "--", *program]


@contextmanager
def _event_socket() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PULL)
    try:
        socket.setsockopt(zmq.MAXMSGSIZE, 16 * MAX_EVENT_BYTES)  # beyond it zmq drops the connection
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"tcp://127.0.0.1:{port}"
    finally:
        socket.close(linger=0)
        context.term()
