"""`disagg-tt bench stages --transport NAME...`: where a request's time goes, by transport, against one mesh.

    total = prefill + exposed + decode                 what the request takes; hidden transfer costs nothing here
    overhead = (total - total on one mesh) / total     what disaggregating costs, in % of the total; below 0 it gains

The single mesh is measured in turn with the transports, or read from a file that an earlier run's --json wrote.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from disagg_tt.bench.jobs import Job, Place, prompts_of
from disagg_tt.bench.measure import Plan
from disagg_tt.errors import InputError
from disagg_tt.prompt import Tokenizer

BASELINE = "single mesh"
HEADINGS = (
    "transport", "tokens", "prefill ms", "transfer ms", "hidden ms", "exposed ms", "decode ms", "total ms", "one mesh ms",
    "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """One request of `tokens` prompt tokens and `new_tokens` new ones over `transport`; medians, in ms."""

    transport: str
    tokens: int
    new_tokens: int
    prefill_ms: float
    transfer_ms: float
    hidden_ms: float
    exposed_ms: float
    decode_ms: float

    @property
    def total_ms(self) -> float:
        return self.prefill_ms + self.exposed_ms + self.decode_ms

    def overhead(self, baseline: Times) -> float:
        """Return what this takes more than `baseline`, in % of this total."""
        return (self.total_ms - baseline.total_ms) / self.total_ms * 100


def measure(transports: Sequence[str], plan: Plan, with_baseline: bool) -> list[Times]:
    """Measure a request of each of the plan's lengths, one at a time, over each transport and perhaps on one mesh, in turn.

    As many threads a process everywhere: half of the plan's, since both ranks share this machine.
    """
    tokenizer = Tokenizer(plan.model)
    lengths = [plan.overlap[0], *plan.overlap]  # the first one warms up
    prompts = [prompts_of(tokenizer, n)[0] for n in lengths]
    two = plan.place(max(plan.threads // 2, 1))
    places = {name: replace(two, flags=(*two.flags, "--transport", name)) for name in transports}
    if with_baseline:
        places = {BASELINE: replace(two, single_mesh=True), **places}
    jobs: dict[str, list[Job]] = {name: [] for name in places}
    for _ in range(plan.repeats):
        for name, done in jobs.items():
            done.append(_run(places[name], prompts, plan.new_tokens))
    return [
        _median(name, [job.answers[number]["perf"] for job in done])
        for number in range(1, len(lengths))
        for name, done in jobs.items()
    ]


def _run(place: Place, prompts: Sequence[str], new_tokens: int) -> Job:
    return place.run(prompts, "--max-new-tokens", str(new_tokens), "--batch", "1")


def _median(transport: str, perfs: Sequence[dict[str, Any]]) -> Times:
    """Return the medians of one request's perf logs; one mesh transfers nothing."""

    def median(key: str) -> float:
        return statistics.median(perf.get(key, 0.0) for perf in perfs)

    decode = statistics.median(p["decode_steps"] / p["decode_tokens_per_s"] * 1e3 for p in perfs)
    parts = {f"{part}_ms": median(f"{part}_ms") for part in ("prefill", "transfer", "hidden", "exposed")}
    return Times(transport, perfs[0]["prompt_tokens"], perfs[0]["new_tokens"], decode_ms=decode, **parts)


def read_baseline(file: Path, plan: Plan) -> list[Times]:
    """Return the single mesh's times for the plan's requests from an earlier run's JSON; raises InputError."""
    try:
        found = [Times(**_times_of(row)) for row in json.loads(file.read_text())["requests"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--baseline {file} cannot be used: {error!r}; give a file that bench stages --transport NAME --json wrote"
        ) from None
    ours = [t for t in found if t.transport == BASELINE and t.new_tokens == plan.new_tokens]
    missing = sorted(set(plan.overlap) - {t.tokens for t in ours})
    if missing:
        raise InputError(
            f"--baseline {file} has no {BASELINE} for {missing} prompt tokens and {plan.new_tokens} new ones; measure it again"
        )
    return [t for t in ours if t.tokens in plan.overlap]


def _times_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in Times.__dataclass_fields__}


def rows(times: Sequence[Times]) -> list[dict[str, Any]]:
    """Return the times with total and overhead, as JSON takes them; the baseline is among `times`."""
    baselines = {t.tokens: t for t in times if t.transport == BASELINE}
    return [
        {
            **asdict(t),
            "total_ms": t.total_ms,
            "baseline_ms": baselines[t.tokens].total_ms,
            "overhead_percent": t.overhead(baselines[t.tokens]),
        }
        for t in times
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned text."""
    parts = ("prefill", "transfer", "hidden", "exposed", "decode", "total", "baseline")
    lines = [HEADINGS]
    for row in found:
        times = [f"{row[f'{part}_ms']:.2f}" for part in parts]
        lines.append((row["transport"], str(row["tokens"]), *times, f"{row['overhead_percent']:+.1f} %"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(t.rjust(w) for t, w in zip(line, widths, strict=True)) for line in lines)
