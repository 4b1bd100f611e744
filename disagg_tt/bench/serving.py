"""`disagg-tt bench serving`: a server under load, and beside it the single-mesh server on the same hardware, in one run.

    load       arrivals at a rate: percentiles of the times that clients see, throughput, goodput
    streams    tokens/s of 32 streams at once against those of one
    stall      p99 between two tokens of running streams while prompts of 1,000 tokens arrive, against the quiet one
    handover   from the prefill's end to the decode mesh's first step, beyond the transfer itself, when idle
    bandwidth  K and V through the served endpoint, against `bench kv` over the same wire

Two meshes: one prefill and one decode rank, --threads torch threads each. One mesh, with --single-mesh-baseline: one
rank that does both, with twice the threads. The sides are measured in turn with the same lengths and arrivals, each with
prompts that no cache has seen. It prints a table a part, then one JSON line; a goal that a time misses is shown and
changes no exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_tt.errors import InputError

if TYPE_CHECKING:
    from disagg_tt.bench.load import Client, Prompts, Reply
    from disagg_tt.bench.table import Row

PARTS = ("load", "streams", "stall", "handover", "bandwidth")
PAIR, SINGLE = "two meshes", "one mesh"
METRICS = ("ttft", "tpot", "itl", "e2el")
MOST = 2**20


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="disagg-tt bench serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--rows", dest="parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )
    flags.add_argument("--request-rate", type=float, default=float("inf"), help="requests/s, Poisson; inf: all at once (default)")  # fmt: skip
    flags.add_argument("--num-prompts", type=int, default=32, help="of a repeat (default: 32)")
    flags.add_argument("--random-input-len", type=_lengths, default=(128, 128), metavar="A[-B]", help="tokens (default: 128)")  # fmt: skip
    flags.add_argument("--random-output-len", type=_lengths, default=(64, 64), metavar="A[-B]", help="tokens (default: 64)")  # fmt: skip
    flags.add_argument("--max-concurrency", type=int, help="requests in flight (default: as many as come)")
    flags.add_argument("--percentile-metrics", default=",".join(METRICS), help="what is reported (default: %(default)s)")  # fmt: skip
    flags.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:500 tpot:50: requests within all")  # fmt: skip
    flags.add_argument("--single-mesh-baseline", action="store_true", help="measure one mesh on the same hardware too")  # fmt: skip
    flags.add_argument("--mode", default="auto", help="of two meshes (default: auto)")
    flags.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    flags.add_argument("--threads", type=int, default=1, help="torch threads of each of the two ranks (default: 1)")  # fmt: skip
    flags.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and tokens (default: 0)")
    flags.add_argument("--url", help="measure the server that runs there, alone")
    flags.add_argument("--quick", action="store_true", help="few tokens, once: to see that it works, not to quote")  # fmt: skip
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file too")
    flags.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times (needs matplotlib)")
    return flags


def _lengths(text: str) -> tuple[int, int]:
    """`A` or `A-B` as the least and the most."""
    least, _, most = text.partition("-")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1] <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r}; give a length, or the least and the most as 100-200")
    return found


def checked(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags; raises InputError for one that will not do."""
    from disagg_tt.bench.table import check_files
    from disagg_tt.config import check_number

    plan = parser().parse_args(argv)
    if plan.quick:
        plan.repeats, plan.num_prompts = 1, min(plan.num_prompts, 4)
        plan.random_input_len, plan.random_output_len = (20, 40), (4, 8)
    plan.metrics = plan.percentile_metrics.split(",")
    plan.goals = {}
    for name in plan.metrics:
        if name not in METRICS:
            raise InputError(f"--percentile-metrics has {name!r}; allowed are {', '.join(METRICS)}")
    for word in plan.goodput:
        name, _, limit = word.partition(":")
        try:
            plan.goals[name] = float(limit)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el"):
            raise InputError(f"--goodput {word!r}; give ttft, tpot or e2el with a limit in ms: ttft:500")
    for flag in ("num_prompts", "repeats", "threads", "max_concurrency"):
        if getattr(plan, flag) is not None:
            check_number("--" + flag.replace("_", "-"), getattr(plan, flag), 1, MOST)
    if not plan.request_rate > 0:
        raise InputError(f"--request-rate is {plan.request_rate}; give requests/s above 0, or inf")
    check_files(plan.json, plan.plot)
    return plan


