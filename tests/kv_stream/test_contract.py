"""The contract of a K/V stream's ends: what may be called when, and metadata that no corruption passes."""

from __future__ import annotations

import random

import pytest
import torch

from disagg_tt.errors import StreamError
from disagg_tt.kv_stream.base import MAGIC, VERSION, Metadata, State, _Stream

LAYERS = 3


def streaming(layers_done: int = 0) -> _Stream:
    stream = _Stream(LAYERS)
    stream.begin(7)
    stream.streaming()
    for layer in range(layers_done):
        stream.layer(layer)
    return stream


def test_a_stream_goes_from_waiting_to_done_and_begins_again():
    stream = _Stream(LAYERS)
    for request in (0, 1):
        stream.begin(request)
        assert stream.state is State.WAITING
        stream.streaming()
        for layer in range(LAYERS):
            assert stream.state is State.STREAMING
            stream.layer(layer)
        stream.end()
        assert stream.state is State.DONE


WRONG = {
    "layer before any request": (_Stream(LAYERS), lambda s: s.layer(0), "layer 0 in state done"),
    "end before any request": (_Stream(LAYERS), lambda s: s.end(), "the end in state done"),
    "streaming before any request": (
        _Stream(LAYERS),
        lambda s: s.streaming(),
        "starting to stream in state done",
    ),
    "begin while streaming": (
        streaming(1),
        lambda s: s.begin(8),
        "request 8 announced while request 7 is streaming",
    ),
    "streaming twice": (
        streaming(),
        lambda s: s.streaming(),
        "in state streaming; it is allowed in state waiting",
    ),
    "layer skipped": (streaming(1), lambda s: s.layer(2), "layer 2 of 3; layer 1 is next"),
    "layer twice": (streaming(2), lambda s: s.layer(1), "layer 1 of 3; layer 2 is next"),
    "layer below": (streaming(), lambda s: s.layer(-1), "layer -1 of 3"),
    "one layer too many": (streaming(LAYERS), lambda s: s.layer(LAYERS), "layer 3 of 3"),
    "end early": (streaming(2), lambda s: s.end(), "ended after 2 of 3 layers"),
    "ending early": (streaming(2), lambda s: s.ending(), "ended after 2 of 3 layers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_raises_and_fails_the_stream(name):
    stream, call, message = WRONG[name]
    with pytest.raises(StreamError, match=message) as caught:
        call(stream)
    assert "K/V stream of request" in str(caught.value)
    assert stream.state is State.FAILED


def test_a_failed_stream_takes_only_a_new_request():
    stream = streaming(1)
    with pytest.raises(StreamError):
        stream.layer(0)
    for call in (lambda: stream.layer(1), stream.end, stream.streaming):
        with pytest.raises(StreamError, match="in state failed"):
            call()
    stream.begin(8)
    assert (stream.state, stream.next_layer) == (State.WAITING, 0)


def test_ending_checks_and_changes_nothing():
    stream = streaming(LAYERS)
    stream.ending()
    assert stream.state is State.STREAMING


def test_metadata_comes_back_as_it_went():
    rng = random.Random(1)
    for _ in range(50):
        metadata = Metadata(*(rng.choice([0, 1, 35308, rng.randrange(2**32)]) for _ in range(4)))
        tile = metadata.tile()
        assert tile.shape == (1, 1, 32, 32)
        assert Metadata.from_tile(tile.to(torch.uint32)) == metadata


def test_token_35308_survives_only_as_an_integer():
    """The proof of concept sent metadata in bfloat16, which has 8 bits of mantissa."""
    tile = Metadata(1, 24, 35308, 4).tile()
    assert Metadata.from_tile(tile).next_token == 35308
    with pytest.raises(StreamError):
        Metadata.from_tile(tile.to(torch.bfloat16))


@pytest.mark.parametrize("where", [0, 1], ids=["magic", "version"])
def test_every_flipped_bit_of_the_head_is_noticed(where):
    for bit in range(32):
        tile = Metadata(1, 24, 5, 4).tile()
        tile[0, 0, 0, where] ^= 1 << bit
        with pytest.raises(StreamError, match=f"{MAGIC:#x}, version {VERSION} is needed"):
            Metadata.from_tile(tile)


def test_a_tile_of_zeros_is_no_metadata():
    with pytest.raises(StreamError, match="metadata begins with 0x0, version 0"):
        Metadata.from_tile(torch.zeros(1, 1, 32, 32, dtype=torch.int64))
