"""What a person sees: the answer's text as it comes, progress bars on a terminal, the perf log at the end."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from disagg_tt.perf import perf_json, perf_text

Event = dict[str, Any]


class Terminal:
    """Shows a run's events: answers on stdout, everything else on stderr.

    One prompt's text streams as it is decoded; several prompts' texts are shown one after the other when complete.
    Both ranks tell of the first token: it is shown when the first of them does, once.
    """

    def __init__(self, prompts: int, *, as_json: bool, trace: str | None, out: TextIO = sys.stdout):
        self._streams, self._json, self._trace, self._out = prompts == 1 and not as_json, as_json, trace, out
        self._bars: dict[str, Any] = {}
        self._trace_events: list[Any] = []
        self._first_shown: set[int] = set()
        self.answers: list[dict[str, Any]] = []
        self.failure: Event | None = None

    def handle(self, event: Event) -> None:
        """Show one event of a rank."""
        name = event["event"]
        if name == "progress":
            self._progress(event)
        elif name in ("first_token", "token"):
            self._text(event)
        elif name == "answers":
            self.answers += event["answers"]
        elif name == "trace":
            self._trace_events += event["events"]
        elif name == "failed" and self.failure is None:
            self.failure = event

    def _progress(self, event: Event) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        what = event["what"]
        if what not in self._bars:
            self._bars[what] = tqdm(total=event["total"], desc=what, leave=False, file=sys.stderr)
        bar = self._bars[what]
        bar.update(event["done"] - bar.n)
        if bar.n >= event["total"]:
            bar.close()

    def _text(self, event: Event) -> None:
        if not self._streams:
            return
        if event["event"] == "first_token" or event["first"]:  # whichever comes first: two ranks tell of it
            if event["request"] in self._first_shown:
                return
            self._first_shown.add(event["request"])
        self._out.write(event["text"])
        self._out.flush()

    def close(self) -> None:
        """Show what comes at the end: the texts not yet shown, the perf log as text and as JSON, and the trace file."""
        for bar in self._bars.values():
            bar.close()
        if self._streams and self.answers:
            self._out.write("\n")
        for answer in self.answers:
            if self._json:
                self._out.write(json.dumps(answer) + "\n")
            elif not self._streams:
                self._out.write(f"[{answer['request']}] {answer['text']}\n")
        self._out.flush()
        if not self._json:
            for answer in self.answers:
                log_perf(answer)
        if self._trace and self._trace_events:
            with open(self._trace, "w", encoding="utf-8") as file:
                json.dump({"traceEvents": self._trace_events}, file)


def log_perf(answer: dict[str, Any]) -> None:
    """Write one answer's perf log to stderr, as text and as one JSON line."""
    print(perf_text(answer["perf"], f"request {answer['request']}:"), file=sys.stderr)
    print(perf_json(answer["perf"]), file=sys.stderr)
