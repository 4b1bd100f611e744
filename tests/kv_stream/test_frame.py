"""Whatever bytes come, the parsers of frames, plans and descriptors return what is allowed or raise StreamError."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xxhash

from disagg_tt.errors import StreamError
from disagg_tt.kv_stream import frame
from disagg_tt.kv_stream.frame import (
    HEADER_BYTES,
    MAX_DESCRIPTORS,
    Header,
    Kind,
    digest_of,
    encode_descriptors,
    parse_descriptors,
    parse_header,
)
from disagg_tt.kv_stream.host_wire import MAX_LAYER_BYTES, MAX_LAYERS, Plan

HEADERS = 100_000
LISTS = 30_000
TRACED = 5_000  # of them with all memory counted, which is slow
GOOD = [Header(kind, 7, 3, 100, 2**63).encode() for kind in Kind]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes changed, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0 | 1 if at < len(changed):
                changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = changed[:at]
            case _:
                changed[at:at] = chance.randbytes(chance.randrange(9))
    return bytes(changed)


def fuzz(inputs: int, seed: int, good: list[bytes], parse: Callable[[bytes], Any]) -> tuple[int, int]:
    """Parse random and mutated inputs; return how many were taken, and the most memory that was held meanwhile."""
    chance, taken, peak = random.Random(seed), 0, 0
    tracemalloc.start()
    for number in range(inputs):
        if number == TRACED:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        match number % 4:
            case 0:
                data = chance.randbytes(chance.randrange(2 * len(good[0])))
            case 1:  # the right magic and version, then anything
                data = good[0][:6] + chance.randbytes(HEADER_BYTES - 6)
            case _:
                data = mutated(chance, chance.choice(good))
        try:
            parse(data)
            taken += 1
        except StreamError:
            pass
    return taken, peak


def test_fuzzed_headers_and_plans():
    def parse(data: bytes) -> None:
        header = parse_header(data)
        assert header.encode() == data
        assert header.kind is Kind.LAYER or header.length <= 1 << 20
        plan = Plan.of(header)
        assert 1 <= plan.layers <= MAX_LAYERS and 1 <= plan.layer_bytes <= MAX_LAYER_BYTES

    good = [*GOOD, *(Plan(7, 3, 4096).header(kind).encode() for kind in Kind)]
    taken, peak = fuzz(HEADERS, 1, good, parse)
    assert 1000 < taken < HEADERS and peak < 1 << 20


def test_fuzzed_descriptors():
    memory = torch.zeros(4096, dtype=torch.uint8)
    good = [encode_descriptors(memory.split(n)) for n in (4096, 1024, 100)]

    def parse(data: bytes) -> None:
        for address, size in parse_descriptors(data, 4096):
            assert 0 < address < address + size < 1 << 64 and size <= 4096

    taken, peak = fuzz(LISTS, 2, good, parse)
    assert 100 < taken < LISTS and peak < 1 << 20


@pytest.mark.parametrize("kind", Kind)
def test_headers_come_back_as_they_were(kind):
    header = Header(kind, 2**32 - 1, 2**32 - 1, 1024, 2**64 - 1)
    assert parse_header(header.encode()) == header and len(header.encode()) == HEADER_BYTES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n"[:HEADER_BYTES], "begins with b'GET '.*b'DTKV' is needed"),
        (GOOD[0][:-1], "header of 31 bytes; it has 32"),
        (b"", "header of 0 bytes"),
        (GOOD[0][:4] + b"\0\2" + GOOD[0][6:], "protocol version 2; this program speaks 1"),
        (GOOD[0][:6] + b"\0\x63" + GOOD[0][8:], "kind 99; allowed: CHALLENGE 1"),
        (Header(Kind.FAILED, length=1 << 40).encode(), "FAILED frame of 1,099,511,627,776 bytes; allowed: at most 1,024"),
        (Header(Kind.AGENT, length=(1 << 16) + 1).encode(), "AGENT frame of 65,537 bytes"),
        (Header(Kind.READABLE, length=MAX_DESCRIPTORS * 16 + 1).encode(), "READABLE frame of 1,048,577"),
    ],
)  # fmt: skip
def test_a_wrong_header_says_what_is_wrong(data, message):
    with pytest.raises(StreamError, match=message):
        parse_header(data)


@pytest.mark.parametrize("total", [1, 4095, 4097])
def test_descriptors_must_add_up_to_the_plan(total):
    data = encode_descriptors(torch.zeros(4096, dtype=torch.uint8).split(1000))
    assert [size for _, size in parse_descriptors(data, 4096)] == [1000, 1000, 1000, 1000, 96]
    with pytest.raises(StreamError, match=f"5 descriptors of 4,096 bytes; the plan says {total:,}"):
        parse_descriptors(data, total)


def test_more_extents_than_a_frame_takes_are_refused(monkeypatch):
    monkeypatch.setitem(frame._LONGEST, Kind.READABLE, 4 * 16)
    with pytest.raises(StreamError, match="a layer in 5 extents"):
        encode_descriptors(torch.zeros(5, dtype=torch.uint8).split(1))


def test_the_digest_is_of_the_bytes_however_they_are_cut():
    memory = torch.arange(1000).to(torch.uint8)
    assert (
        digest_of([memory])
        == digest_of(memory.split(7))
        == xxhash.xxh3_64_intdigest(memory.numpy().tobytes())
    )
    assert digest_of([memory]) != digest_of([memory[1:], memory[:1]])
