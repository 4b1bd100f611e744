"""What the router knows of a rank: how fast it is, what it has to do, what it has cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg_tt.blocks import BLOCK
from disagg_tt.serving.pace import Line, Pace


@dataclass(eq=False)
class Worker:
    """A rank that serves; the guesses of its speed hold until it has been measured, at best by its warm-up, before it joins."""

    name: str
    role: str
    slots: int
    blocks: int
    prefill: Line = field(default_factory=lambda: Line(1.0))  # ms for so many tokens
    step: Pace = field(default_factory=lambda: Pace(20.0))  # ms, one decode step
    requests: int = 0  # a decode rank's: those to be answered here, from being routed to their end
    running: int = 0  # of these, those that have a token
    queued: dict[str, int] = field(
        default_factory=dict
    )  # requests to be computed here: how many tokens of each
    _known: OrderedDict[bytes, None] = field(default_factory=OrderedDict, repr=False)

    def cached_tokens(self, hashes: Sequence[bytes]) -> int:
        """Return how many tokens of a prompt with these hashes are taken to be cached here."""
        count = next((i for i, digest in enumerate(hashes) if digest not in self._known), len(hashes))
        return count * BLOCK

    def learn(self, hashes: Sequence[bytes]) -> None:
        """These are cached here now; of a sequence, what is deepest is taken to be evicted first, as blocks.py does."""
        for digest in reversed(hashes):
            self._known[digest] = None
            self._known.move_to_end(digest)
        while len(self._known) > self.blocks:
            self._known.popitem(last=False)

    def unlearn(self, hashes: Sequence[bytes]) -> None:
        """These turn out not to be cached here."""
        for digest in hashes:
            self._known.pop(digest, None)
