"""The Backend of generation.py over the workers of a hub: generations in flight, and what their workers say of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import OverloadError
from disagg_tt.serving.flight import Flight, LostError
from disagg_tt.serving.generation import Generation, LayerSpan, State, TransferState, WorkerState
from disagg_tt.serving.hub import Hub, Worker
from disagg_tt.serving.protocol import Landed, Message, Tokens
from disagg_tt.serving.ranks import Worker as RoutedWorker
from disagg_tt.serving.router import Router
from disagg_tt.serving.trace import Trace

SHOWN_TRANSFERS = 8


class Frontend:
    """The Backend of generation.py over the workers of a hub."""

    def __init__(self, hub: Hub, router: Router, *, deadline_s: float = 60.0):
        """`deadline_s`: how long a generation may give no sign of life once it has its first token."""
        self.hub, self.router, self.deadline_s = hub, router, deadline_s
        self.flights: dict[int, Flight] = {}
        self.waiting_for_ranks: set[Flight] = set()  # to begin anew
        self.numbers = itertools.count(1)
        self.joined = asyncio.Event()  # set anew whenever a worker joins
        self.transfers: deque[tuple[float, TransferState]] = deque(maxlen=SHOWN_TRANSFERS)
        self.on_transfer: Callable[[TransferState], None] = lambda transfer: None
        self.traced = Trace()
        self.roles_seen: set[str] = set()
        self.stopping = False
        hub.on_message, hub.on_join, hub.on_lost = self._on_message, self._on_join, self._on_lost

    @property
    def mode(self) -> str:
        return self.router.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.router.mode = mode

    def generate(self, wanted: Generation) -> Flight:
        """Begin `wanted`; raises OverloadError when it cannot even wait."""
        if self.stopping:
            raise self.ending()
        self.router.admission()
        return Flight(self, wanted)

    def stop(self) -> None:
        """End every generation, and begin no other."""
        self.stopping = True
        self.joined.set()
        for flight in self.flights.values():
            flight.inbox.put_nowait(self.ending())

    @staticmethod
    def ending() -> OverloadError:
        """Return what a generation is told when the server stops."""
        return OverloadError("the server stops", retry_after_s=10.0, unavailable=True)

    def _on_message(self, name: str, message: Message) -> None:
        if isinstance(message, Landed):
            self._note_landed(name, message)
        if isinstance(message, Tokens):
            if worker := self.router.workers.get(name):
                worker.step.observe(1, message.step_ms)
            for item in message.items:
                if flight := self.flights.get(item.number):
                    flight.inbox.put_nowait(item)
        elif flight := self.flights.get(getattr(message, "number", -1)):
            flight.inbox.put_nowait(message)

    def _note_landed(self, decode: str, landed: Landed) -> None:
        """Account for a transfer. An answer of one token was whole, and its flight over, before."""
        self.router.transfer.observe(landed.tokens, landed.hidden_ms + landed.exposed_ms)
        self.router.handover.observe(1, max(0.0, landed.handover_ms - landed.exposed_ms))
        transfer = TransferState(
            request=landed.id,
            source=landed.source,
            target=decode,
            age_ms=0.0,
            prefill_ms=landed.prefill_ms,
            layers=[LayerSpan(sent_ms=sent, arrived_ms=arrived) for sent, arrived in landed.layers],
            tokens=landed.tokens,
            bytes=landed.bytes,
            hidden_ms=landed.hidden_ms,
            exposed_ms=landed.exposed_ms,
            handover_ms=landed.handover_ms,
        )
        began = time.monotonic() - (landed.prefill_ms + landed.handover_ms) / 1e3
        self.transfers.append((began, transfer))
        self.traced.add_transfer(landed.number, began, transfer)
        self.on_transfer(transfer)

    def _on_join(self, worker: Worker) -> None:
        about = worker.about
        routed = RoutedWorker(about.name, about.role, about.slots, about.blocks)
        for tokens, ms in about.prefill_ms:
            routed.prefill.observe(tokens, ms)
        if about.step_ms:
            routed.step.observe(1, about.step_ms)
        self.router.join(routed)
        self.roles_seen.add(about.role)
        self.joined.set()
        self.joined = asyncio.Event()

    def _on_lost(self, name: str, reason: str) -> None:
        needed = set(self.router.lost(name))
        for number, flight in list(self.flights.items()):
            if str(number) in needed or flight.needs(name):
                flight.inbox.put_nowait(LostError(f"worker {name} is lost: {reason}"))

    def health(self) -> dict[str, Any]:
        """Return the status, and the workers by role. Degraded: a role that was there is not."""
        count = {role: len(self.hub.of_role(role)) for role in (PREFILL, DECODE)}
        if not count[DECODE]:
            status = "unavailable"
        else:
            status = "ok" if all(count[role] for role in self.roles_seen) else "degraded"
        return {"status": status, "workers": count, "mode": self.mode, "in_flight": len(self._all())}

    def _all(self) -> list[Flight]:
        return [*self.flights.values(), *self.waiting_for_ranks]

    def state(self) -> State:
        """Return what the page shows."""
        now = time.monotonic()
        transfers = []
        for began, transfer in reversed(self.transfers):
            transfers.append(TransferState(**{**transfer, "age_ms": (now - began) * 1e3}))
        return State(
            mode=self.mode,
            workers=[_shown(worker) for worker in self.hub.workers.values()],
            requests=[flight.shown(now) for flight in self._all()],
            transfers=transfers,
        )

    def trace(self) -> dict[str, Any]:
        """Return the last requests as a timeline (trace.py)."""
        return self.traced.events()

    def conversations(self) -> list[dict[str, Any]]:
        """Return what the router knows of conversations, the last used first."""
        return [vars(conversation) for conversation in self.router.conversations.newest_first()]

    def clear_conversations(self) -> int:
        """Forget them; return how many there were."""
        return self.router.conversations.clear()


def _shown(worker: Worker) -> WorkerState:
    about, state = worker.about, worker.state
    decodes = about.role == DECODE
    return WorkerState(
        name=about.name,
        role=about.role,
        status="idle" if state.doing in ("", "idle") else "busy",
        running=state.in_flight,
        waiting=state.waiting,
        slots_used=state.in_flight if decodes else 0,
        slots_total=about.slots if decodes else 0,
        blocks_used=state.blocks_in_use,
        blocks_cached=state.blocks_cached,
        blocks_total=about.blocks,
    )
