"""`disagg-tt bench kv`: what it costs to move a model's K and V between two processes, by transport, in one run.

Two ranks, started as a job is, stream the layers of a geometry (no model, no prompt) over each transport in turn. Beside
each row stands its share of a ceiling from the same run: a plain copy of the same bytes in memory, or --link-gbps.
Reference rows, marked: `mpi4py` (blocking send and receive), `nixl_bare` and `gloo_bare` (the library alone, in a loop) and
`pickle` (the cache pickled over TCP).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from disagg_tt.errors import DisaggError, InputError
from disagg_tt.geometry import GEOMETRIES, MIB, Geometry

TRANSPORTS = ("mesh_socket", "mpi", "tcp", "nixl", "torch")
REFERENCES = ("mpi4py", "nixl_bare", "gloo_bare", "pickle")
ORDERS = ("contiguous", "paged", "fragmented")
BULK_BYTES = 1 << 30
HEADINGS = (
    "transport", "seq len", "order", "total MB", "total ms", "end-to-end ms", "avg ms a layer", "total GB/s",
    "avg layer GB/s", "of ceiling",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="disagg-tt bench kv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--geometry", default="llama-3.1-8b", help=f"{', '.join(GEOMETRIES)}, or JSON (default: llama-3.1-8b)"
    )
    flags.add_argument("--seq-lengths", type=int, nargs="+", default=[1024], help="tokens (default: 1024)")
    flags.add_argument(
        "--transport", nargs="+", default=[*TRANSPORTS, *REFERENCES], choices=[*TRANSPORTS, *REFERENCES],
        help="default: all, references too", metavar="NAME",
    )  # fmt: skip
    flags.add_argument("--mode", choices=("layer", "bulk"), default="layer", help="default: layer by layer")
    flags.add_argument("--block-order", nargs="+", choices=ORDERS, default=["contiguous"], metavar="ORDER")
    flags.add_argument("--iterations", type=int, default=5, help="timed streams; medians count (default: 5)")
    flags.add_argument("--warmup", type=int, default=1, help="streams before them (default: 1)")
    flags.add_argument(
        "--link-gbps", type=float, help="the link's Gbit/s, as ceiling instead of a memory copy"
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file too")
    flags.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rates (needs matplotlib)")
    return flags


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return 0."""
    arguments = parser().parse_args(argv)
    geometry = Geometry.named(arguments.geometry)
    settings = settings_of(arguments, geometry)
    rows, skipped = run(settings)
    print(sizes(geometry, arguments.seq_lengths))
    print(table(rows, arguments.link_gbps))
    for event in skipped:
        print(f"not measured: {event['transport']}, {event['tokens']} tokens: {event['reason']}")
    line = json.dumps({"bench": "kv", **settings, "rows": rows})
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


def settings_of(arguments: argparse.Namespace, geometry: Geometry) -> dict[str, Any]:
    """Return what the ranks are told; raises InputError for a flag out of range."""
    for name, value, least, most in (
        ("--iterations", arguments.iterations, 1, 10_000),
        ("--warmup", arguments.warmup, 0, 10_000),
        ("--link-gbps", 1 if arguments.link_gbps is None else arguments.link_gbps, 1e-3, 1e6),
    ):
        if not least <= value <= most:
            raise InputError(f"{name} is {value}; allowed: {least} to {most}")
    for flag, file in (("--json", arguments.json), ("--plot", arguments.plot)):
        if file and not file.parent.is_dir():
            raise InputError(f"{flag} {file}: the folder {file.parent} does not exist")
    if arguments.plot and not find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install 'disagg_tt[plot]'")
    for tokens in arguments.seq_lengths:
        if arguments.mode == "bulk" and geometry.total_bytes(tokens) > BULK_BYTES:
            raise InputError(
                f"--mode bulk with {tokens} tokens holds {geometry.total_bytes(tokens):,} bytes in each process; allowed: "
                f"{BULK_BYTES:,}; use --mode layer"
            )
        geometry.blocks(tokens)
    return {
        "geometry": asdict(geometry),
        "seq_lengths": arguments.seq_lengths,
        "transports": list(dict.fromkeys(arguments.transport)),
        "orders": list(dict.fromkeys(arguments.block_order)),
        "mode": arguments.mode,
        "iterations": arguments.iterations,
        "warmup": arguments.warmup,
    }


