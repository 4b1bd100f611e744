"""What a request's way to its decode rank cost, told to the hub when it has arrived."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from disagg_tt.serving.inlet import Arrived
from disagg_tt.serving.protocol import Landed

MOST_LAYERS = 4096  # of which the times are told


@dataclass
class Journey:
    """What a decode rank knows of a request besides its sequence: when it came, and what its transfer cost so far (ms, bytes).

    started_at: when the rank was told to compute it, s; computed_s: how long it has computed, s. prefill: the start and end of the prefill rank's work, layers: each layer's sending and arrival, s of this rank's clock.
    """

    number: int
    id: str
    came_at: float
    started_at: float = 0.0
    computed_s: float = 0.0
    source: str = ""
    tokens: int = 0
    bytes: int = 0
    hidden_ms: float = 0.0
    exposed_ms: float = 0.0
    prefill: tuple[float, float] = (0.0, 0.0)
    layers: list[tuple[float, float]] = field(default_factory=list)

    def add(self, arrived: Arrived, source: str) -> None:
        """One more chunk has come, from the prefill worker `source`."""
        self.source = source
        began, computed = arrived.prefill
        self.prefill = (self.prefill[0] or began, computed)
        self.layers += arrived.layers
        self.tokens += arrived.tokens
        self.bytes += arrived.bytes
        self.hidden_ms += arrived.hidden_ms
        self.exposed_ms += arrived.exposed_ms

    def landed(self) -> Landed:
        """Return the message that says so, when the request's first decode step begins: its handover ends now."""
        began, computed = self.prefill
        return Landed(
            number=self.number,
            id=self.id,
            source=self.source,
            tokens=self.tokens,
            bytes=self.bytes,
            hidden_ms=self.hidden_ms,
            exposed_ms=self.exposed_ms,
            prefill_ms=max(0.0, (computed - began) * 1e3),
            layers=[((sent - began) * 1e3, (at - began) * 1e3) for sent, at in self.layers[:MOST_LAYERS]],
            handover_ms=max(0.0, (time.monotonic() - computed) * 1e3),
        )
