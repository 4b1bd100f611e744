"""The parts of `bench serving` besides its load: streams, stall, handover, bandwidth. Each returns its rows."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from disagg_tt.bench.load import clock
from disagg_tt.bench.serving import PAIR
from disagg_tt.bench.table import Row
from disagg_tt.errors import PeerError

if TYPE_CHECKING:
    from disagg_tt.bench.load import Client, Prompts, Reply

HANDOVER_MS = 10.0  # the goal


@dataclass(frozen=True)
class Effort:
    """How much is measured. Lengths are tokens; `mode` is the server's, which handover and bandwidth set to pd for a while.

    streams: at once. running: streams that prompts of `arriving` tokens are to delay. handovers: of the median.
    """

    mode: str
    repeats: int
    streams: int = 32
    answer: int = 128
    running: int = 8
    running_answer: int = 256
    arriving: int = 1000
    handovers: int = 20
    prompts: tuple[int, ...] = (100, 500, 1000)

    @classmethod
    def of(cls, plan: argparse.Namespace) -> Effort:
        """Return what `bench serving`'s flags ask for."""
        if plan.quick:
            return cls(plan.mode, 1, 4, 8, 2, 48, 100, 3, (40, 100))
        return cls(plan.mode, plan.repeats)


async def streams(clients: Mapping[str, Client], prompts: Prompts, effort: Effort) -> list[Row]:
    """Tokens/s of many streams at once against one, from the first request to the last token."""
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(effort.repeats):
        for side, client in clients.items():
            for count in (1, effort.streams):
                began = clock()
                replies = await asyncio.gather(
                    *(client.complete(prompts.new(32), effort.answer) for _ in range(count))
                )
                seconds = max(reply.arrived_at[-1] for reply in replies) - began
                rates.setdefault((side, count), []).append(sum(r.tokens for r in replies) / seconds)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    name = f"{effort.streams} streams of {effort.answer} tokens, reference one"
    return [
        Row("streams", f"{side}: {name}", medians[side, effort.streams], medians[side, 1], "tokens/s", ">= 8")
        for side in clients
    ]


async def stall(clients: Mapping[str, Client], prompts: Prompts, effort: Effort) -> list[Row]:
    """p99 between two tokens of running streams, prompts arriving one after the other, against the quiet p99."""
    gaps: dict[tuple[str, bool], list[float]] = {}
    arrived = dict.fromkeys(clients, 0)
    for _ in range(effort.repeats):
        for side, client in clients.items():
            for quiet in (True, False):
                found, count = await _running(client, prompts, effort, quiet)
                gaps.setdefault((side, quiet), []).extend(found)
                arrived[side] += count
    p99 = {key: float(np.percentile(values, 99)) for key, values in gaps.items()}
    return [
        Row(
            "stall",
            f"{side}: {effort.running} streams, {arrived[side]} prompts of {effort.arriving} tokens, reference quiet",
            p99[side, False],
            p99[side, True],
            "ms",
            "<= 3",
        )
        for side in clients
    ]


async def _running(client: Client, prompts: Prompts, effort: Effort, quiet: bool) -> tuple[list[float], int]:
    """Return the times between two tokens (ms) while all streams run, and how many prompts were answered meanwhile."""
    running = asyncio.gather(
        *(client.complete(prompts.new(32), effort.running_answer) for _ in range(effort.running))
    )
    others: list[Reply] = []
    while not quiet and not running.done():
        others.append(await client.complete(prompts.new(effort.arriving), 2))
    replies = await running
    # from when the last has begun until the first has ended
    begin, end = max(r.arrived_at[0] for r in replies), min(r.arrived_at[-1] for r in replies)
    gaps = [(b - a) * 1e3 for r in replies for a, b in pairwise(r.arrived_at) if begin <= a and b <= end]
    if not gaps:
        raise PeerError(f"the {effort.running} streams never ran at the same time; have longer answers")
    return gaps, sum(begin <= other.arrived_at[0] <= end for other in others)


