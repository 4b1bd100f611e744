"""The run: cases made on both sides, verdicts counted, the table."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from disagg_tt.conformance.case import MESHES, Case
from disagg_tt.conformance.compare import BUFFERS, DIFFERS, VERDICTS, verdict
from disagg_tt.conformance.known import Known
from disagg_tt.conformance.ops import generators, known_differences
from disagg_tt.conformance.side import WORKER, Result, Side
from disagg_tt.errors import InputError

Sides = tuple[tuple[str, Sequence[str]], tuple[str, Sequence[str]]]  # device and worker command of each
SIDES: Sides = (("ttnn", WORKER), ("emulator", WORKER))
CASES_A_SECOND = 300  # more than any machine makes: enough cases for --time
SHOWN = 40  # differences printed


def make_cases(seed: str, count: int, ops: Sequence[str] = (), number: int | None = None) -> list[Case]:
    """Return about `count` cases spread evenly over the ops; case `number` of each op alone if given.

    A case depends on (seed, op, number) only. Raises InputError for an unknown op.
    """
    every = generators()
    unknown = [op for op in ops if op not in every]
    if unknown:
        raise InputError(f"no cases are generated for {', '.join(unknown)}; allowed: {', '.join(every)}")
    chosen = list(ops) or list(every)
    numbers = range(-(-count // len(chosen))) if number is None else [number]
    # Number by number, so that a run which is stopped by the clock has made all ops' cases.
    return [
        replace(every[op](Random(f"{seed}:{op}:{n}")), seed=seed, number=n) for n in numbers for op in chosen
    ]


def outcomes(
    cases: Sequence[Case], seconds: float | None = None, sides: Sides = SIDES
) -> Iterator[tuple[Case, Result, Result]]:
    """Yield (case, the real result, the emulator's result) of each case, mesh by mesh, until `seconds` are over.

    Both sides work at once: each is some cases ahead of what is read.
    """
    end = None if seconds is None else time.monotonic() + seconds
    left = len(cases)
    for mesh in sorted({case.mesh for case in cases}, key=MESHES.index):
        group = [case for case in cases if case.mesh == mesh]
        share = None if end is None else time.monotonic() + (end - time.monotonic()) * len(group) / left
        left -= len(group)
        with ExitStack() as stack:
            pair = [stack.enter_context(Side(name, mesh, command)) for name, command in sides]
            for side in pair:
                side.start()
            real, ours = (side.results(group) for side in pair)
            for case in group:
                yield case, next(real), next(ours)
                if share is not None and time.monotonic() > share:
                    break


def run(cases: Sequence[Case], seconds: float | None = None, sides: Sides = SIDES) -> dict[str, Any]:
    """Make the cases on both sides, for `seconds` at most, and return the report as JSON.

    Counts by op and verdict; each difference with its case and outcomes; how often each documented difference was met,
    and which were not; the names of the cases whose kernels' buffers did not fit.
    """
    started = time.monotonic()
    by_op: dict[str, Counter[str]] = {}
    met: Counter[Known] = Counter()
    differences, buffers, documented = [], [], known_differences()
    for case, real, ours in outcomes(cases, seconds, sides):
        kind, known = verdict(case, real, ours, documented)
        if kind == DIFFERS and "crashed" in (real["outcome"], ours["outcome"]):
            # Perhaps an earlier case's fault: the case alone tells.
            [(_, real, ours)] = outcomes([case], None, sides)
            kind, known = verdict(case, real, ours, documented)
        by_op.setdefault(case.op, Counter())[kind] += 1
        if known is not None:
            met[known] += 1
        if kind == BUFFERS:
            buffers.append(case.name)
        if kind == DIFFERS:
            differences.append({"case": case.as_json(), "ttnn": real, "emulator": ours})
    total = sum(by_op.values(), Counter())
    unmet = [known for known in documented if known not in met and any(map(known.op.fullmatch, by_op))]
    return {
        "cases": sum(total.values()),
        **{kind: total[kind] for kind in VERDICTS},
        "seconds": round(time.monotonic() - started, 1),
        "by_op": {op: dict(counts) for op, counts in sorted(by_op.items())},
        "known_reasons": {_words(known): count for known, count in met.most_common()},
        "known_not_met": [_words(known) for known in unmet],
        "kernel_buffer_cases": buffers,
        "differences": differences,
    }


def _words(known: Known) -> str:
    return f"{known.op.pattern}: {known.reason}"


def known_table() -> str:
    """Return the documented differences as the table of docs/conformance.md: a line a reason, with its ops."""
    every = list(generators())
    ops: dict[str, set[str]] = {}
    for known in known_differences():
        ops.setdefault(known.reason, set()).update(op for op in every if known.op.fullmatch(op))
    lines = ["| ops | difference |", "| --- | --- |"]
    for reason, those in ops.items():
        names = "all" if len(those) == len(every) else ", ".join(sorted(those))
        lines.append(f"| {names} | {reason.rstrip('.')} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command: make the cases, print the table and the differences; 1 when there are any that are not documented."""
    parser = argparse.ArgumentParser(
        prog="disagg-tt conformance",
        description="Random calls on the emulator and on the real ttnn with a mock cluster: do they agree?",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--cases", type=int, default=5000, help="about how many, over all ops (default 5000)")
    budget.add_argument("--time", type=float, metavar="SECONDS", help="as many as that long allows instead")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--ops", default="", help="comma-separated; default: all")
    parser.add_argument("--number", type=int, help="only this case of each op, shown whole")
    parser.add_argument("--json", type=Path, help="write everything, with each difference, to this file")
    parser.add_argument("--known", action="store_true", help="only print the documented differences")
    arguments = parser.parse_args(argv)
    if arguments.known:
        print(known_table())
        return 0
    seconds = arguments.time
    if arguments.cases < 1:
        raise InputError(f"--cases {arguments.cases}; allowed: 1 or more")
    if seconds is not None and not 0 < seconds < 1e6:
        raise InputError(f"--time {seconds:g}; allowed: more than 0 seconds, less than 1e6")
    if find_spec("ttnn") is None:
        raise InputError("conformance needs ttnn (Python 3.10 or 3.12): pip install 'disagg_tt[ttnn]'")
    ops = [op for op in arguments.ops.split(",") if op]
    count = arguments.cases if seconds is None else int(seconds * CASES_A_SECOND) + 1
    cases = make_cases(arguments.seed, count, ops, arguments.number)
    if arguments.number is not None:
        for case, real, ours in outcomes(cases):
            print(json.dumps({"case": case.as_json(), "ttnn": real, "emulator": ours}, indent=1))
    report = run(cases, seconds)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 1 if report[DIFFERS] else 0


def print_report(report: dict[str, Any]) -> None:
    """Print counts by op, the documented differences, met or not, and each undocumented one with its command."""
    width = max(map(len, report["by_op"]), default=0) + 2
    print(f"{'op':{width}}" + "".join(f"{kind:>16}" for kind in VERDICTS))
    for op, counts in [*report["by_op"].items(), ("all", report)]:
        print(f"{op:{width}}" + "".join(f"{counts.get(kind, 0):16}" for kind in VERDICTS))
    if report["kernel_buffer_cases"]:
        print("kernel buffers:", " ".join(report["kernel_buffer_cases"]))
    for reason, count in report["known_reasons"].items():
        print(f"known, {count} times: {reason}")
    for reason in report["known_not_met"]:
        print(f"documented but not met: {reason}")
    for difference in report["differences"][:SHOWN]:
        case = Case(**difference["case"])
        print(f"\ndiffers: disagg-tt conformance --seed {case.seed} --ops {case.op} --number {case.number}")
        print(f"  call: {json.dumps({'args': case.args, 'kwargs': case.kwargs})}")
        for side in ("ttnn", "emulator"):
            outcome = difference[side]
            print(
                f"  {side}: {outcome['outcome']} {outcome.get('outputs') or outcome.get('error', '')[:600]}"
            )
    if len(report["differences"]) > SHOWN:
        print(f"\nand {len(report['differences']) - SHOWN} more, which --json FILE has")
    print(json.dumps({name: report[name] for name in ("cases", *VERDICTS, "seconds")}))
