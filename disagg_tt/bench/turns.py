"""What `bench multi-turn` makes of its turns: tables, comparisons, bytes against their formula, and a plot."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_tt.bench.table import Row
from disagg_tt.blocks import BLOCK
from disagg_tt.errors import DisaggError

if TYPE_CHECKING:
    from disagg_tt.bench.multi_turn import Turn

    Repeats = Sequence[Sequence[Turn]]  # of one way: its turns, by repeat

RESAMPLES = 2000
LONG_HISTORY = 1000  # tokens, from which on the goals hold


def interval(statistic: Callable[[Sequence[int]], float], count: int, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap's 95% interval of a statistic of `count` repeats, which gets the numbers of those drawn."""
    generator = random.Random(seed)
    drawn = sorted(statistic(generator.choices(range(count), k=count)) for _ in range(RESAMPLES))
    return drawn[int(0.025 * RESAMPLES)], drawn[int(0.975 * RESAMPLES)]


def _with_interval(values: Sequence[float]) -> str:
    low, high = interval(lambda drawn: statistics.median(values[i] for i in drawn), len(values))
    return f"{statistics.median(values):,.1f} [{low:,.1f}, {high:,.1f}]"


def totals(repeats: Repeats) -> list[float]:
    """Return how long each repeat's conversation took, ms: its turns' latencies."""
    return [sum(turn.latency_ms for turn in turns) for turns in repeats]


def later_ttft(repeats: Repeats) -> float:
    """Return the median time to the first token of turn 2 and later, ms."""
    return statistics.median(turn.ttft_ms for turns in repeats for turn in turns[1:])


# ---------------------------------------------------------------- tables


