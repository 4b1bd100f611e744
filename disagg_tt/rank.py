"""A rank's process: its role and mesh from the environment that tt-run sets, its deadlines, its report, its exit code.

One of two programs that were started separately is a rank too: 0 prefills, 1 decodes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from disagg_tt.config import Options
from disagg_tt.core import DECODE, PREFILL, Answer
from disagg_tt.device import log_choice
from disagg_tt.errors import DisaggError, InputError, PeerError, RankBindingError
from disagg_tt.launch import default_binding, in_job, job_rank, job_size
from disagg_tt.mesh_descriptor import read_mesh_descriptor
from disagg_tt.rank_binding import RankBinding
from disagg_tt.report import Event, Reporter, configure_logging, in_pieces
from disagg_tt.terminal import Terminal, log_perf
from disagg_tt.transfer_config import KVTransferConfig
from disagg_tt.watchdog import Watchdog


def role_of(environ: Mapping[str, str], rank: int) -> str:
    """Return this rank's role: DISAGG_TT_ROLE, else rank 0 prefills; raises RankBindingError for another word."""
    role = environ.get("DISAGG_TT_ROLE") or (PREFILL if rank == 0 else DECODE)
    if role not in (PREFILL, DECODE):
        raise RankBindingError(f"DISAGG_TT_ROLE is {role!r}; allowed: {PREFILL}, {DECODE}")
    return role


def mesh_shape_of(environ: Mapping[str, str], rank_binding: str | None) -> tuple[int, int]:
    """Return this rank's mesh shape from the mesh descriptor that tt-run names, else from the rank binding."""
    descriptor, mesh_id = environ.get("TT_MESH_GRAPH_DESC_PATH"), environ.get("TT_MESH_ID")
    if descriptor and mesh_id is not None:
        shapes = read_mesh_descriptor(Path(descriptor))
        if int(mesh_id) not in shapes:
            raise RankBindingError(
                f"TT_MESH_ID is {mesh_id}; the descriptor {descriptor} has meshes {sorted(shapes)}"
            )
        return shapes[int(mesh_id)]
    binding = RankBinding.load(rank_binding or default_binding())
    return binding.mesh_shapes[binding.ranks[job_rank()].mesh_id if job_size() == len(binding.ranks) else 0]


@dataclass(frozen=True)
class Seat:
    """What a rank's work needs to know: its role, the other rank, whom to report to, and what ends a wait."""

    role: str
    peer: int
    emit: Callable[[Event], None]
    watchdog: Watchdog


def main(options: Options) -> int:
    """Answer the prompts as one rank of a job that MPI started; return its exit code."""
    trace = options.trace and f"{options.trace}.rank{job_rank()}"
    local = Terminal(len(options.prompts), as_json=options.json, trace=trace)

    def work(seat: Seat) -> None:
        plain = _answers(options, seat)
        if seat.role == PREFILL:
            for answers in in_pieces(plain):
                seat.emit({"event": "answers", "answers": answers})
        if not os.environ.get("DISAGG_TT_EVENTS"):
            _finish_local(local, seat.role, plain)

    return be_rank(work, options.deadline_s, lambda event: _show_local(local, event))


def program_main(options: Options, transfer: KVTransferConfig) -> int:
    """Be one of two programs that were started separately; the prefill program shows the answers. Return the exit code."""
    if in_job():
        raise InputError(
            "--kv-transfer-config joins programs that were started separately, and MPI started this one; in one launch use "
            "--transport"
        )
    role, rank = transfer.role, (PREFILL, DECODE).index(transfer.role)
    trace = options.trace and f"{options.trace}.{role}"
    terminal = Terminal(len(options.prompts), as_json=options.json, trace=trace)

    def work(seat: Seat) -> None:
        plain = _answers(options, seat)
        if role == PREFILL:
            terminal.answers = plain
            for answer in plain:
                terminal.handle(
                    {"event": "token", "request": answer["request"], "text": answer["text"], "first": False}
                )
        terminal.close()

    def show(event: Event) -> None:
        if event["event"] == "first_token":
            _log_first_token(event)
        elif event["event"] in ("progress", "trace"):
            terminal.handle(event)

    return _be(role, rank, work, options.deadline_s, show)


def _answers(options: Options, seat: Seat) -> list[dict[str, Any]]:
    """Do a rank's work; return its answers."""
    from disagg_tt.generate import run_rank
    from disagg_tt.run import read_run

    _use_threads(options)
    run = read_run(options, seat.emit, seat.watchdog)
    answers = run_rank(run, seat.role, mesh_shape_of(os.environ, options.rank_binding), seat.peer)
    return [vars(answer) for answer in answers]


