"""How long work takes, from how long it took."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement


class Pace:
    """The time that one unit of work takes: a guess until it is measured, then an exponentially weighted mean."""

    def __init__(self, guess: float):
        self.each, self.measured = guess, False

    def observe(self, units: float, time: float) -> None:
        """Take note that `units` (more than 0) took `time`, in the unit of `guess`; what no clock could see counts as tiny."""
        each = max(time, 1e-9) / units
        self.each = self.each + WEIGHT * (each - self.each) if self.measured else each
        self.measured = True
