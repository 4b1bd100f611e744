"""Specs: what a tensor is on one chip. Interned, so that equal specs are one object and a plan is found by identity."""

from __future__ import annotations

import math
from typing import Any

from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    TILE_SIZE,
    BufferType,
    CoreCoord,
    CoreRange,
    CoreRangeSet,
    DataType,
    Layout,
    MemoryConfig,
    Shape,
    ShardOrientation,
    ShardSpec,
    TensorMemoryLayout,
    Tile,
    corerange_to_cores,
)
from disagg_tt.errors import DeviceError, NotEmulatedError


class TensorSpec:
    """A tensor's shape, padded shape, dtype, layout and memory config on one chip; equal specs are one object.

    `bytes` is the packed size, `page` that of one page: a tile, or a row (of a shard) in ROW_MAJOR layout.
    """

    __slots__ = ("bytes", "dtype", "layout", "memory_config", "padded_shape", "page", "shape")

    shape: Shape
    padded_shape: Shape
    dtype: DataType
    layout: Layout
    memory_config: MemoryConfig
    bytes: int
    page: int

    def __new__(
        cls,
        shape: Any,
        dtype: DataType,
        layout: Layout,
        *place: Any,
        memory_layout: TensorMemoryLayout = TensorMemoryLayout.INTERLEAVED,
        shard_spec: ShardSpec | None = None,
        buffer_type: BufferType = BufferType.DRAM,
        nd_shard_spec: Any = None,
        tile: Tile | None = None,
    ) -> TensorSpec:
        """TensorSpec(shape, dtype, layout[, buffer_type[, tile]] or [, memory_layout[, shard_spec[, buffer_type[, tile]]]])."""
        if nd_shard_spec is not None:
            raise NotEmulatedError("TensorSpec: the emulator does not have ND sharding")
        names = ("buffer_type", "tile") if place and isinstance(place[0], BufferType) else _PLACE
        if len(place) > len(names):
            raise TypeError(f"TensorSpec takes at most {3 + len(names)} arguments here, not {3 + len(place)}")
        given: dict[str, Any] = {
            "memory_layout": memory_layout,
            "shard_spec": shard_spec,
            "buffer_type": buffer_type,
        }
        given.update(zip(names, place, strict=False))
        given.pop("tile", tile)  # a Tile is 32x32
        return make_spec(
            shape,
            dtype,
            layout,
            MemoryConfig(given["memory_layout"], given["buffer_type"], given["shard_spec"]),
        )

    @property
    def tile(self) -> Tile:
        return Tile()

    @property
    def pages(self) -> int:
        """The number of pages of one chip's part."""
        return self.bytes // self.page if self.page else 0

    def shard_cores(self) -> list[CoreCoord]:
        """Return the cores that must be there: of block shards those that hold one, else all that are named."""
        place = self.memory_config
        if not place.is_sharded():
            return []
        shard = _shard(place)
        if place.memory_layout is not TensorMemoryLayout.BLOCK_SHARDED:
            return corerange_to_cores(shard.grid)
        rows, columns = math.prod(self.padded_shape[:-1]), self.padded_shape[-1]
        down, across = -(-rows // shard.shape[0]), -(-columns // shard.shape[1])
        x, y = (across, down) if shard.orientation is ShardOrientation.ROW_MAJOR else (down, across)
        first = shard.grid.bounding_box().start
        return [CoreCoord(first.x + i, first.y + j) for j in range(y) for i in range(x)]

    def height_sharded(
        self, grid: CoreRangeSet, orientation: ShardOrientation = ShardOrientation.ROW_MAJOR
    ) -> TensorSpec:
        """Return this spec cut into as many equal shards of whole rows as `grid` has cores."""
        return self._sharded(TensorMemoryLayout.HEIGHT_SHARDED, grid, (grid.num_cores(), 1), orientation)

    def width_sharded(
        self, grid: CoreRangeSet, orientation: ShardOrientation = ShardOrientation.ROW_MAJOR
    ) -> TensorSpec:
        """Return this spec cut into as many equal shards of whole columns as `grid` has cores."""
        return self._sharded(TensorMemoryLayout.WIDTH_SHARDED, grid, (1, grid.num_cores()), orientation)

    def block_sharded(
        self, grid: CoreRange | CoreRangeSet, orientation: ShardOrientation = ShardOrientation.ROW_MAJOR
    ) -> TensorSpec:
        """Return this spec cut into blocks, one a core of the rectangle `grid`."""
        cores = grid if isinstance(grid, CoreRangeSet) else CoreRangeSet([grid])
        size = cores.bounding_box().grid_size()
        parts = (size.y, size.x) if orientation is ShardOrientation.ROW_MAJOR else (size.x, size.y)
        return self._sharded(TensorMemoryLayout.BLOCK_SHARDED, cores, parts, orientation)

    def _sharded(
        self, how: TensorMemoryLayout, grid: CoreRangeSet, parts: tuple[int, int], order: ShardOrientation
    ) -> TensorSpec:
        unit = TILE_SIZE if self.layout is Layout.TILE else 1
        size = math.prod(self.padded_shape[:-1]), self.padded_shape[-1]
        shard = [_up(-(-n // p), unit) for n, p in zip(size, parts, strict=True)]
        place = MemoryConfig(how, self.memory_config.buffer_type, ShardSpec(grid, shard, order))
        return make_spec(self.shape, self.dtype, self.layout, place)

    def __repr__(self) -> str:
        padded = "" if self.padded_shape == self.shape else f" padded to {list(self.padded_shape)}"
        return f"{list(self.shape)}{padded} {self.dtype.value} {self.layout.name} {self.memory_config!r}"


Spec = TensorSpec
_PLACE = ("memory_layout", "shard_spec", "buffer_type", "tile")
_specs: dict[Any, TensorSpec] = {}


def make_spec(
    shape: Any,
    dtype: DataType,
    layout: Layout,
    memory_config: MemoryConfig | None = None,
    padded: Any = None,
) -> TensorSpec:
    """Return the interned spec; TILE layout pads the last two axes to 32 unless `padded` says otherwise.

    Raises DeviceError for a combination that no device tensor can have.
    """
    key = (tuple(shape), dtype, layout, memory_config, None if padded is None else tuple(padded))
    spec = _specs.get(key)
    if spec is not None:
        return spec
    shape = Shape(shape)
    if any(d < 0 for d in shape):
        raise DeviceError(f"tensor shape {list(shape)} has a negative axis; axes must be 0 or more")
    if dtype.is_block_float and layout is not Layout.TILE:
        raise DeviceError(f"{dtype.value} in {layout.name} layout; block floats exist in TILE layout only")
    place = memory_config or DRAM_MEMORY_CONFIG
    if padded is None:
        padded = _padded(shape, layout, place)
    _check_shard(shape, padded, layout, place)
    canonical = (tuple(shape), dtype, layout, place, tuple(padded))
    spec = _specs.get(canonical)
    if spec is None:
        spec = _specs[canonical] = object.__new__(TensorSpec)
        spec.shape, spec.padded_shape, spec.dtype, spec.layout = shape, Shape(padded), dtype, layout
        spec.memory_config = place
        spec.bytes = dtype.bytes_of(math.prod(padded))
        row = (padded[-1] if padded else 1) if not place.is_sharded() else _shard(place).shape[1]
        spec.page = dtype.bytes_of(TILE_SIZE * TILE_SIZE if layout is Layout.TILE else row)
    _specs[key] = spec
    return spec


def _shard(place: MemoryConfig) -> ShardSpec:
    if place.shard_spec is None:
        raise DeviceError(f"{place!r} lacks a shard spec; make one with create_sharded_memory_config")
    return place.shard_spec


def _padded(shape: Shape, layout: Layout, place: MemoryConfig) -> tuple[int, ...]:
    """Return what a tensor takes: whole tiles, or in ROW_MAJOR layout whole shards along the last axis."""
    if layout is Layout.TILE:
        return tile_padded(shape)
    width = _shard(place).shape[1] if place.is_sharded() else 1
    dims = tuple(shape) or (1,)
    return (*dims[:-1], _up(dims[-1], max(width, 1)))


def _check_shard(shape: Shape, padded: Any, layout: Layout, place: MemoryConfig) -> None:
    """Raise DeviceError unless a tensor of this padded shape can be cut into the shards of `place`."""
    if not place.is_sharded():
        return
    shard = _shard(place)
    (height, width), rows, columns = shard.shape, math.prod(padded[:-1]), padded[-1]
    if height <= 0 or width <= 0:
        raise DeviceError(f"shard {height}x{width}; both must be 1 or more")
    if layout is Layout.TILE and (height % TILE_SIZE or width % TILE_SIZE):
        raise DeviceError(
            f"shard {height}x{width} of a tensor in TILE layout; it must be whole tiles of {TILE_SIZE}x{TILE_SIZE}"
        )
    if layout is Layout.ROW_MAJOR and len(shape) < 2 and height != 1:
        raise DeviceError(f"shard {height}x{width} of a tensor of shape {list(shape)}; it must be 1 high")
    if place.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED and width != columns:
        raise DeviceError(
            f"height shards are {width} wide, the tensor {columns}; they must be as wide as the tensor"
        )
    if place.memory_layout is TensorMemoryLayout.WIDTH_SHARDED and height != rows:
        raise DeviceError(
            f"width shards are {height} high, the tensor {rows}; they must be as high as the tensor"
        )
    down, across, cores = -(-rows // height), -(-columns // width), shard.grid.num_cores()
    if place.memory_layout is TensorMemoryLayout.BLOCK_SHARDED:
        _check_blocks(shard, down, across)
    elif down * across > cores:
        raise DeviceError(
            f"{down * across} shards of {height}x{width} for {cores} cores; give a core a shard or larger shards"
        )


def _check_blocks(shard: ShardSpec, down: int, across: int) -> None:
    """Raise DeviceError unless the cores are one rectangle with room for `down` x `across` blocks."""
    if shard.grid.size() != 1:
        raise DeviceError(f"block shards on {shard.grid}; the cores must be one rectangle")
    size = shard.grid.bounding_box().grid_size()
    rows, columns = (size.y, size.x) if shard.orientation is ShardOrientation.ROW_MAJOR else (size.x, size.y)
    if down > rows or across > columns:
        raise DeviceError(
            f"{down}x{across} blocks in {shard.orientation.name} order on {shard.grid}, which has room for {rows}x{columns}; "
            "use more cores or larger shards"
        )


def tile_padded(shape: Any) -> tuple[int, ...]:
    """Return `shape` with its last two axes rounded up to whole tiles; ranks 0 and 1 are one row of [32, width]."""
    dims = [1] * (2 - len(shape)) + list(shape)
    return (*dims[:-2], _up(dims[-2], TILE_SIZE), _up(dims[-1], TILE_SIZE))


def _up(size: int, to: int) -> int:
    return -(-size // to) * to
