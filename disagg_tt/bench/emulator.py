"""`disagg-tt bench emulator`: how fast the emulator is, against plain torch on the same machine in the same run.

    layer   a decoder layer of Llama-3.1-8B's width against the same layer in float32 torch, prefill and decode
    socket  a MeshSocket between two ranks against a copy of as many bytes, by dtype; what arrives is checked

It prints a table a part, then one JSON line. A goal that a time misses is shown and changes no exit code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_tt.errors import InputError

if TYPE_CHECKING:
    from disagg_tt.bench.table import Row


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="disagg-tt bench emulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--part", choices=[*PARTS, "all"], default="all", help="what to measure (default: all)"
    )
    flags.add_argument(
        "--repeats", type=int, default=5, help="how often each figure is taken; medians count (default: 5)"
    )
    flags.add_argument(
        "--threads", type=int, default=2, help="torch threads of both sides of a layer (default: 2)"
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file too")
    return flags


def _socket(arguments: argparse.Namespace) -> list[Row]:
    from disagg_tt.bench.socket import socket

    return socket(arguments.repeats)


def _layer(arguments: argparse.Namespace) -> list[Row]:
    from tempfile import TemporaryDirectory

    from disagg_tt.bench.layer import layer

    with TemporaryDirectory(prefix="disagg-tt-bench-") as folder:
        return layer(Path(folder), arguments.threads, arguments.repeats)


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"layer": _layer, "socket": _socket}


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns 0."""
    arguments = parser().parse_args(argv)

    from disagg_tt.bench.table import json_line, table
    from disagg_tt.config import check_number
    from disagg_tt.device import kind

    if kind != "emulator":
        raise InputError(
            f"bench emulator measures the emulator; this is {kind}: set DISAGG_TT_DEVICE=emulator"
        )
    check_number("--threads", arguments.threads, 1, 1024)
    check_number("--repeats", arguments.repeats, 1, 1000)
    rows: list[Row] = []
    for name in PARTS if arguments.part == "all" else [arguments.part]:
        found = PARTS[name](arguments)
        print(table(found) + "\n", flush=True)
        rows += found
    line = json_line(rows, bench="emulator", threads=arguments.threads, repeats=arguments.repeats)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    return 0
