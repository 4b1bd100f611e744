"""Events: what a rank reports never delays it, and what is no event is dropped."""

from __future__ import annotations

import json
import time

import pytest
import zmq

from disagg_tt.report import MAX_EVENT_BYTES, Reporter, decode_event, in_pieces

BOUND = 60.0  # seconds: far above what is measured (2, the reporter's own limit), below a hang


def test_a_reporter_never_waits_for_a_launcher_that_is_gone():
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
    start = time.monotonic()
    reporter = Reporter("decode", 1, f"tcp://127.0.0.1:{port}")
    for number in range(1000):
        reporter.emit({"event": "token", "number": number})
    reporter.close()
    reporter.close()
    assert time.monotonic() - start < BOUND


def test_without_a_launcher_events_go_to_the_handler():
    seen = []
    with Reporter.from_env({}, "prefill", 0, seen.append) as reporter:
        reporter.emit({"event": "token", "text": "a"})
    assert seen[0] == {"event": "token", "text": "a", "role": "prefill", "rank": 0}


@pytest.mark.parametrize(
    "message",
    [b"", b"\xff", b"[]", b"{}", b'{"event": 1, "rank": 0}', b'{"event": "x"}', b"[" * 100_000],
)
def test_what_is_no_event_is_dropped(message):
    assert decode_event(message) is None


def test_event_size_limit():
    event = b'{"event": "x", "rank": 0, "text": "%s"}'
    assert decode_event(event % (b"a" * 1000)) is not None
    assert decode_event(event % (b"a" * MAX_EVENT_BYTES)) is None


def test_what_is_too_long_for_one_event_goes_in_several_and_whole():
    items = [{"n": n, "text": "x" * size} for n, size in enumerate([10, MAX_EVENT_BYTES // 3] * 4 + [5])]
    pieces = list(in_pieces(items))
    assert [item for piece in pieces for item in piece] == items
    assert 1 < len(pieces) < len(items)
    assert all(len(json.dumps(piece)) < MAX_EVENT_BYTES for piece in pieces)
    assert list(in_pieces([])) == []
