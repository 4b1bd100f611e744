"""`disagg-tt bench multi-turn`: conversations of several turns, by where their prompts are computed, in one run.

    pd-full  every turn on the prefill mesh, computed and sent whole (--no-prefix-caching)
    pd       every turn on the prefill mesh, which computes and sends the blocks that are new
    ppd      the first turn on the prefill mesh, later ones on the decode mesh over what it has cached
    auto     whichever the router expects to be sooner

It starts a server without prefix caching and one with, and measures the ways in turn, again and again, with new
conversations each time. It prints a table a figure, the comparisons, then one JSON line; a goal that a time misses is
shown and changes no exit code, a wrong number of bytes on the wire does. With --url it measures a running server instead,
which has no pd-full and whose bytes are not checked.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_tt.errors import InputError

if TYPE_CHECKING:
    from disagg_tt.bench.load import Client, Prompts, Reply

MODES = ("pd", "ppd", "auto")
FULL = "pd-full"
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="disagg-tt bench multi-turn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--turns", type=int, default=5, help="of a conversation (default: 5)")
    flags.add_argument("--input-tokens", type=int, default=100, help="new in a later turn (default: 100)")
    flags.add_argument("--output-tokens", type=int, default=30, help="of each answer (default: 30)")
    flags.add_argument("--history-tokens", type=int, help="the first prompt (default: as --input-tokens)")
    flags.add_argument("--conversations", type=int, default=1, help="at once (default: 1)")
    flags.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all; pd-full always")  # fmt: skip
    flags.add_argument("--repeats", type=int, default=10, help="of each conversation; medians count (default: 10)")  # fmt: skip
    flags.add_argument("--threads", type=int, default=1, help="torch threads of each rank (default: 1)")
    flags.add_argument("--seed", type=int, default=0, help="of the prompts' tokens (default: 0)")
    flags.add_argument("--url", help="measure the server that runs there")
    flags.add_argument("--quick", action="store_true", help="few tokens, once: to see that it works, not to quote")  # fmt: skip
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file too")
    flags.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the turns (needs matplotlib)")
    return flags


@dataclass(frozen=True)
class Turn:
    """One turn of all conversations of a repeat: medians of times in ms, sums of bytes and of prompt tokens by source."""

    prompt_tokens: int
    ttft_ms: float
    latency_ms: float
    bytes: int
    sources: dict[str, int]
    routes: list[str]


async def converse(client: Client, prompts: Prompts, plan: argparse.Namespace) -> list[Turn]:
    """Have new conversations, all at once, and return their turns. A turn begins when all have ended the one before."""
    histories = [prompts.new(plan.history_tokens) for _ in range(plan.conversations)]
    found = []
    for turn in range(plan.turns):
        if turn:
            histories = [[*h, *prompts.words(plan.input_tokens)] for h in histories]
        before = await client.metrics()
        replies: list[Reply] = await asyncio.gather(
            *(client.complete(h, plan.output_tokens) for h in histories)
        )
        after = await client.metrics()

        def gained(name: str, before: dict[str, float] = before, after: dict[str, float] = after) -> int:
            return round(after.get(name, 0) - before.get(name, 0))

        found.append(
            Turn(
                sum(map(len, histories)),
                statistics.median(r.ttft_ms for r in replies),
                statistics.median(r.e2el_ms for r in replies),
                gained("kv_bytes_transferred_total"),
                {source: gained(f"prompt_tokens_by_source_total{{{source}}}") for source in SOURCES},
                [r.route for r in replies],
            )
        )
        histories = [
            [*h, *prompts.of_text(r.text, plan.output_tokens)]
            for h, r in zip(histories, replies, strict=True)
        ]
    return found


async def measure(
    urls: dict[str, str], plan: argparse.Namespace
) -> tuple[dict[str, list[list[Turn]]], dict[str, list[Turn]]]:
    """Return each way's turns by repeat, and the ten turns of 100 tokens of pd-full and pd, if there is a pd-full."""
    from tqdm import tqdm

    from disagg_tt.bench.load import Prompts, connect
    from disagg_tt.model.checkpoint import find_checkpoint
    from disagg_tt.prompt import Tokenizer

    prompts = Prompts(Tokenizer(find_checkpoint(None)), plan.seed)
    found: dict[str, list[list[Turn]]] = {way: [] for way in urls}
    growth: dict[str, list[Turn]] = {}
    async with AsyncExitStack() as closing:
        clients = {
            url: await closing.enter_async_context(connect(url)) for url in dict.fromkeys(urls.values())
        }
        _check_length(plan, min(client.limit for client in clients.values()))

        async def once(way: str, plan: argparse.Namespace) -> list[Turn]:
            client = clients[urls[way]]
            await client.set_mode("pd" if way == FULL else way)
            return await converse(client, prompts, plan)

        count = (plan.repeats + 1) * len(urls)
        with tqdm(total=count, unit="conversation", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
            for repeat in range(plan.repeats + 1):  # the first warms up
                for way in urls:
                    turns = await once(way, plan)
                    if repeat:
                        found[way].append(turns)
                    bar.update()
        if FULL in urls and "pd" in urls:
            ten = argparse.Namespace(
                turns=plan.growth_turns,
                history_tokens=100,
                input_tokens=90,
                output_tokens=10,
                conversations=1,
            )
            growth = {way: await once(way, ten) for way in (FULL, "pd")}
    return found, growth


def _check_length(plan: argparse.Namespace, limit: int) -> None:
    longest = plan.history_tokens + (plan.turns - 1) * (plan.input_tokens + plan.output_tokens)
    if longest + plan.output_tokens > limit:
        raise InputError(
            f"the last turn has {longest} tokens and {plan.output_tokens} for its answer; the model takes {limit}: have "
            "fewer --turns, --history-tokens, --input-tokens or --output-tokens"
        )


def checked(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags; raises InputError for one that will not do."""
    from disagg_tt.bench.table import check_files
    from disagg_tt.config import check_number

    plan = parser().parse_args(argv)
    plan.growth_turns = 10
    if plan.quick:
        plan.turns, plan.input_tokens, plan.output_tokens, plan.repeats = min(plan.turns, 2), 40, 4, 1
        plan.growth_turns = 3
    if plan.history_tokens is None:
        plan.history_tokens = plan.input_tokens
    for name in ("turns", "input_tokens", "history_tokens", "output_tokens", "conversations", "repeats", "threads"):  # fmt: skip
        check_number("--" + name.replace("_", "-"), getattr(plan, name), 1, 2**20)
    check_files(plan.json, plan.plot)
    return plan


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return 1 if a number of bytes is wrong, else 0."""
    plan = checked(argv)
    from disagg_tt.bench import turns
    from disagg_tt.bench.load import servers
    from disagg_tt.bench.table import table
    from disagg_tt.processes import signals_raise
    from disagg_tt.report import configure_logging

    configure_logging("bench")
    modes = [mode for mode in MODES if mode in plan.modes]
    with ExitStack() as closing:
        closing.enter_context(signals_raise())
        if plan.url:
            urls = dict.fromkeys(modes, plan.url)
        else:
            flags = ("--threads", str(plan.threads))
            started = closing.enter_context(
                servers({FULL: (*flags, "--no-prefix-caching"), "cached": flags}, {FULL: 2, "cached": 2})
            )
            urls = {FULL: started[FULL], **dict.fromkeys(modes, started["cached"])}
        found, growth = asyncio.run(measure(urls, plan))
    rows = [*turns.comparisons(found, plan.seed), *turns.bytes_of_growth(growth)]
    print(turns.by_turn(found))
    print("\n" + table(rows) if rows else "")
    line = _json_line(plan, found, growth, rows)
    print(line)
    if plan.json:
        plan.json.write_text(line + "\n", encoding="utf-8")
    if plan.plot:
        turns.plot(found, plan.plot)
    failed = [row.name for row in rows if row.failed]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _json_line(plan: argparse.Namespace, found: Any, growth: Any, rows: Any) -> str:
    from disagg_tt.bench.table import json_line

    settings = {name: v for name, v in vars(plan).items() if name not in ("json", "plot", "growth_turns")}
    ways = {way: [[asdict(turn) for turn in each] for each in repeats] for way, repeats in found.items()}
    ten = {way: [asdict(turn) for turn in each] for way, each in growth.items()}
    return json_line(rows, bench="multi-turn", **settings, ways=ways, growth=ten)
