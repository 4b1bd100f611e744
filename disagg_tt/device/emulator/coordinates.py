"""Places in a mesh of chips: its shape, a chip's coordinate, a range of coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from disagg_tt.errors import DeviceError


class _Dims:
    """Numbers along the axes of a mesh, given one by one or as one sequence; equal only to their own kind."""

    __slots__ = ("_dims",)

    def __init__(self, *dims: Any):
        if len(dims) == 1:
            if isinstance(dims[0], int):
                raise TypeError(f"{type(self).__name__}({dims[0]}): one axis is given as a list, [{dims[0]}]")
            dims = tuple(dims[0])
        if not all(isinstance(d, int) and d >= 0 for d in dims):
            raise TypeError(f"{type(self).__name__}{dims}: the numbers must be integers of 0 or more")
        self._dims = dims

    def dims(self) -> int:
        """Return the number of axes."""
        return len(self._dims)

    def __getitem__(self, index: int) -> int:
        if not -len(self._dims) <= index < len(self._dims):
            raise DeviceError(
                f"{self!r} has no axis {index}; allowed: {-len(self._dims)}..{len(self._dims) - 1}"
            )
        return int(self._dims[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self._dims)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            raise TypeError(
                f"{self!r} compared with a {type(other).__name__}; ttnn compares it with a {type(self).__name__} only"
            )
        return self._dims == other._dims

    def __hash__(self) -> int:
        return hash(self._dims)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._dims)})"


class MeshShape(_Dims):
    """Rows and columns of a mesh: MeshShape(1, 2)."""

    def mesh_size(self) -> int:
        """Return the number of chips."""
        return math.prod(self._dims)


class MeshCoordinate(_Dims):
    """A chip's place in a mesh: MeshCoordinate(0, 1)."""


class MeshCoordinateRange:
    """All coordinates of a mesh shape, or from `start` to `end` inclusive; iterated row by row."""

    def __init__(self, start: MeshShape | MeshCoordinate, end: MeshCoordinate | None = None):
        if isinstance(start, MeshShape) and end is None:
            start, end = MeshCoordinate([0] * start.dims()), MeshCoordinate([d - 1 for d in start])
        if not isinstance(start, MeshCoordinate) or not isinstance(end, MeshCoordinate):
            raise TypeError("MeshCoordinateRange takes a MeshShape, or a first and a last MeshCoordinate")
        if start.dims() != end.dims():
            raise DeviceError(
                f"MeshCoordinateRange({start!r}, {end!r}): both must have the same number of axes"
            )
        if any(a > b for a, b in zip(start, end, strict=True)):
            raise DeviceError(f"MeshCoordinateRange({start!r}, {end!r}): the first must not be past the last")
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[MeshCoordinate]:
        spans = [range(a, b + 1) for a, b in zip(self.start, self.end, strict=True)]
        return (MeshCoordinate(place) for place in product(*spans))

    def __repr__(self) -> str:
        return f"MeshCoordinateRange(start={self.start!r}, end={self.end!r})"


class MeshCoordinateRangeSet:
    """Ranges of coordinates, kept as they were given."""

    def __init__(self, range: MeshCoordinateRange | None = None):
        self._ranges = [] if range is None else [range]

    def merge(self, range: MeshCoordinateRange) -> None:
        self._ranges.append(range)

    def __repr__(self) -> str:
        return f"MeshCoordinateRangeSet({self._ranges})"


def places(inner: Sequence[int], outer: Sequence[int]) -> list[int]:
    """Return, for each cell of a grid of shape `inner` row by row, its row-major number in the grid `outer`.

    A grid that fits into `outer` lies at its origin; another of no more cells runs through `outer` row by row.
    Raises DeviceError for more cells than `outer` has.
    """
    if math.prod(inner) > math.prod(outer):
        raise DeviceError(
            f"{list(inner)} chips asked of a mesh of {list(outer)}; allowed: no more than it has"
        )
    if len(inner) != len(outer) or any(a > b for a, b in zip(inner, outer, strict=True)):
        return list(range(math.prod(inner)))
    steps = [math.prod(outer[axis + 1 :]) for axis in range(len(outer))]
    return [
        sum(at * step for at, step in zip(place, steps, strict=True))
        for place in product(*(range(d) for d in inner))
    ]
