"""`disagg-tt bench COMMAND`: measurements, never tests. docs/benchmarks.md records what they gave."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "emulator": "the emulator against plain torch",
    "kv": "K and V between two processes, by transport",
    "multi-turn": "conversations over a server, by where their prompts are computed",
    "serving": "a server under load, and the single-mesh server beside it",
    "stages": "each stage of a request against its reference",
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that `argv` begins with and return its exit code; each is a module with a `main` of its own."""
    parser = argparse.ArgumentParser(
        prog="disagg-tt bench",
        description="Measure.",
        epilog="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its flags; COMMAND --help lists them")
    arguments = parser.parse_args(argv)
    module = arguments.command.replace("-", "_")
    code: int = import_module(f"disagg_tt.bench.{module}").main(arguments.rest)
    return code