def by_turn(found: Mapping[str, Repeats]) -> str:
    """Return tables of latency, first token, bytes and cache hits: a line a turn, a column a way."""
    ways = list(found)
    first = next(iter(found.values()))

    def table(
        title: str, cell: Callable[[Sequence[Turn]], str], total: Callable[[Repeats], str] | None = None
    ) -> str:
        lines = [[title, "prompt tokens", *ways]]
        for number, turn in enumerate(first[0]):
            cells = [cell([turns[number] for turns in found[way]]) for way in ways]
            lines.append([f"turn {number + 1}", f"{turn.prompt_tokens:,}", *cells])
        if total is not None:
            lines.append(["total", "", *(total(found[way]) for way in ways)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(t.rjust(w) for t, w in zip(line, widths, strict=True)) for line in lines)

    return "\n\n".join(
        (
            table(
                "latency ms, median [95%]",
                lambda turns: _with_interval([turn.latency_ms for turn in turns]),
                lambda repeats: _with_interval(totals(repeats)),
            ),
            table("first token ms", lambda turns: _with_interval([turn.ttft_ms for turn in turns])),
            table(
                "KB to the decode mesh",
                lambda turns: f"{statistics.median(turn.bytes for turn in turns) / 1e3:,.1f}",
                lambda repeats: (
                    f"{statistics.median(sum(t.bytes for t in turns) for turns in repeats) / 1e3:,.1f}"
                ),
            ),
            table(
                "cache hits: local, external",
                lambda turns: _hits(turns),
                lambda repeats: _hits([turn for turns in repeats for turn in turns]),
            ),
            table("way", lambda turns: _routes(turns)),
        )
    )


def _hits(turns: Sequence[Turn]) -> str:
    """The shares of the prompts' tokens that the decode mesh had, and that came from the prefill mesh."""
    tokens = sum(turn.prompt_tokens for turn in turns)
    local, external = (
        sum(turn.sources[source] for turn in turns) / tokens
        for source in ("local_cache_hit", "external_kv_transfer")
    )
    return f"{local:.1%}, {external:.1%}"


def _routes(turns: Sequence[Turn]) -> str:
    return ", ".join(f"{n} {route}" for route, n in Counter(r for t in turns for r in t.routes).items())


# ---------------------------------------------------------------- comparisons


def comparisons(found: Mapping[str, Repeats], seed: int = 0) -> list[Row]:
    """Return each way against pd-full and pd, and auto against the better of pd and ppd. Goals hold from 1,000 tokens on."""
    first = next(iter(found.values()))[0]
    long = len(first) > 1 and first[0].prompt_tokens / len(first[0].routes) >= LONG_HISTORY
    rows = []
    for reference in ("pd-full", "pd"):
        others = [way for way in found if way != reference and way != "pd-full"]
        for way in others if reference in found else ():
            goal = long and (way, reference) == ("ppd", "pd-full")
            if len(first) > 1:
                ttft = later_ttft(found[way]), later_ttft(found[reference])
                rows.append(
                    Row("first token, turn 2+", f"{way}, reference {reference}", *ttft, "ms", "<= 0.4" * goal)
                )
            total = statistics.median(totals(found[way])), statistics.median(totals(found[reference]))
            rows.append(Row("conversation", f"{way}, reference {reference}", *total, "ms", "<= 0.667" * goal))
    if {"pd", "ppd", "auto"} <= set(found):
        rows.append(_auto(found, seed))
    return sorted(rows, key=lambda row: row.stage, reverse=True)


def _auto(found: Mapping[str, Repeats], seed: int) -> Row:
    times = {way: totals(found[way]) for way in ("pd", "ppd", "auto")}

    def medians(drawn: Sequence[int]) -> tuple[float, float]:
        pd, ppd, auto = (statistics.median(times[way][i] for i in drawn) for way in ("pd", "ppd", "auto"))
        return auto, min(pd, ppd)

    count = len(times["auto"])
    low, high = interval(lambda drawn: medians(drawn)[0] / medians(drawn)[1], count, seed)
    name = f"auto, reference the better of pd and ppd; ratio's 95%: {low:.3f} to {high:.3f}"
    return Row("conversation", name, *medians(range(count)), "ms", "<= 1.05")


def bytes_of_growth(growth: Mapping[str, Sequence[Turn]]) -> list[Row]:
    """Return what turns of 100 tokens moved, whole and new blocks alone, against the formula: required to be equal."""
    from disagg_tt.bench.jobs import binding
    from disagg_tt.bench.measure import expected_bytes
    from disagg_tt.config import Options
    from disagg_tt.model.checkpoint import find_checkpoint, load_config
    from disagg_tt.serving.prefill_rank import CHUNK

    config = load_config(find_checkpoint(None))
    (rows, columns), *_ = binding().mesh_shapes.values()

    def formula(tokens: int) -> int:
        """A prompt's bytes: it travels in chunks, each with its metadata."""
        counts = [min(CHUNK, tokens - first) for first in range(0, tokens, CHUNK)]
        return sum(expected_bytes(config, Options.kv_dtype, count, rows * columns) for count in counts)

    found = []
    for way, turns in growth.items():
        moved = [turn.sources["external_kv_transfer"] for turn in turns]
        blocks = sum(-(-tokens // BLOCK) for tokens in moved)
        stage = f"{len(turns)} turns of 100 tokens"
        name = f"{way}: {sum(moved):,} tokens, {blocks * BLOCK:,} in whole blocks"
        expected = sum(map(formula, moved))
        found.append(Row(stage, name, sum(t.bytes for t in turns), expected, "bytes", "== 1", required=True))
        # the first prompt, and after it what the blocks that the one before filled do not have
        prompts = [turn.prompt_tokens for turn in turns]
        most = sum(prompts)
        if way == "pd":
            most -= sum(before // BLOCK * BLOCK for before in prompts[:-1])
        found.append(Row(stage, f"{way}: tokens, at most", sum(moved), most, "tokens", "<= 1", required=True))
    if found:
        whole, new = (sum(turn.bytes for turn in growth[way]) for way in ("pd-full", "pd"))
        found.append(Row(stage, "new blocks alone, reference all", new, whole, "bytes"))
    return found


def plot(found: Mapping[str, Repeats], path: Path) -> None:
    """Draw each way's latency and time to the first token over the turns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5))
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(
        panels, ("latency_ms", "ttft_ms"), ("latency, ms", "first token, ms"), strict=True
    ):
        for way, repeats in found.items():
            by_number = list(zip(*repeats, strict=True))
            medians = [statistics.median(getattr(turn, name) for turn in turns) for turns in by_number]
            axes.plot(range(1, len(medians) + 1), medians, marker="o", label=way)
        axes.set(xlabel="turn", ylabel=title, ylim=(0, None), xticks=range(1, len(by_number) + 1))
    panels[0].legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DisaggError(f"--plot {path}: {error}") from None
