"""Shared memory in which tensors are received: the sender copies values into a slab, and the receiver's tensor keeps that.

So there is one copy in all. A slab is the receiver's from the head that names it until the last tensor on it is gone; then
the sender may fill it again. A sender that finds no slab free does without.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

UNIT = 64 << 10  # bytes that slabs are multiples of; less is not worth one
_UNITS = 4096
_GLANCES = 8  # at slabs that may be free again


class Slabs:
    """One end's view of all slabs of a socket. Each has a byte that says whether it is taken, that of its first unit."""

    BYTES = _UNITS + _UNITS * UNIT  # only what is used takes memory

    def __init__(self, memory: memoryview):
        self._taken, self._memory = memory[:_UNITS], memory[_UNITS : self.BYTES]
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._made: dict[
            int, deque[int]
        ] = {}  # units of a slab: where such slabs begin, the longest taken first
        self._views: dict[Any, torch.Tensor] = {}
        self._end = 0  # units that belong to slabs

    def take(self, size: int) -> int | None:
        """Return where a free slab of `size` bytes begins, now taken; None where there is none."""
        units = -(-size // UNIT)
        made = self._made.setdefault(units, deque())
        for _ in range(min(len(made), _GLANCES)):
            if not self._taken[made[0]]:
                break
            made.rotate(-1)
        else:
            if self._end + units > _UNITS and not any(self._taken[: self._end]):
                self._made, self._end, self._views = {units: (made := deque())}, 0, {}
            if self._end + units > _UNITS:
                return None
            made.appendleft(self._end)
            self._end += units
        first = made[0]
        made.rotate(-1)
        self._taken[first] = 1
        return first * UNIT

    def at(self, at: int, shape: Sequence[int], form: torch.dtype) -> torch.Tensor:
        """Return the memory of the slab that begins at `at`, to fill."""
        view = self._views.get((at, shape, form))
        if view is None:
            size = form.itemsize * math.prod(shape)
            view = self._views[at, shape, form] = self._bytes[at : at + size].view(form).view(shape)
        return view

    def keep(self, at: int, size: int) -> torch.Tensor:
        """Return the memory of the slab that begins at `at`, uint8 [size]; it is given back when nothing uses it any more."""
        held = np.frombuffer(self._memory, np.uint8, size, at)
        weakref.finalize(held, self._give_back, at).atexit = False
        return torch.from_numpy(held)

    def _give_back(self, at: int) -> None:
        self._taken[at // UNIT] = 0
