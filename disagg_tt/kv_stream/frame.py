"""The frames that all wires speak: a header of 32 bytes, then at most as many bytes as it says.

    magic "DTKV", version u16, kind u16, request u32, layer u32, length u64, value u64      big-endian

Every number that comes from the other end is checked here before anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch
import xxhash

from disagg_tt.errors import StreamError

MAGIC, VERSION = b"DTKV", 1
_HEADER = struct.Struct("!4sHHIIQQ")
HEADER_BYTES = _HEADER.size
MAX_DESCRIPTORS = 1 << 16
DESCRIPTOR = struct.Struct("!QQ")  # address, bytes
SMALL_BYTES = 1024  # the most that a frame which is no layer, agent, port or list of descriptors carries


class Kind(IntEnum):
    """What a frame carries, and which way it goes."""

    CHALLENGE = 1  # decode -> prefill: a nonce
    PROOF = (
        2  # both ways: that the other's nonce and the token are known; prefill's ends with a nonce of its own
    )
    AGENT = 3  # nixl, prefill -> decode: the metadata of its agent
    PREFILL_REQUEST = 4  # decode -> prefill: a plan: layer = number of layers, value = bytes a layer
    PREFILL_RESPONSE = 5  # prefill -> decode: the same plan
    LAYER = 6  # prefill -> decode: a layer's bytes; value = their digest, 0: none
    READABLE = 7  # nixl, prefill -> decode: where a layer's bytes lie
    READ = 8  # nixl, decode -> prefill, as NIXL's notification: a layer was read
    TAKEN = 9  # decode -> prefill: all layers are here
    FAILED = 10  # both ways: why this end stops, in words
    PORT = 11  # mpi between programs, decode -> prefill: the name of its MPI port


_KINDS = {kind.value: kind for kind in Kind}
# The longest payload of each kind but LAYER, whose length the plan says.
_LONGEST = {kind: SMALL_BYTES for kind in Kind if kind is not Kind.LAYER} | {
    Kind.AGENT: 1 << 16,
    Kind.READABLE: MAX_DESCRIPTORS * DESCRIPTOR.size,
    Kind.PORT: 1 << 13,
}


@dataclass(frozen=True)
class Header:
    kind: Kind
    request: int = 0
    layer: int = 0
    length: int = 0
    value: int = 0

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.kind, self.request, self.layer, self.length, self.value)


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Return the header that `data` is; raises StreamError for anything else."""
    if len(data) != HEADER_BYTES:
        raise StreamError(
            f"a frame header of {len(data)} bytes; it has {HEADER_BYTES}: the stream was cut off"
        )
    magic, version, number, request, layer, length, value = _HEADER.unpack(data)
    if magic != MAGIC:
        raise StreamError(
            f"a frame that begins with {magic!r}; {MAGIC!r} is needed: another program speaks here"
        )
    if version != VERSION:
        raise StreamError(
            f"a frame of protocol version {version}; this program speaks {VERSION}: use one release"
        )
    kind = _KINDS.get(number)
    if kind is None:
        raise StreamError(
            f"a frame of kind {number}; allowed: {', '.join(f'{k.name} {k.value}' for k in Kind)}"
        )
    if kind is not Kind.LAYER and length > _LONGEST[kind]:
        raise StreamError(f"a {kind.name} frame of {length:,} bytes; allowed: at most {_LONGEST[kind]:,}")
    return Header(kind, request, layer, length, value)


def encode_descriptors(extents: Iterable[torch.Tensor]) -> bytes:
    """Return the addresses and sizes of extents; raises StreamError when they are too many for one frame."""
    found = b"".join(DESCRIPTOR.pack(extent.data_ptr(), extent.numel()) for extent in extents)
    if len(found) > _LONGEST[Kind.READABLE]:
        raise StreamError(
            f"a layer in {len(found) // DESCRIPTOR.size:,} extents; allowed: {MAX_DESCRIPTORS:,}"
        )
    return found


def parse_descriptors(data: bytes, total: int) -> list[tuple[int, int]]:
    """Return (address, bytes) of each extent; raises StreamError unless they are whole and add up to `total` bytes."""
    if not data or len(data) % DESCRIPTOR.size or len(data) > _LONGEST[Kind.READABLE]:
        raise StreamError(
            f"{len(data):,} bytes of descriptors; allowed: 1 to {MAX_DESCRIPTORS:,} of {DESCRIPTOR.size}"
        )
    found = list(DESCRIPTOR.iter_unpack(data))
    size = sum(size for _, size in found)
    if size != total or not all(size and at and at + size < 1 << 64 for at, size in found):
        raise StreamError(
            f"{len(found):,} descriptors of {size:,} bytes; the plan says {total:,}, no address 0, no wrap"
        )
    return found


def view_of(extent: torch.Tensor) -> memoryview:
    """Return an extent's bytes, where they lie."""
    return extent.numpy().data


def digest_of(extents: Iterable[torch.Tensor]) -> int:
    """Return the 64-bit XXH3 of the extents' bytes, one after the other."""
    state = xxhash.xxh3_64()
    for extent in extents:
        state.update(view_of(extent.cpu()))
    return state.intdigest()