async def offer(client: Client, prompts: Prompts, plan: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Offer one repeat of the load; return its replies, failures (as text) and how long it took, s."""
    from disagg_tt.bench.load import arrivals, clock, sleep_until
    from disagg_tt.errors import PeerError

    generator = random.Random(seed)
    lengths = [
        (generator.randint(*plan.random_input_len), generator.randint(*plan.random_output_len))
        for _ in range(plan.num_prompts)
    ]
    times = arrivals(plan.num_prompts, plan.request_rate, generator)
    room = asyncio.Semaphore(plan.max_concurrency or plan.num_prompts)
    requests = [prompts.new(tokens) for tokens, _ in lengths]
    began = clock()

    async def one(number: int) -> Reply | str:
        await sleep_until(began + times[number])
        async with room:
            try:
                return await client.complete(requests[number], lengths[number][1])
            except PeerError as error:
                return str(error)

    found = await asyncio.gather(*map(one, range(plan.num_prompts)))
    took = clock() - began
    failed = [reply for reply in found if isinstance(reply, str)]
    return {"replies": [r for r in found if not isinstance(r, str)], "failed": failed, "seconds": took}


async def measure(urls: dict[str, str], plan: argparse.Namespace) -> dict[str, Any]:
    """Return what each part found: "load" by side, and the rows of the other parts."""
    from tqdm import tqdm

    from disagg_tt.bench import served
    from disagg_tt.bench.load import Prompts, connect
    from disagg_tt.model.checkpoint import find_checkpoint
    from disagg_tt.prompt import Tokenizer

    prompts = Prompts(Tokenizer(find_checkpoint(None)), plan.seed)
    load: dict[str, list[dict[str, Any]]] = {side: [] for side in urls}
    rows: list[Row] = []
    async with AsyncExitStack() as closing:
        clients = {side: await closing.enter_async_context(connect(url)) for side, url in urls.items()}
        longest = plan.random_input_len[1] + plan.random_output_len[1]
        if longest > (limit := min(client.limit for client in clients.values())):
            raise InputError(f"a prompt and its answer have up to {longest} tokens; the model takes {limit}")
        for client in clients.values():  # warms up
            await offer(client, prompts, argparse.Namespace(**{**vars(plan), "num_prompts": 4}), plan.seed)
        parts = [part for part in PARTS if part in plan.parts]
        with tqdm(total=len(parts), unit="part", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
            for part in parts:
                if part == "load":
                    for repeat in range(plan.repeats):
                        for side, client in clients.items():
                            load[side].append(await offer(client, prompts, plan, plan.seed + repeat))
                else:
                    rows += await served.PARTS[part](clients, prompts, served.Effort.of(plan))
                bar.update()
    return {"load": load, "rows": rows}


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return 0; 1 where a server answered no request of the load."""
    plan = checked(argv)
    from disagg_tt.bench import load_report
    from disagg_tt.bench.load import servers
    from disagg_tt.bench.table import json_line, table
    from disagg_tt.processes import signals_raise
    from disagg_tt.report import configure_logging

    configure_logging("bench")
    with ExitStack() as closing:
        closing.enter_context(signals_raise())
        if plan.url:
            urls = {PAIR: plan.url}
        else:
            flags = {PAIR: ("--threads", str(plan.threads), "--mode", plan.mode)}
            if plan.single_mesh_baseline:
                flags[SINGLE] = ("--threads", str(2 * plan.threads), "--rank-binding", _one_mesh())
            urls = closing.enter_context(servers(flags, {PAIR: 2, SINGLE: 1}))
        found = asyncio.run(measure(urls, plan))
    summary = {
        side: load_report.summary(repeats, plan.goals) for side, repeats in found["load"].items() if repeats
    }
    if summary:
        print(load_report.table(summary, plan.metrics) + "\n")
    if found["rows"]:
        print(table(found["rows"]) + "\n")
    settings = {name: v for name, v in vars(plan).items() if name not in ("json", "plot", "metrics", "goals")}
    settings["request_rate"] = str(plan.request_rate)  # JSON has no inf
    line = json_line(found["rows"], bench="serving", **settings, load=summary)
    print(line)
    if plan.json:
        plan.json.write_text(line + "\n", encoding="utf-8")
    if plan.plot:
        load_report.plot(found["load"], plan.plot)
    return int(
        not all(any(repeat["replies"] for repeat in repeats) for repeats in found["load"].values() if repeats)
    )


def _one_mesh() -> str:
    from disagg_tt.rank_binding import bundled_folder

    return str(bundled_folder() / "rank_bindings" / "n300x1_1d.yaml")