def be_rank(
    work: Callable[[Seat], None], deadline_s: float, show: Callable[[Event], None], *, pair: bool = True
) -> int:
    """Do `work` as one rank of a job that MPI started and return its exit code.

    What `work` raises is reported, and so is, before anything else, a role that is none or, for a `pair`, a job that is not
    of two ranks.
    Events go to the launcher, or to `show` where there is none.
    """
    rank = job_rank()
    try:
        role = _checked_role(rank, pair)
    except RankBindingError as error:
        print(f"disagg-tt: {error}", file=sys.stderr)
        return error.exit_code
    return _be(role, rank, work, deadline_s, show)


def _be(
    role: str,
    rank: int,
    work: Callable[[Seat], None],
    deadline_s: float,
    show: Callable[[Event], None],
) -> int:
    configure_logging(role, rank)
    with Reporter.from_env(os.environ, role, rank, show) as reporter:
        watchdog = Watchdog(deadline_s, lambda what: _give_up(reporter, what, deadline_s))
        try:
            log_choice()
            work(Seat(role, 1 - rank, reporter.emit, watchdog))
        except BaseException as error:
            _report(reporter, error)
            code = getattr(error, "exit_code", 1)
        else:
            return 0
        finally:
            watchdog.close()
    # Not sys.exit: MPI's own exit handler would wait for the other rank.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _checked_role(rank: int, pair: bool) -> str:
    if pair and job_size() != 2:
        raise RankBindingError(
            f"this job has {job_size()} {'rank' if job_size() == 1 else 'ranks'}; one prefill and one decode rank are "
            "needed: start it with tt-run and a rank binding of two ranks, such as rank_bindings/n300x2_1p1d.yaml"
        )
    return role_of(os.environ, rank)


def run_here(options: Options) -> int:
    """Run `--single-mesh` or `--one-process` in this process and show the answers."""
    configure_logging("one process" if options.one_process else "single mesh")
    terminal = Terminal(len(options.prompts), as_json=options.json, trace=options.trace)
    answers = answer_here(options, terminal.handle)
    terminal.answers = [vars(answer) for answer in answers]
    terminal.close()
    return 0


def answer_here(options: Options, on_event: Any) -> list[Answer]:
    """Answer the prompts in this process, on one mesh or on two submeshes of one; return the answers."""
    from disagg_tt.generate import run_one_process, run_single_mesh
    from disagg_tt.run import read_run

    _use_threads(options)
    watchdog = Watchdog(
        options.deadline_s, lambda what: _exit(f"{what}: no progress for {options.deadline_s:.0f} s")
    )
    try:
        run = read_run(options, on_event, watchdog)
        shape = mesh_shape_of(os.environ, options.rank_binding)
        return (run_one_process if options.one_process else run_single_mesh)(run, shape)
    finally:
        watchdog.close()


def _use_threads(options: Options) -> None:
    """Share the host's cores between its ranks, unless told otherwise: torch's threads slow each other down when there
    are more of them than cores."""
    if options.threads or "OMP_NUM_THREADS" not in os.environ:
        import torch

        programs = job_size() if options.kv_transfer is None else 2  # which may be on one host
        torch.set_num_threads(options.threads or max((os.cpu_count() or 1) // programs, 1))


def _show_local(terminal: Terminal, event: Event) -> None:
    """Without a launcher the decode rank prints the text, and the prefill rank logs the first token."""
    if event["event"] == "first_token":
        _log_first_token(event)
    elif event["event"] == "trace" or event["role"] == DECODE:
        terminal.handle(event)


def _log_first_token(event: Event) -> None:
    logger.info("request {}: first token {} {!r}", event["request"], event["token"], event["text"])


def _finish_local(terminal: Terminal, role: str, answers: list[dict[str, Any]]) -> None:
    if role == DECODE:
        terminal.answers = answers
    else:
        for answer in answers:
            log_perf(answer)
    terminal.close()


def _report(reporter: Reporter, error: BaseException) -> None:
    if not isinstance(error, (DisaggError, KeyboardInterrupt, SystemExit)):
        logger.opt(exception=error).error("unexpected error")
    elif not os.environ.get("DISAGG_TT_EVENTS"):
        logger.error("{}", error)
    reporter.failed(error)


def _give_up(reporter: Reporter, what: str, limit_s: float) -> None:
    error = PeerError(
        f"waited {limit_s:.0f} s for {what}; the other rank or the device hangs (--deadline-s sets the limit)"
    )
    logger.error("{}", error)
    reporter.failed(error)
    reporter.close()
    os._exit(error.exit_code)


def _exit(reason: str) -> None:
    logger.error(reason)
    os._exit(1)