async def _transfer(client: Client, prompts: Prompts, tokens: int) -> dict[str, Any]:
    """Return the transfer, as /state has it, of a new prompt's K and V."""
    reply = await client.complete(prompts.new(tokens), 2)
    found = (await client.transfers()).get(f"{reply.id}-0")
    if found is None:
        raise PeerError(f"request {reply.id} (way {reply.route}) has no transfer in /state")
    return found


async def handover(clients: Mapping[str, Client], prompts: Prompts, effort: Effort) -> list[Row]:
    """The median from the prefill's end to the decode mesh's first step, less the exposed transfer, when idle."""
    client, tokens = clients[PAIR], effort.prompts[0]
    await client.set_mode("pd")
    found = [await _transfer(client, prompts, tokens) for _ in range(effort.handovers)]
    await client.set_mode(effort.mode)
    beyond = statistics.median(each["handover_ms"] - each["exposed_ms"] for each in found)
    exposed = statistics.median(each["exposed_ms"] for each in found)
    name = (
        f"{len(found)} prompts of {tokens} tokens, {exposed:.3g} ms of transfer beside it, reference the goal"
    )
    return [Row("handover", name, beyond, HANDOVER_MS, "ms", "<= 1")]


async def bandwidth(clients: Mapping[str, Client], prompts: Prompts, effort: Effort) -> list[Row]:
    """GB/s of K and V through the endpoint beside `bench kv`: of layers on their way, and of a prompt with its prefill between.

    A layer is on its way from when the prefill rank tells of it until the decode rank has it in its cache.
    """
    client = clients[PAIR]
    layers: dict[int, list[float]] = {tokens: [] for tokens in effort.prompts}
    spans: dict[int, list[float]] = {tokens: [] for tokens in effort.prompts}
    await client.set_mode("pd")
    for _ in range(effort.repeats):
        for tokens in effort.prompts:
            found = await _transfer(client, prompts, tokens)
            under_way = sum(span["arrived_ms"] - span["sent_ms"] for span in found["layers"])
            layers[tokens].append(found["bytes"] / under_way / 1e6)
            spans[tokens].append(found["bytes"] / (found["hidden_ms"] + found["exposed_ms"]) / 1e6)
    await client.set_mode(effort.mode)
    rows = []
    for row in await asyncio.to_thread(_bench_kv, effort):
        tokens = row["tokens"]
        for name, rates, wire in (
            ("layers on their way", layers, row["layer_rate"]),
            ("first layer to last, prefill between", spans, row["rate"]),
        ):
            rate = statistics.median(rates[tokens])
            rows.append(Row("bandwidth", f"{tokens} tokens, {name}", rate, wire / 1e9, "GB/s"))
    return rows


def _bench_kv(effort: Effort) -> list[dict[str, Any]]:
    """Return the rows of `bench kv` for the served model's cache over the served wire."""
    from dataclasses import asdict

    from disagg_tt.bench import kv
    from disagg_tt.config import Options
    from disagg_tt.geometry import Geometry
    from disagg_tt.model.checkpoint import find_checkpoint, load_config

    c = load_config(find_checkpoint(None))
    geometry = Geometry("served", c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim, Options.kv_dtype)
    settings = {
        "geometry": asdict(geometry),
        "seq_lengths": list(effort.prompts),
        "transports": [Options.transport],
        "orders": ["contiguous"],
        "mode": "layer",
        "iterations": effort.repeats,
        "warmup": 1,
    }
    rows, skipped = kv.run(settings)
    if skipped:
        raise PeerError(f"bench kv did not measure {skipped}")
    return rows


Part = Callable[[Mapping[str, "Client"], "Prompts", Effort], Awaitable[list[Row]]]
PARTS: dict[str, Part] = {
    "streams": streams,
    "stall": stall,
    "handover": handover,
    "bandwidth": bandwidth,
}