def run(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the job of two ranks; return its rows and what it skipped."""
    from tqdm import tqdm

    from disagg_tt.bench.jobs import JobError, binding
    from disagg_tt.device import kind
    from disagg_tt.launch import run_job

    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    failures: list[str] = []
    count = len(settings["seq_lengths"]) * len(settings["orders"]) * len(settings["transports"])
    with tqdm(total=count, unit="row", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def take(event: dict[str, Any]) -> None:
            if event["event"] == "row":
                rows.append(row_of(event))
                bar.update()
            elif event["event"] == "skipped":
                skipped.append(event)
                bar.update()
            elif event["event"] == "failed":
                failures.append(event["reason"])

        program = (sys.executable, "-m", "disagg_tt.bench.kv_ranks")
        code = run_job([json.dumps(settings)], binding(), kind, {}, take, program=program)
    if code:
        raise JobError(f"bench kv failed: {'; '.join(failures) or f'exit code {code}'}")
    return rows, skipped


def row_of(event: dict[str, Any]) -> dict[str, Any]:
    """Return a row: medians (ms, bytes/s) of the streams of one transport and load."""
    figures = event["figures"]
    medians = {name: statistics.median(f[name] for f in figures) for name in figures[0]}
    layer_bytes = event["bytes"] / event["layers"]
    return {
        **{name: event[name] for name in ("transport", "tokens", "order", "bytes", "layers")},
        **{name: round(value, 4) for name, value in medians.items()},
        "rate": event["bytes"] / medians["total_ms"] * 1e3,
        "layer_rate": layer_bytes / medians["layer_ms"] * 1e3,
        "of_copy": event["bytes"] / medians["total_ms"] * 1e3 / medians["copy_rate"],
    }


def sizes(geometry: Geometry, lengths: Sequence[int]) -> str:
    """Return the geometry's sizes in words: counted by elements, and as packed on the wire."""
    lines = [
        f"{geometry.name}: {geometry.layers} layers, {geometry.dtype}, blocks of {geometry.block} tokens"
    ]
    for tokens in lengths:
        counted, wire = geometry.counted_bytes(tokens), geometry.total_bytes(tokens)
        lines.append(
            f"  {tokens:,} tokens: {counted / MIB:,.1f} MiB counted by elements, {wire / MIB:,.1f} MiB ({wire / 1e6:,.1f} MB) packed"
        )
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]], link_gbps: float | None) -> str:
    """Return the rows as aligned text; GB/s and MB are powers of ten."""
    lines = [HEADINGS]
    for row in rows:
        ceiling = link_gbps * 1e9 / 8 if link_gbps else row["copy_rate"]
        mark = " (reference)" if row["transport"] in REFERENCES else ""
        lines.append(
            (
                row["transport"] + mark, str(row["tokens"]), row["order"], f"{row['bytes'] / 1e6:.2f}",
                f"{row['total_ms']:.2f}", f"{row['end_to_end_ms']:.2f}", f"{row['layer_ms']:.3f}",
                f"{row['rate'] / 1e9:.2f}", f"{row['layer_rate'] / 1e9:.2f}", f"{row['rate'] / ceiling:.0%}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(t.rjust(w) for t, w in zip(line, widths, strict=True)) for line in lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw GB/s over tokens, a line a transport and order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        label = f"{row['transport']}, {row['order']}"
        lines.setdefault(label, []).append((row["tokens"], row["rate"] / 1e9))
        lines.setdefault("memory copy", []).append((row["tokens"], row["copy_rate"] / 1e9))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="tokens", ylabel="GB/s", xscale="log", ylim=(0, None))
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DisaggError(f"--plot {path}: {error}") from None
