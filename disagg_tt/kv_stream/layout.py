"""Where a layer's bytes lie in a host's memory: extents, joined where they touch, and what a wire makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Extents = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """A layer's bytes in as few pieces as possible, and the form in which the wire's library takes them."""

    pieces: list[torch.Tensor]
    form: Any


def coalesce(extents: Extents) -> list[torch.Tensor]:
    """Return the same bytes in as few extents as possible: those that follow one another in memory are joined."""
    joined: list[torch.Tensor] = []
    run, end, whole = (
        0,
        0,
        0,
    )  # of the extents in hand: where they begin, where they end in memory, their storage
    for number, extent in enumerate(extents):
        at, storage = extent.data_ptr(), extent.untyped_storage().data_ptr()
        if number and at == end and storage == whole:
            end += extent.numel()
            continue
        if number:
            joined.append(_piece(extents, run, number, end))
        run, end, whole = number, at + extent.numel(), storage
    return [*joined, _piece(extents, run, len(extents), end)] if extents else []


def _piece(extents: Extents, first: int, after: int, end: int) -> torch.Tensor:
    start = extents[first]
    return start if after == first + 1 else start.as_strided((end - start.data_ptr(),), (1,))
