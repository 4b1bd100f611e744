"""What `bench serving` makes of a load's replies: percentiles, throughput and goodput, as a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from disagg_tt.errors import DisaggError

if TYPE_CHECKING:
    from disagg_tt.bench.load import Reply

NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
FIGURES = ("mean", "median", "p99")


def times(replies: Sequence[Reply]) -> dict[str, list[float]]:
    """Return all times of the replies, ms, by metric."""
    return {
        "ttft": [reply.ttft_ms for reply in replies],
        "tpot": [reply.tpot_ms for reply in replies if reply.tpot_ms is not None],
        "itl": [each for reply in replies for each in reply.itl_ms],
        "e2el": [reply.e2el_ms for reply in replies],
    }


def summary(repeats: Sequence[Mapping[str, Any]], goals: Mapping[str, float]) -> dict[str, Any]:
    """Return one side's figures: percentiles over all repeats' requests, ms; medians of the repeats' rates, 1/s.

    budget_ms: what the servers say that the mean time to the first token went to, by part.
    goodput: requests/s that kept every limit of `goals` (ms), None without goals.
    """
    replies = [reply for repeat in repeats for reply in repeat["replies"]]
    found: dict[str, Any] = {
        "completed": len(replies),
        "failed": sum(len(repeat["failed"]) for repeat in repeats),
        "failures": sorted({why for repeat in repeats for why in repeat["failed"]})[:5],
    }

    def rate(count: Any) -> float:
        return statistics.median(sum(map(count, r["replies"])) / r["seconds"] for r in repeats)

    found["requests_per_s"] = rate(lambda reply: 1)
    found["output_tokens_per_s"] = rate(lambda reply: reply.tokens)
    found["total_tokens_per_s"] = rate(lambda reply: reply.tokens + reply.prompt_tokens)
    found["goodput"] = rate(lambda reply: _within(reply, goals)) if goals else None
    for name, values in times(replies).items():
        if values:
            figures = np.mean(values), np.median(values), np.percentile(values, 99)
            found[name] = dict(zip(FIGURES, map(float, figures), strict=True))
    found["budget_ms"] = {
        part: statistics.mean(reply.budget_ms[part] for reply in replies)
        for part in (replies[0].budget_ms if replies else ())
    }
    return found


def _within(reply: Reply, goals: Mapping[str, float]) -> bool:
    return all((getattr(reply, f"{name}_ms") or 0.0) <= limit for name, limit in goals.items())


def table(summaries: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Return the sides beside each other; a ratio is the first's to the second's."""
    sides = list(summaries)
    lines = [["load", *sides, *(["ratio"] if len(sides) == 2 else [])]]

    def add(name: str, values: Sequence[float], digits: str = ",.1f") -> None:
        ratio = [f"{values[0] / values[1]:.3f}" if values[1] else ""] if len(values) == 2 else []
        lines.append([name, *(format(value, digits) for value in values), *ratio])

    for key, name in (("completed", "requests completed"), ("failed", "requests failed")):
        add(name, [each[key] for each in summaries.values()], ",d")
    for key, name in (
        ("requests_per_s", "requests/s"),
        ("output_tokens_per_s", "output tokens/s"),
        ("total_tokens_per_s", "prompt and output tokens/s"),
        ("goodput", "requests/s within the goals"),
    ):
        if all(each[key] is not None for each in summaries.values()):
            add(name, [each[key] for each in summaries.values()], ",.2f")
    for metric in metrics:
        for figure in FIGURES:
            if all(metric in each for each in summaries.values()):
                add(f"{figure} {NAMES[metric]}, ms", [each[metric][figure] for each in summaries.values()])
    for part in next(iter(summaries.values()))["budget_ms"] if "ttft" in metrics else ():
        add(
            f"  of the mean first token: {part}, ms",
            [each["budget_ms"].get(part, 0.0) for each in summaries.values()],
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def plot(load: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw how large a share of requests, or of pairs of tokens, was within a time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5))
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("ttft", "itl"), strict=True):
        for side, repeats in load.items():
            values = sorted(times([reply for repeat in repeats for reply in repeat["replies"]])[metric])
            axes.plot(values, np.linspace(0, 1, len(values)), label=side)
        axes.set(xlabel=f"{NAMES[metric]}, ms", ylabel="share within", xlim=(0, None))
    panels[0].legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DisaggError(f"--plot {path}: {error}") from None
