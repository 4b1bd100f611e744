"""Times of work are learnt from measurements: the fixed part and the part in proportion, the newest first."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from disagg_tt.serving.pace import Line, Pace


def test_a_guess_holds_until_the_first_measurement():
    pace, line = Pace(5.0), Line(2.0)
    assert (pace.each, line(10)) == (5.0, 20.0)
    pace.observe(4, 2.0)
    line.observe(100, 30.0)
    assert pace.each == 0.5 and line(100) == pytest.approx(30.0) and line(50) == pytest.approx(15.0)


def test_a_pace_follows_what_changes():
    pace = Pace(1.0)
    pace.observe(1, 1.0)
    for _ in range(30):
        pace.observe(1, 3.0)
    assert pace.each == pytest.approx(3.0, rel=0.01)


def test_a_line_finds_the_fixed_part():
    line = Line(1.0)
    for units in [32, 64, 500, 100, 1000, 32, 250] * 3:
        line.observe(units, 40 + 0.3 * units)
    assert line(32) == pytest.approx(49.6, rel=0.05) and line(2000) == pytest.approx(640, rel=0.05)


def test_a_line_follows_what_changes():
    line = Line(1.0)
    for each in (5.0, 1.0):
        for _ in range(60):
            for units in (50, 500):
                line.observe(units, each * units)
    assert line(100) == pytest.approx(100, rel=0.05)


def test_a_line_that_is_not_measured_again_is_a_guess_again():
    line = Line(1.0)
    line.observe(10, 1000.0)
    for _ in range(80):
        line.fade()
    assert not line.measured and line(10) == 10.0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 4000), st.floats(0, 1e5)), min_size=1, max_size=30))
def test_more_work_never_takes_less_time_and_none_takes_none_or_more(seen):
    line = Line(1.0)
    for units, time in seen:
        line.observe(units, time)
    times = [line(units) for units in (0, 1, 10, 100, 1000, 5000)]
    assert times[0] >= 0 and all(b >= a * (1 - 1e-9) for a, b in zip(times, times[1:], strict=False))
