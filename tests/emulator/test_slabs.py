"""Memory of sockets that a received tensor keeps: given back when nothing uses it, and never before."""

from __future__ import annotations

import gc

import pytest
import torch

from disagg_tt.device.emulator import shm, slabs
from disagg_tt.device.emulator.slabs import UNIT, Slabs


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> tuple[Slabs, Slabs]:
    """The sender's and the receiver's view of a segment of 8 units."""
    monkeypatch.setattr(slabs, "_UNITS", 8)
    monkeypatch.setattr(Slabs, "BYTES", 8 + 8 * UNIT)
    segment = shm.create(Slabs.BYTES)
    if segment is None:
        pytest.skip("ranks share no memory on this machine")
    segment.seal()
    segment.memory[:8] = bytes(8)  # the cookie; a socket's slabs begin behind it
    return Slabs(memoryview(segment.memory)), Slabs(memoryview(segment.memory))


def filled(sender: Slabs, value: float, units: int = 1) -> int:
    at = sender.take(units * UNIT)
    assert at is not None
    sender.at(at, (units * UNIT // 4,), torch.float32).fill_(value)
    return at


def test_a_slab_is_taken_until_the_last_tensor_on_it_is_gone(ends: tuple[Slabs, Slabs]) -> None:
    sender, receiver = ends
    kept = {i: receiver.keep(filled(sender, i, units=2), 2 * UNIT).view(torch.float32) for i in range(4)}
    assert sender.take(2 * UNIT) is None, "all slabs are kept"
    assert [t.unique().tolist() for t in kept.values()] == [[0], [1], [2], [3]]
    part = kept.pop(2)[5:7]
    gc.collect()
    assert sender.take(2 * UNIT) is None, "a view of the tensor is alive"
    assert part.tolist() == [2, 2]
    del part
    gc.collect()
    filled(sender, 9, units=2)
    assert sender.take(2 * UNIT) is None
    assert [t.unique().tolist() for t in kept.values()] == [[0], [1], [3]]


def test_slabs_of_another_size_are_made_when_all_are_free(ends: tuple[Slabs, Slabs]) -> None:
    sender, receiver = ends
    kept = [receiver.keep(filled(sender, 1), UNIT) for _ in range(8)]
    kept = kept[:1]
    gc.collect()
    assert sender.take(2 * UNIT) is None, "one is kept, where the larger one would lie"
    kept.clear()
    gc.collect()
    assert [filled(sender, 2, units=2) for _ in range(4)] == [0, 2 * UNIT, 4 * UNIT, 6 * UNIT]
    assert sender.take(9 * UNIT) is None
