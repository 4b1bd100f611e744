"""What a person sees of two ranks' events, in whatever order they come."""

from __future__ import annotations

import io
from itertools import permutations

import pytest

from disagg_tt.terminal import Terminal

FIRST = {"event": "first_token", "request": 0, "text": "Li"}
COPY = {"event": "token", "request": 0, "text": "Li", "first": True}
NEXT = {"event": "token", "request": 0, "text": "ma", "first": False}


@pytest.mark.parametrize(
    "order", [p for p in permutations([FIRST, COPY, NEXT]) if p.index(COPY) < p.index(NEXT)]
)
def test_the_first_token_of_which_both_ranks_tell_is_shown_once_and_first(order):
    out = io.StringIO()
    terminal = Terminal(1, as_json=False, trace=None, out=out)
    for event in order:
        terminal.handle(event)
    assert out.getvalue() == "Lima"


def test_answers_that_come_in_several_events_are_all_kept():
    terminal = Terminal(3, as_json=True, trace=None, out=(out := io.StringIO()))
    for answers in ([{"request": 0}, {"request": 1}], [{"request": 2}]):
        terminal.handle({"event": "answers", "answers": answers})
    terminal.close()
    assert out.getvalue().splitlines() == [f'{{"request": {n}}}' for n in range(3)]
