"""Measuring: one timeline a rank, the perf log of a request, and the trace that Perfetto opens.

All times are seconds of time.monotonic() on the rank that took them; `offset` carries the other rank's clock to it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timeline:
    """Named spans of one rank, for the trace."""

    role: str
    spans: list[tuple[str, float, float, dict[str, Any]]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Record the time that the block takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((name, start, time.monotonic(), details))

    def add(self, name: str, start: float, end: float, **details: Any) -> None:
        self.spans.append((name, start, end, details))

    def trace_events(self, offset: float = 0.0) -> list[dict[str, Any]]:
        """Return Chrome trace events (microseconds), with `offset` seconds added to bring them to a common clock."""
        process = 0 if self.role == "prefill" else 1
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": self.role}}
        ]
        for name, start, end, details in self.spans:
            at = (start + offset) * 1e6
            lane = 1 if name.startswith(("send", "receive", "arrive")) else 0
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "pid": process,
                    "tid": lane,
                    "ts": at,
                    "dur": (end - start) * 1e6,
                    "args": details,
                }
            )
        return events


def transfer_times(first_send: float, last_arrival: float, computed: float) -> dict[str, float]:
    """Split a transfer, all times on one clock in s, into ms exposed (after the prefill's computation) and hidden."""
    total = max(last_arrival - first_send, 0.0)
    exposed = min(max(last_arrival - computed, 0.0), total)
    return {"transfer_ms": total * 1e3, "exposed_ms": exposed * 1e3, "hidden_ms": (total - exposed) * 1e3}


def decode_times(steps: list[float], batch: int) -> dict[str, float]:
    """Return tokens/s and ms/token (p50, p99) of decode steps given in seconds, each of which gave `batch` tokens."""
    if not steps:
        return {"decode_steps": 0}
    ordered = sorted(steps)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {
        "decode_steps": len(steps),
        "decode_tokens_per_s": batch * len(steps) / sum(steps),
        "ms_per_token_p50": statistics.median(steps) * 1e3,
        "ms_per_token_p99": p99 * 1e3,
    }


_LABELS = (
    ("prompt_tokens", "prompt tokens", "{:.0f}"),
    ("prefill_ms", "prefill", "{:.1f} ms"),
    ("kv_bytes", "K/V and metadata on the wire", "{:,.0f} B"),
    ("transfer_ms", "transfer", "{:.1f} ms"),
    ("hidden_ms", "  hidden behind the prefill", "{:.1f} ms"),
    ("exposed_ms", "  exposed", "{:.1f} ms"),
    ("receive_wait_ms", "receive: waiting for the prefill", "{:.1f} ms"),
    ("receive_ms", "receive: first layer to last", "{:.1f} ms"),
    ("ttft_ms", "time to first token", "{:.1f} ms"),
    ("new_tokens", "new tokens", "{:.0f}"),
    ("decode_tokens_per_s", "decode", "{:.1f} tokens/s"),
    ("ms_per_token_p50", "  a token, p50", "{:.2f} ms"),
    ("ms_per_token_p99", "  a token, p99", "{:.2f} ms"),
)


def perf_text(perf: dict[str, Any], title: str) -> str:
    """Return the perf log of one request as aligned lines, and the layers' times if they are in it."""
    lines = [title]
    for key, label, form in _LABELS:
        if perf.get(key) is not None:
            lines.append(f"  {label:34s} {form.format(perf[key])}")
    for layer, (sent, arrived) in enumerate(perf.get("layers", [])):
        lines.append(
            f"    layer {layer:3d}: computed and told of at {sent:8.2f} ms, arrived at {arrived:8.2f} ms"
        )
    return "\n".join(lines)


def perf_json(perf: dict[str, Any]) -> str:
    """Return the same as one JSON line."""
    return json.dumps(
        {k: round(v, 4) if isinstance(v, float) else v for k, v in perf.items()}, sort_keys=True
    )
