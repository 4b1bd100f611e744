"""Who may join the hub and how they leave it; and that nothing sent to it, or to a worker, does any harm."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_tt.errors import InputError, PeerError, StreamError
from disagg_tt.serving import hub as hub_module
from disagg_tt.serving import protocol
from disagg_tt.serving.connection import Connection, HubLostError
from disagg_tt.serving.hub import MAX_STRANGERS, Hub
from disagg_tt.serving.protocol import Failed, Hello, Leave, Linked, Open, Opened, Register, Stop

LIMIT_S = 60.0
ABOUT = {
    "role": "decode",
    "in_job": False,
    "digest": "a" * 64,
    "settings": {"kv_dtype": "bfloat8_b"},
    "slots": 4,
    "blocks": 64,
    "max_seq_len": 512,
    "prefill_ms": [(32, 1.0)],
    "step_ms": 1.0,
}


def register(name, **changes):
    return lambda proof: Register(**{"proof": proof, "name": name, **ABOUT, **changes})


@asynccontextmanager
async def listening(address="tcp://127.0.0.1:*", token="secret", **served):
    hub = Hub(address, token, **served)
    hub.start()
    try:
        yield hub
    finally:
        await hub.close()


@asynccontextmanager
async def joined(hub, name, token="secret", limit_s=LIMIT_S, **changes):
    connection = Connection(hub.address, token, limit_s)
    try:
        await asyncio.to_thread(connection.join, register(name, **changes))
        yield connection
    finally:
        await asyncio.to_thread(connection.close)


async def refused(hub, name, error, match, **changes):
    with pytest.raises(error, match=match):
        async with joined(hub, name, **changes):
            pass


async def until(condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), LIMIT_S)


async def received(connection):
    """The next message for a worker."""

    def wait():
        assert connection.socket.poll(LIMIT_S * 1000)
        return connection.receive()

    return await asyncio.to_thread(wait)


def test_a_worker_joins_and_leaves():
    async def main():
        async with listening() as hub:
            lost = []
            hub.on_lost = lambda name, reason: lost.append((name, reason))
            async with joined(hub, "d") as worker:
                assert [w.name for w in hub.of_role("decode")] == ["d"]
                worker.send(Leave())
                await until(lambda: lost)
            assert lost == [("d", "it left")] and hub.workers == {}

    asyncio.run(main())


def test_the_token_must_be_known_to_both():
    async def main():
        async with listening() as hub:
            await refused(hub, "d", StreamError, "does not know the token", token="another")
            impostor = hub_module.zmq.asyncio.Context.instance().socket(zmq.DEALER)
            impostor.connect(hub.address)
            await impostor.send(protocol.encode(Hello(nonce="n")))
            await impostor.recv()
            await impostor.send(protocol.encode(register("d")("0" * 64)))
            answer = protocol.to_worker(await impostor.recv())
            assert "does not know the token" in answer.reason and not answer.again
            impostor.close(linger=0)
            assert hub.workers == {}

    asyncio.run(main())


def test_a_hub_that_others_reach_needs_a_token():
    with pytest.raises(InputError, match="there is no token"):
        Hub("tcp://0.0.0.0:*", "")


@pytest.mark.parametrize(
    ("what", "value"), [("digest", "b" * 64), ("settings", {"kv_dtype": "bfloat16"}), ("max_seq_len", 256)]
)
def test_all_workers_must_run_the_same(what, value):
    async def main():
        async with listening() as hub, joined(hub, "d"):
            await refused(hub, "e", PeerError, f"e has {what} .* same model and settings", **{what: value})
            assert list(hub.workers) == ["d"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("served", "why"),
    [
        ({"digest": "b" * 64}, "d has checkpoint aaaa.*, the server bbbb.*; give both the same --model"),
        ({"max_seq_len": 544}, "d takes sequences of 512 tokens, the server of 544; give both the same"),
    ],
)
def test_a_worker_must_serve_what_the_server_does(served, why):
    """A request within the server's limit but not the worker's would end the worker."""

    async def main():
        async with listening(**served) as hub:
            await refused(hub, "d", PeerError, why)
        async with listening(digest="a" * 64, max_seq_len=512) as hub, joined(hub, "d"):
            assert list(hub.workers) == ["d"]

    asyncio.run(main())


def test_a_defect_in_taking_one_message_does_not_stop_the_next():
    async def main():
        async with listening() as hub, joined(hub, "d") as worker:
            heard = []

            def hear(name, message):
                heard.append(message.number)
                if len(heard) == 1:
                    raise TypeError("a defect")

            hub.on_message = hear
            for number in (1, 2):
                worker.send(Failed(number=number, reason="x"))
            await until(lambda: len(heard) == 2)

    asyncio.run(main())


def test_one_of_the_same_name_takes_the_place_of_the_first_who_is_told():
    async def main():
        async with listening() as hub, joined(hub, "d") as first, joined(hub, "d", slots=8):
            with pytest.raises(HubLostError, match="another worker of its name") as error:
                await received(first)
            assert not error.value.again
            assert hub.workers["d"].about.slots == 8

    asyncio.run(main())


def test_one_whose_beats_stop_is_dropped_and_may_join_again(monkeypatch):
    monkeypatch.setattr(hub_module, "LOST_S", 0.0)

    async def main():
        async with listening() as hub, joined(hub, "d") as worker:
            with pytest.raises(HubLostError, match="no beat for") as error:
                await received(worker)
            assert error.value.again and hub.workers == {}
            monkeypatch.setattr(hub_module, "LOST_S", LIMIT_S)
            await asyncio.to_thread(worker.join_again, register("d"))
            assert list(hub.workers) == ["d"]

    asyncio.run(main())


def test_ranks_of_a_job_are_lost_together():
    async def main():
        async with (
            listening() as hub,
            joined(hub, "decode-1", in_job=True) as decode,
            joined(hub, "prefill-0", in_job=True, role="prefill") as prefill,
            joined(hub, "by-hand"),
        ):
            assert hub.linked_to("decode-1") == ["prefill-0"] and hub.linked_to("by-hand") == []
            prefill.send(Leave())
            with pytest.raises(HubLostError, match="prefill-0 of its job is lost") as error:
                await received(decode)
            assert not error.value.again
            assert list(hub.workers) == ["by-hand"] and hub.job_lost.is_set()

    asyncio.run(main())


def test_a_worker_learns_that_the_hub_is_gone_and_finds_it_again():
    async def main():
        async with listening() as hub, joined(hub, "d") as worker:
            address = hub.address
            await hub.close()
            await until(lambda: worker.sockets[1].poll(0))
            with pytest.raises(HubLostError, match="the connection is lost"):
                worker.receive()
            again = asyncio.create_task(asyncio.to_thread(worker.join_again, register("d")))
            async with listening(address) as new:
                await again
                assert list(new.workers) == ["d"]

    asyncio.run(main())


def test_a_hub_that_does_not_come_back_is_an_error():
    async def main():
        async with listening() as hub:
            address = hub.address
        connection = Connection(address, "secret", 0.2)
        with pytest.raises(PeerError, match=r"did not answer within 0\.2 s"):
            await asyncio.to_thread(connection.join, register("d"))
        connection.close()

    asyncio.run(main())


def test_workers_started_by_hand_are_linked_and_a_lost_link_is_made_anew():
    async def main():
        async with (
            listening() as hub,
            joined(hub, "d") as decode,
            joined(hub, "p", role="prefill") as prefill,
        ):
            for address in ("tcp://one", "tcp://two"):
                assert await received(decode) == Open(peer="p")
                assert hub.linked_to("d") == []
                decode.send(Opened(peer="p", address=address))
                connect = await received(prefill)
                assert (connect.peer, connect.address) == ("d", address)
                prefill.send(Linked(peer="d"))
                await until(lambda: hub.linked_to("d"))
                assert hub.linked_to("d") == ["p"]
                hub.relink("p", "d")
                hub.relink("p", "d")  # of many requests that the link's loss failed, one has it made

    asyncio.run(main())


def test_when_the_hub_stops_all_are_told_and_nobody_may_join():
    async def main():
        async with listening() as hub, joined(hub, "d") as worker:
            hub.stop_workers()
            assert isinstance(await received(worker), Stop)
            await refused(hub, "e", PeerError, "the server stops")

    asyncio.run(main())


# ---------------------------------------------------------------- garbage

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
KINDS = [
    kind.model_fields["kind"].default
    for kind in protocol.Message.__subclasses__()
    if "kind" in kind.model_fields
]
FIELDS = sorted({name for kind in protocol.Message.__subclasses__() for name in kind.model_fields})


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | ANYTHING.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda kind, fields: json.dumps({"kind": kind, **fields}).encode(),
        st.sampled_from(KINDS),
        st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=8),
    )
)
def test_what_fits_no_schema_is_a_stream_error(data):
    for parse in (protocol.to_hub, protocol.to_worker):
        try:
            message = parse(data)
        except StreamError as error:
            assert len(str(error)) < 2000  # noqa: PT017 - either of the two is right
        else:
            assert parse(protocol.encode(message)) == message


def test_numbers_that_json_lacks_travel():
    message = protocol.Tokens(
        items=[
            protocol.Token(number=1, token=2, logprob=protocol.TokenLogprob(logprob=float("-inf"), top=[]))
        ],
        step_ms=1.0,
    )
    assert protocol.to_hub(protocol.encode(message)) == message


def test_deep_nesting_is_a_stream_error():
    with pytest.raises(StreamError):
        protocol.to_hub(b"[" * 100_000)


def garbage(rng: random.Random) -> list[bytes]:
    """Frames that a stranger might send, some of them nearly right."""
    choices = [
        lambda: [rng.randbytes(rng.randrange(100))],
        lambda: [b""] * rng.randrange(1, 5),
        lambda: [rng.randbytes(10_000), b"x"],
        lambda: [protocol.encode(Hello(nonce=rng.randbytes(8).hex()))],
        lambda: [protocol.encode(register("d")(rng.randbytes(32).hex()))],
        lambda: [json.dumps({"kind": "register", "proof": "\u00e9", "name": "d", **ABOUT}).encode()],
        lambda: [b'{"kind":"beat","name":"d","session":"\xc3\xa9","state":{}}'],
        lambda: [protocol.encode(Leave())],
        lambda: [protocol.encode(Failed(number=1, reason="x"))],
        lambda: [protocol.encode(protocol.Beat(name="d", session="0f", state=protocol.State(in_flight=99)))],
        lambda: [protocol.encode(Hello(nonce="n"))[: rng.randrange(1, 20)]],
        lambda: [json.dumps({"kind": rng.choice(KINDS), "number": rng.choice([-1, None, 2**70])}).encode()],
    ]
    return rng.choice(choices)()


@pytest.mark.parametrize("seed", [1, 2])
def test_garbage_at_the_socket_drops_nobody_and_grows_nothing(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main():
        async with listening() as hub, joined(hub, "d") as worker:
            heard = []
            hub.on_message = lambda name, message: heard.append((name, message))
            before = hub.workers["d"]
            context = zmq.asyncio.Context()
            for _ in range(MAX_STRANGERS // 8 + 4):  # each leaves nonces behind
                stranger = context.socket(zmq.DEALER)
                stranger.connect(hub.address)
                for _ in range(40):
                    await stranger.send_multipart(garbage(rng))
                await stranger.send(protocol.encode(Hello(nonce="last")))
                while True:  # the answer to the last: what was sent before has been taken
                    answer = protocol.to_worker(await asyncio.wait_for(stranger.recv(), LIMIT_S))
                    if getattr(answer, "proof", "") == hub_module.proof("secret", "hub", "last"):
                        break
                stranger.close(linger=0)
            context.term()
            assert hub.workers == {"d": before} and before.state.in_flight == 0
            assert heard == [] and len(hub._nonces) <= MAX_STRANGERS
            worker.send(Failed(number=7, reason="still here"))
            await until(lambda: heard)
            assert heard == [("d", Failed(number=7, reason="still here"))]

    asyncio.run(main())
