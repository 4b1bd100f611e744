"""The last requests as a timeline that Perfetto (ui.perfetto.dev) opens: each one's time budget, transfer and decoding."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Any

from disagg_tt.serving.generation import Account, TransferState

REQUESTS, TRANSFERS = 0, 1  # the trace's processes; a request has a lane of its own in each
MOST_REQUESTS = 256
_NAMES = {REQUESTS: "requests", TRANSFERS: "K and V on their way"}


class Trace:
    """The events of the last requests, as Chrome's trace format has them: microseconds of time.monotonic()."""

    def __init__(self) -> None:
        self._requests: deque[list[dict[str, Any]]] = deque(maxlen=MOST_REQUESTS)
        self._transfers: deque[list[dict[str, Any]]] = deque(maxlen=MOST_REQUESTS)

    def add(
        self,
        number: int,
        id: str,
        account: Account,
        tokens: int,
        arrived_at: float,
        ended_at: float,
    ) -> None:
        """Note a request that came at `arrived_at` and had all `tokens` at `ended_at`, s of time.monotonic().

        The parts of the time budget follow one another and end with the first token.
        """
        about = {"id": id, "route": account.route, "reason": account.reason, "prompt_tokens": account.prompt_tokens,
                 "cached_tokens": account.cached_tokens, "restarts": account.restarts}  # fmt: skip
        events, at = [_name("thread_name", REQUESTS, number, id)], arrived_at * 1e6
        for name, ms in account.budget_ms.items():
            events.append(_span(name, REQUESTS, number, at, ms, about))
            at += max(ms, 0.0) * 1e3
        events.append(
            _span("decode", REQUESTS, number, at, ended_at * 1e3 - at / 1e3, {"new_tokens": tokens})
        )
        self._requests.append(events)

    def add_transfer(self, number: int, began: float, transfer: TransferState) -> None:
        """Note the transfer of request `number`, whose prefill `began` then, s of time.monotonic()."""
        events = [_name("thread_name", TRANSFERS, number, f"{transfer['source']} to {transfer['target']}")]
        for layer, span in enumerate(transfer["layers"]):
            at, ms = (began * 1e3 + span["sent_ms"]) * 1e3, span["arrived_ms"] - span["sent_ms"]
            events.append(_span(f"layer {layer}", TRANSFERS, number, at, ms, {}))
        self._transfers.append(events)

    def events(self) -> dict[str, Any]:
        """Return the whole trace."""
        processes = [_name("process_name", process, 0, name) for process, name in _NAMES.items()]
        return {"traceEvents": [*processes, *chain(*self._requests, *self._transfers)]}


def _name(kind: str, process: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": lane, "args": {"name": name}}


def _span(
    name: str, process: int, lane: int, at_us: float, ms: float, about: dict[str, Any]
) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": process, "tid": lane, "ts": at_us, "dur": max(ms, 0.0) * 1e3, "args": about}  # fmt: skip
