"""`disagg-tt bench stages`: each stage of a request against its reference, both measured in this run.

    wire          bytes on the wire against the formula; must be equal, else the exit code is 1
    decode        tokens/s against transformers' generate, batch 1 and 32, and batch 32 against batch 1
    prefill       1,024 tokens against transformers
    overlap       streaming K and V (--overlap inline, queue) against sending them afterwards
    perf          two meshes against one
    wide          decode and prefill for two random layers of Llama-3.1-8B's width
    wide-overlap  overlap for eight layers of that width

With --transport NAME... it reports instead where a request's time goes over each: prefill, transfer (hidden, exposed) and
decode, and the overhead in % of the total against one mesh, which is measured in turn, or read with --baseline FILE.

It prints a table a stage, then one JSON line. A goal that a time misses is shown and changes no exit code.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_tt.errors import InputError

if TYPE_CHECKING:
    from disagg_tt.bench.measure import Plan
    from disagg_tt.bench.table import Row

QUICK = ("wire", "decode", "prefill", "overlap", "perf")
STAGES = (*QUICK, "wide", "wide-overlap")
TRANSPORTS = ("mesh_socket", "mpi", "tcp", "nixl", "torch")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="disagg-tt bench stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--rows", help=f"stages to measure, of {','.join(STAGES)} (default: all; quick: not the wide ones)"
    )
    flags.add_argument(
        "--transport",
        nargs="+",
        choices=TRANSPORTS,
        metavar="NAME",
        help=f"a request's times over each, of {', '.join(TRANSPORTS)}",
    )
    flags.add_argument(
        "--baseline", type=Path, metavar="FILE", help="one mesh's times, from a file that --json wrote"
    )
    flags.add_argument(
        "--model",
        default=os.environ.get("HF_MODEL"),
        help="of all but the wide stages (default: the checkpoint in the package)",
    )
    flags.add_argument(
        "--threads",
        type=int,
        default=2,
        help="torch threads of transformers; the rows say how many ours has (default: 2)",
    )
    flags.add_argument(
        "--repeats", type=int, default=3, help="how often each figure is taken; medians count (default: 3)"
    )
    flags.add_argument(
        "--quick", action="store_true", help="few tokens, once: to see that it works, not to quote"
    )
    flags.add_argument(
        "--flags", default="", help="more flags of generate for all our jobs, such as --flags=--fifo"
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file too")
    return flags


def chosen(rows: str | None, quick: bool) -> list[str]:
    """Return the stages that --rows names, in the order of STAGES; raises InputError for an unknown one."""
    if rows is None:
        return list(QUICK if quick else STAGES)
    names = [name.strip() for name in rows.split(",")]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise InputError(f"--rows has {', '.join(map(repr, unknown))}; allowed are {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in names]


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what to measure; raises InputError for a flag out of range and CheckpointError for no such model."""
    from disagg_tt.bench.measure import Plan
    from disagg_tt.config import check_number
    from disagg_tt.model.checkpoint import find_checkpoint

    check_number("--threads", arguments.threads, 1, 1024)
    check_number("--repeats", arguments.repeats, 1, 1000)
    model = find_checkpoint(arguments.model)
    more = tuple(shlex.split(arguments.flags))
    plan = Plan(model, arguments.threads, arguments.repeats, flags=more)
    if not arguments.quick:
        return plan
    return replace(plan, repeats=1, new_tokens=9, prefill=128, wire=(2, 33), overlap=(32, 128))


def measured(stages: Sequence[str], plan: Plan) -> Iterator[list[Row]]:
    """Measure `stages` one after the other, and say on stderr how long each took."""
    from disagg_tt.bench import measure

    for stage in stages:
        started = time.monotonic()
        function: Callable[[Plan], list[Row]] = getattr(measure, stage.replace("-", "_"))
        yield function(plan)
        print(f"{stage}: measured in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for flags that do not go together, or a file that cannot be written."""
    if arguments.transport and arguments.rows:
        raise InputError("--rows and --transport are two reports; give one of them")
    if arguments.baseline and not arguments.transport:
        raise InputError("--baseline is what --transport NAME... is compared with; give both")
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist")


def report_requests(arguments: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Measure a request over each transport, print the table, and return its rows."""
    from disagg_tt.bench import request_times

    baseline = request_times.read_baseline(arguments.baseline, plan) if arguments.baseline else []
    transports = list(dict.fromkeys(arguments.transport))
    rows = request_times.rows(
        [*baseline, *request_times.measure(transports, plan, with_baseline=not baseline)]
    )
    print(request_times.table(rows) + "\n", flush=True)
    return rows


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return 1 if a required row failed, else 0."""
    arguments = parser().parse_args(argv)
    check(arguments)
    stages = [] if arguments.transport else chosen(arguments.rows, arguments.quick)

    from disagg_tt.bench.table import json_line, table
    from disagg_tt.device import kind
    from disagg_tt.report import configure_logging

    if kind == "mock":
        raise InputError(
            "bench stages measures what is computed, and a mock cluster computes nothing; set DISAGG_TT_DEVICE=emulator"
        )
    configure_logging("bench")
    plan = plan_of(arguments)
    rows: list[Row] = []
    for found in measured(stages, plan):
        print(table(found) + "\n", flush=True)
        rows += found
    about: dict[str, Any] = {"device": kind, "threads": plan.threads, "repeats": plan.repeats}
    about["flags"] = arguments.flags
    if arguments.transport:
        about["requests"] = report_requests(arguments, plan)
    line = json_line(rows, bench="stages", quick=arguments.quick, **about)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    failed = [row.name for row in rows if row.failed]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
