"""The control channel between two programs: both must know the token before anything else is said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import zmq

from disagg_tt.errors import DisaggError, InputError, PeerError, StreamError
from disagg_tt.kv_stream.control import ZmqControl, own_host
from disagg_tt.kv_stream.programs import connect_programs
from disagg_tt.transfer_config import KVTransferConfig

LIMIT = 5.0


@pytest.fixture
def consumer() -> KVTransferConfig:
    """The decode program's configuration, with a port whose next one is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return KVTransferConfig("tcp", "kv_consumer", kv_port=probe.getsockname()[1] - 1, kv_token="secret")


def both(consumer: KVTransferConfig, token: str) -> list[ZmqControl | DisaggError]:
    """What the decode and the prefill program get, the latter with `token`."""
    got: dict[str, ZmqControl | DisaggError] = {}

    def connect(config: KVTransferConfig) -> None:
        try:
            got[config.role] = connect_programs(config, LIMIT)
        except DisaggError as error:
            got[config.role] = error

    producer = replace(consumer, kv_role="kv_producer", kv_token=token)
    threads = [threading.Thread(target=connect, args=(config,)) for config in (consumer, producer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [got["decode"], got["prefill"]]


def test_programs_with_one_token_talk(consumer):
    decode, prefill = both(consumer, "secret")
    assert isinstance(decode, ZmqControl) and isinstance(prefill, ZmqControl)
    prefill.send("bye")
    assert decode.receive(LIMIT, "anything") == {"kind": "bye"}
    decode.close()
    prefill.close()


@pytest.mark.parametrize("token", ["", "Secret"])
def test_programs_with_different_tokens_both_end_saying_so(consumer, token):
    for error in both(consumer, token):
        assert isinstance(error, StreamError)
        assert "program does not know the token" in str(error)


@pytest.fixture
def stranger(consumer) -> Iterator[zmq.Socket]:
    """Somebody else who connects to the decode program."""
    context = zmq.Context()
    peer = context.socket(zmq.PAIR)
    peer.connect(consumer.control_address)
    yield peer
    context.destroy(linger=0)


def test_who_gives_the_challenge_and_the_proof_back_is_not_taken_for_the_peer(consumer, stranger):
    def mirror() -> None:
        while stranger.poll(1000):
            stranger.send(stranger.recv())

    mirrored = threading.Thread(target=mirror)
    mirrored.start()
    with pytest.raises(StreamError, match="the prefill program does not know the token"):
        connect_programs(consumer, LIMIT)
    mirrored.join()


@pytest.mark.parametrize("text", ["\u00e9", "\ud800", ""], ids=["accent", "surrogate", "empty"])
def test_a_proof_of_any_text_is_compared(consumer, stranger, text):
    stranger.send_json({"kind": "challenge", "nonce": text})
    stranger.send_json({"kind": "proof", "proof": text})
    with pytest.raises(StreamError, match="the prefill program does not know the token"):
        connect_programs(consumer, LIMIT)


def test_nothing_is_taken_from_who_has_not_proved_itself(consumer, stranger):
    stranger.send_json({"kind": "hello", "digest": "", "settings": {}, "requests": 1, "tokens": 32})
    with pytest.raises(StreamError, match="a 'hello' message came where 'challenge' is due"):
        connect_programs(consumer, LIMIT)


def test_an_address_in_use_and_a_peer_that_never_comes(consumer):
    with pytest.raises(PeerError, match="did not connect its control channel within 0 s"):
        connect_programs(consumer, 0.2)
    with pytest.raises(PeerError, match="comparing tokens with the decode program: nothing came"):
        connect_programs(replace(consumer, kv_role="kv_producer"), 0.2)
    with socket.socket() as taken:
        taken.bind((own_host(), consumer.kv_port + 1))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen at tcp://127.0.0.1"):
            connect_programs(consumer, 0.2)
