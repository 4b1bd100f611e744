"""Cores of a chip: coordinates, rectangles, sets of rectangles, and ways to choose the first n of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from disagg_tt.errors import DeviceError


class CoreCoord:
    """A core at column `x`, row `y`; equal to the pair (x, y) too."""

    __slots__ = ("x", "y")

    x: int
    y: int

    def __init__(self, x: int | tuple[int, int], y: int | None = None, /):
        pair = x if isinstance(x, tuple) else (x, y)
        if len(pair) != 2 or not all(isinstance(n, int) and n >= 0 for n in pair):
            raise TypeError(f"CoreCoord{pair}: x and y must be integers of 0 or more")
        self.x, self.y = int(pair[0]), int(pair[1] or 0)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, CoreCoord):
            return self.x == other.x and self.y == other.y
        return (self.x, self.y) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.x, self.y))

    def __repr__(self) -> str:
        return f"{self.x}-{self.y}"


@dataclass(frozen=True, kw_only=True)
class CoreGrid:
    """The rectangle of `x` columns and `y` rows of cores from (0, 0)."""

    x: int
    y: int

    @property
    def num_cores(self) -> int:
        return self.x * self.y

    def __repr__(self) -> str:
        return f"ttnn.CoreGrid(x={self.x}, y={self.y})"


class CoreRange:
    """A rectangle of cores, from `start` to `end` inclusive."""

    __slots__ = ("end", "start")

    def __init__(self, start: CoreCoord | tuple[int, int], end: CoreCoord | tuple[int, int]):
        self.start = start if isinstance(start, CoreCoord) else CoreCoord(start)
        self.end = end if isinstance(end, CoreCoord) else CoreCoord(end)
        if self.start.x > self.end.x or self.start.y > self.end.y:
            raise DeviceError(
                f"CoreRange from {self.start} to {self.end}; the end must not be before the start"
            )

    def grid_size(self) -> CoreCoord:
        return CoreCoord(self.end.x - self.start.x + 1, self.end.y - self.start.y + 1)

    def contains(self, other: CoreCoord | CoreRange | CoreRangeSet) -> bool:
        return CoreRangeSet([self]).contains(other)

    def cores(self, row_wise: bool = True) -> list[CoreCoord]:
        """Return its cores, row by row or column by column."""
        columns, rows = range(self.start.x, self.end.x + 1), range(self.start.y, self.end.y + 1)
        if row_wise:
            return [CoreCoord(x, y) for y in rows for x in columns]
        return [CoreCoord(x, y) for x in columns for y in rows]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoreRange) and self.start == other.start and self.end == other.end

    def __hash__(self) -> int:
        return hash((self.start, self.end))

    def __repr__(self) -> str:
        return f"[{self.start} - {self.end}]"


class CoreRangeSet:
    """A set of core rectangles that do not overlap, in the order given (a Python set: by their first core)."""

    def __init__(self, core_ranges: Iterable[CoreRange]):
        if isinstance(core_ranges, CoreRange):
            raise TypeError("CoreRangeSet takes a list or set of CoreRange; put the CoreRange in a list")
        ranges = tuple(core_ranges)
        if isinstance(core_ranges, (set, frozenset)):
            ranges = tuple(sorted(ranges, key=lambda r: (r.start.x, r.start.y)))
        for i, a in enumerate(ranges):
            for b in ranges[:i]:
                apart = (
                    a.start.x > b.end.x or b.start.x > a.end.x or a.start.y > b.end.y or b.start.y > a.end.y
                )
                if not apart:
                    raise DeviceError(f"CoreRangeSet: {b} and {a} overlap; give ranges that do not")
        self._ranges, self._hash = ranges, hash(ranges)
        self._cores = sum(r.grid_size().x * r.grid_size().y for r in ranges)

    def ranges(self) -> list[CoreRange]:
        return list(self._ranges)

    def num_cores(self) -> int:
        return self._cores

    def size(self) -> int:
        """Return the number of ranges."""
        return len(self._ranges)

    def empty(self) -> bool:
        return not self._ranges

    def contains(self, other: CoreCoord | CoreRange | CoreRangeSet) -> bool:
        return _cores(other) <= _cores(self)

    def bounding_box(self) -> CoreRange:
        """Return the smallest range that holds all cores; raises DeviceError for an empty set."""
        if not self._ranges:
            raise DeviceError("bounding_box of an empty CoreRangeSet; it needs at least one range")
        low = min(r.start.x for r in self._ranges), min(r.start.y for r in self._ranges)
        return CoreRange(low, (max(r.end.x for r in self._ranges), max(r.end.y for r in self._ranges)))

    def merge(self, other: CoreRangeSet) -> CoreRangeSet:
        """Return the union, in as few rectangles as rows of cores give."""
        return _rectangles(_cores(self) | _cores(other))

    def subtract(self, other: CoreRangeSet) -> CoreRangeSet:
        """Return the cores that are not in `other`."""
        return _rectangles(_cores(self) - _cores(other))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, CoreRangeSet) and self._ranges == other._ranges)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return "{" + ", ".join(map(repr, self._ranges)) + "}"


def _cores(what: CoreCoord | CoreRange | CoreRangeSet) -> set[CoreCoord]:
    if isinstance(what, CoreCoord):
        return {what}
    ranges = [what] if isinstance(what, CoreRange) else what.ranges()
    return {core for r in ranges for core in r.cores()}


def _rectangles(cores: set[CoreCoord]) -> CoreRangeSet:
    """Return `cores` as rectangles: runs along each row, joined with the equal run of the row before."""
    done: list[CoreRange] = []
    for y in sorted({core.y for core in cores}):
        for first, last in _runs(sorted(core.x for core in cores if core.y == y)):
            for i, above in enumerate(done):
                if (above.start.x, above.end.x, above.end.y) == (first, last, y - 1):
                    done[i] = CoreRange(above.start, (last, y))
                    break
            else:
                done.append(CoreRange((first, y), (last, y)))
    return CoreRangeSet(done)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    first = last = numbers[0]
    for n in numbers[1:]:
        if n != last + 1:
            yield first, last
            first = n
        last = n
    yield first, last


@lru_cache(maxsize=256)
def num_cores_to_corerangeset(
    target_num_cores: int, grid_size: CoreCoord, row_wise: bool = False
) -> CoreRangeSet:
    """Return the first cores of a grid, row by row (or column by column); raises DeviceError if there are too few."""
    if not 0 < target_num_cores <= grid_size.x * grid_size.y:
        raise DeviceError(
            f"{target_num_cores} cores asked of a grid of {grid_size.x}x{grid_size.y}; "
            f"at most {grid_size.x * grid_size.y} are there"
        )
    along = grid_size.x if row_wise else grid_size.y
    full, rest = divmod(target_num_cores, along)
    boxes = [(0, 0, along - 1, full - 1)] * bool(full) + [(0, full, rest - 1, full)] * bool(rest)
    if not row_wise:
        boxes = [(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes]
    return CoreRangeSet([CoreRange((x0, y0), (x1, y1)) for x0, y0, x1, y1 in boxes])


def num_cores_to_corerangeset_in_subcoregrids(
    start_core: CoreCoord, target_num_cores: int, sub_core_grids: CoreRangeSet, row_wise: bool = False
) -> CoreRangeSet:
    """Return `target_num_cores` cores of `sub_core_grids` from `start_core` on; raises DeviceError if there are too few."""
    cores = [core for r in sub_core_grids.ranges() for core in r.cores(row_wise)]
    if start_core not in cores:
        raise DeviceError(f"start core {start_core} is not in {sub_core_grids}; choose one of its cores")
    chosen = cores[cores.index(start_core) :][:target_num_cores]
    if not 0 < target_num_cores == len(chosen):
        raise DeviceError(
            f"{target_num_cores} cores asked of {sub_core_grids} from {start_core} on; {len(chosen)} are there"
        )
    return _rectangles(set(chosen))


def corerange_to_cores(
    core_range_set: CoreRangeSet, max_cores: int | None = None, row_wise: bool = False
) -> list[CoreCoord]:
    """Return the cores of a set, range by range, column by column (or row by row), at most `max_cores`."""
    return [core for r in core_range_set.ranges() for core in r.cores(row_wise)][:max_cores]


def grid_to_cores(
    num_cores: int, grid_size_x: int, grid_size_y: int, row_wise: bool = False
) -> list[CoreCoord]:
    """Return the first `num_cores` cores of a grid, column by column (or row by row)."""
    return corerange_to_cores(
        num_cores_to_corerangeset(num_cores, CoreCoord(grid_size_x, grid_size_y), row_wise),
        num_cores,
        row_wise,
    )
