"""How long work takes, from how long it took."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement in a Pace
KEEP, FADE = 0.95, 0.99  # of the old ones' weight, when a Line is measured once more, and when it is not
ORIGIN = (
    0.1  # weight of a measurement at (0, 0) that a Line always has: one size alone gives a time in proportion
)


class Pace:
    """The time that one unit of work takes: a guess until it is measured, then an exponentially weighted mean."""

    def __init__(self, guess: float):
        self.each, self.measured = guess, False

    def observe(self, units: float, time: float) -> None:
        """Take note that `units` (more than 0) took `time`, in the unit of `guess`; what no clock could see counts as tiny."""
        each = max(time, 1e-9) / units
        self.each = self.each + WEIGHT * (each - self.each) if self.measured else each
        self.measured = True


class Line:
    """The time that some units of work take together: a fixed part and one in proportion, fitted to the newest measurements.

    Least squares, older measurements weighing exponentially less. Neither part is negative.
    """

    def __init__(self, guess: float):
        """`guess`: the time of one unit, until measured."""
        self._guess = guess
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # weights, units, time, units^2, units * time

    @property
    def measured(self) -> bool:
        return self._sums[0] > 0.5

    def observe(self, units: float, time: float) -> None:
        """Take note that `units` took `time`."""
        old = [KEEP * a for a in self._sums] if self.measured else (0.0,) * 5
        new = (1.0, units, time, units * units, units * time)
        self._sums = tuple(a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]

    def fade(self) -> None:
        """Trust the measurements a little less; after some of this without a new one, they count as none."""
        self._sums = tuple(FADE * a for a in self._sums)  # type: ignore[assignment]

    def __call__(self, units: float) -> float:
        """Return the time that `units` are expected to take."""
        if not self.measured:
            return self._guess * units
        weight, x, y, xx, xy = self._sums
        count = weight + ORIGIN
        covariance, variance = xy * count - x * y, xx * count - x * x
        each = covariance / variance if variance > 0 else 0.0
        fixed = (y - each * x) / count
        if each < 0:
            return y / weight
        return xy / xx * units if fixed < 0 else fixed + each * units
