"""Control messages: one schema, checked field by field, and a channel that notices a peer which is gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from disagg_tt.errors import PeerError, StreamError
from disagg_tt.kv_stream.control import (
    MAX_BYTES,
    SCHEMA,
    LocalControl,
    ZmqControl,
    check,
    clock_offset,
    expect,
)

VALID = {str: "text", dict: {"a": 1}, int: 3, float: 1.5}
WRONG = {
    str: [1, None, ["text"], True],
    dict: ["text", 1, None, [], True],
    int: ["3", 3.0, -1, None, True, [3]],
    float: ["1.5", None, True, float("nan"), float("inf"), [1.5]],
}


def message(kind: str) -> dict:
    return {"kind": kind, **{name: VALID[type_] for name, type_ in SCHEMA[kind].items()}}


@pytest.mark.parametrize("kind", SCHEMA)
def test_a_message_of_the_schema_is_taken(kind):
    assert check(message(kind)) == message(kind)
    whole_numbers = {name: 2 for name, type_ in SCHEMA[kind].items() if type_ is float}
    check({**message(kind), **whole_numbers})


@pytest.mark.parametrize("kind", SCHEMA)
def test_each_wrong_field_is_refused_by_name(kind):
    for name, type_ in SCHEMA[kind].items():
        for value in WRONG[type_]:
            with pytest.raises(StreamError, match=f"control message {kind}: {name} is"):
                check({**message(kind), name: value})
        with pytest.raises(StreamError, match=f"control message {kind}: {name} is None"):
            check({key: value for key, value in message(kind).items() if key != name})
    with pytest.raises(StreamError, match="has fields"):
        check({**message(kind), "more": 1})


@pytest.mark.parametrize(
    "value", [None, [], "busy", {}, {"kind": "other"}, {"kind": None}, {"kind": []}, {"kind": {}}]
)
def test_what_is_no_message_is_refused(value):
    with pytest.raises(StreamError, match="its kind must be one of .*hello, announce"):
        check(value)


@pytest.fixture
def pair() -> Iterator[tuple[ZmqControl, ZmqControl]]:
    one = ZmqControl("decode", bind=True, heartbeat_s=0.2)
    other = ZmqControl("prefill", bind=False, heartbeat_s=0.2)
    other.connect(one.address)
    one.wait_for_peer()
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_in_order_both_ways(pair):
    one, other = pair
    for number in range(100):
        one.send("layer", request=1, layer=number, at=0.5)
        other.send("done", request=number, answer={"text": "é\n"})
    for number in range(100):
        assert other.receive(10, "a layer")["layer"] == number
        assert one.receive(10, "an answer") == {"kind": "done", "request": number, "answer": {"text": "é\n"}}
    assert one.poll() is None


def test_a_wrong_message_is_not_sent(pair):
    with pytest.raises(StreamError, match="request is -1"):
        pair[0].send("ready", request=-1)
    with pytest.raises(StreamError, match=f"allowed are {MAX_BYTES}"):
        pair[0].send("failed", reason="a" * MAX_BYTES)
    pair[0].send("busy")
    assert pair[1].receive(10, "anything") == {"kind": "busy"}


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{", b"[" * 100_000, b"no json"], ids=["empty", "byte", "cut", "deep", "text"]
)
def test_what_is_not_json_is_refused(data, pair):
    pair[0]._socket.send(data)
    with pytest.raises(StreamError, match="control message is not JSON"):
        pair[1].receive(10, "anything")


def test_json_that_is_no_message_is_refused(pair):
    pair[0]._socket.send(json.dumps({"kind": "bye", "extra": 1}).encode())
    with pytest.raises(StreamError, match="has fields"):
        pair[1].receive(10, "anything")


def test_an_oversize_message_ends_the_connection(pair):
    pair[0]._socket.send(b" " * (MAX_BYTES + 1))
    with pytest.raises(PeerError, match="control connection is lost"):
        pair[1].receive(10, "anything")


def test_the_peers_failure_is_raised_with_its_reason(pair):
    one, other = pair
    one.send("failed", reason="out of DRAM")
    one.close()
    with pytest.raises(PeerError, match="the prefill rank failed: out of DRAM"):
        other.receive(10, "anything")


def test_a_peer_that_closes_is_noticed_at_once(pair):
    one, other = pair
    one.close()
    began = time.monotonic()
    with pytest.raises(PeerError, match="the prefill rank died or hangs"):
        other.receive(30, "anything")
    assert time.monotonic() - began < 15


def test_a_message_to_a_peer_that_is_gone_is_an_error(pair):
    one, other = pair
    other.close()
    with pytest.raises(PeerError):
        one.receive(10, "its end")
    with pytest.raises(PeerError, match="the decode rank is gone: it does not take the message 'busy'"):
        one.send("busy")


def test_silence_ends_with_the_deadline(pair):
    with pytest.raises(
        PeerError, match=r"a slot: nothing came from the decode rank within 0 s; .*--deadline-s"
    ):
        pair[0].receive(0.05, "a slot")


def test_a_peer_that_never_connects_is_an_error(monkeypatch):
    from disagg_tt.kv_stream import control

    monkeypatch.setattr(control, "CONNECT_S", 0.05)
    alone = ZmqControl("decode", bind=True)
    with pytest.raises(PeerError, match="the decode rank did not connect"):
        alone.wait_for_peer()
    alone.close()


def test_busy_is_no_answer_and_done_goes_aside(pair):
    one, other = pair
    for kind in ("busy", "done", "busy", "ready"):
        other.send(**message(kind))
    aside: list[dict] = []
    assert expect(one, "ready", 10, "a slot", aside=aside)["kind"] == "ready"
    assert aside == [message("done")]
    other.send("done", request=0, answer={})
    with pytest.raises(StreamError, match="a slot: a 'done' message came where 'ready' is due"):
        expect(one, "ready", 10, "a slot")


def test_the_clock_offset_of_two_ends_on_one_clock_is_small(pair):
    """Off by at most half of the fastest round trip."""
    one, other = pair
    answered = threading.Thread(target=clock_offset, args=(one, 30), kwargs={"asks": False})
    began = time.monotonic()
    answered.start()
    offset = clock_offset(other, 30, asks=True)
    answered.join()
    assert abs(offset) <= (time.monotonic() - began) / 2


def test_the_clock_offset_is_the_peers_clock_minus_ours(pair, monkeypatch):
    from disagg_tt.kv_stream import control

    one, other = pair

    def answer() -> None:
        for _ in range(8):
            ping = one.receive(30, "a ping")
            one.send("pong", at=ping["at"], seen=time.monotonic() + 1000)

    answered = threading.Thread(target=answer)
    answered.start()
    offset = control.clock_offset(other, 30, asks=True)
    answered.join()
    assert 999 < offset < 1001


def test_within_one_process_a_message_is_handled_at_once_or_waits():
    one, other = LocalControl.pair()
    one.send("busy")
    assert other.receive(0, "anything") == {"kind": "busy"}
    with pytest.raises(PeerError, match="this is a deadlock"):
        other.receive(0, "more")
    seen: list[dict] = []
    other.handler = seen.append
    one.send("bye")
    assert seen == [{"kind": "bye"}]
    with pytest.raises(StreamError):
        one.send("ready", request="1")


def test_closing_leaves_no_socket_behind(pair):
    for end in pair:
        end.close()
        with pytest.raises(zmq.ZMQError):
            end._socket.getsockopt(zmq.EVENTS)
