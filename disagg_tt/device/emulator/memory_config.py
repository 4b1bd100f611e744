"""Where a tensor lies: interleaved over the banks of DRAM or L1, or cut into shards that lie on chosen cores."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from disagg_tt.device.emulator.cores import CoreCoord, CoreGrid, CoreRange, CoreRangeSet
from disagg_tt.device.emulator.enums import BufferType, ShardOrientation, ShardStrategy, TensorMemoryLayout
from disagg_tt.device.emulator.shape import Shape
from disagg_tt.errors import DeviceError, NotEmulatedError


class ShardSpec:
    """Shards of `shape` (height, width), in elements, one on each core of `grid`, dealt along rows or columns."""

    __slots__ = ("_key", "grid", "orientation", "shape")

    def __init__(self, grid: CoreRangeSet, shard_shape: Any, shard_orientation: ShardOrientation):
        shape = Shape(shard_shape)
        if (
            len(shape) != 2
            or not isinstance(grid, CoreRangeSet)
            or not isinstance(shard_orientation, ShardOrientation)
        ):
            raise TypeError(
                f"ShardSpec({grid!r}, {list(shape)}, {shard_orientation!r}): it takes a CoreRangeSet, "
                "[height, width] and a ShardOrientation"
            )
        self.grid, self.shape, self.orientation = grid, shape, shard_orientation
        self._key = (grid, tuple(shape), shard_orientation)

    def num_cores(self) -> int:
        return self.grid.num_cores()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardSpec) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"ShardSpec(grid={self.grid}, shape={list(self.shape)}, orientation={self.orientation!r})"


class MemoryConfig:
    """A place for tensors; `shard_spec` says how a sharded one is cut. Compared and hashed by value."""

    __slots__ = ("_hash", "_key", "buffer_type", "memory_layout", "shard_spec")

    nd_shard_spec = None

    def __init__(
        self,
        memory_layout: TensorMemoryLayout = TensorMemoryLayout.INTERLEAVED,
        buffer_type: BufferType = BufferType.DRAM,
        shard_spec: ShardSpec | None = None,
        *,
        nd_shard_spec: Any = None,
    ):
        if nd_shard_spec is not None or memory_layout is TensorMemoryLayout.ND_SHARDED:
            raise NotEmulatedError(
                "MemoryConfig: the emulator does not have ND sharding; use HEIGHT_SHARDED, WIDTH_SHARDED or BLOCK_SHARDED"
            )
        if not isinstance(memory_layout, TensorMemoryLayout) or not isinstance(buffer_type, BufferType):
            raise TypeError(
                f"MemoryConfig({memory_layout!r}, {buffer_type!r}): it takes a TensorMemoryLayout, then a BufferType; "
                "name buffer_type= to give it alone"
            )
        self.memory_layout, self.buffer_type, self.shard_spec = memory_layout, buffer_type, shard_spec
        self._key = (memory_layout, buffer_type, shard_spec)
        self._hash = hash(self._key)

    @property
    def interleaved(self) -> bool:
        return self.memory_layout is TensorMemoryLayout.INTERLEAVED

    def is_sharded(self) -> bool:
        return self.memory_layout is not TensorMemoryLayout.INTERLEAVED

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, MemoryConfig) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        shard = f", shard {list(self.shard_spec.shape)} on {self.shard_spec.grid}" if self.shard_spec else ""
        return f"{self.memory_layout.name} {self.buffer_type.name}{shard}"


DRAM_MEMORY_CONFIG = MemoryConfig()
L1_MEMORY_CONFIG = MemoryConfig(buffer_type=BufferType.L1)
L1_HEIGHT_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.HEIGHT_SHARDED, BufferType.L1)
L1_WIDTH_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.WIDTH_SHARDED, BufferType.L1)
L1_BLOCK_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.BLOCK_SHARDED, BufferType.L1)


def create_sharded_memory_config(
    shape: Any,
    core_grid: CoreGrid | CoreRangeSet,
    strategy: ShardStrategy,
    orientation: ShardOrientation | None = None,
    use_height_and_width_as_shard_shape: bool = False,
) -> MemoryConfig:
    """Return an L1 sharded memory config.

    `shape` is a tensor's, which the grid must divide evenly; with use_height_and_width_as_shard_shape its last two
    axes are the shard's own (width and height under COL_MAJOR, as in ttnn). Raises DeviceError.
    """
    what = "create_sharded_memory_config"
    orientation = orientation or ShardOrientation.ROW_MAJOR
    *batch, height, width = shape
    if isinstance(core_grid, CoreGrid):
        cores = CoreRangeSet([CoreRange(CoreCoord(0, 0), CoreCoord(core_grid.x - 1, core_grid.y - 1))])
    elif isinstance(core_grid, CoreRangeSet):
        cores = core_grid
    else:
        raise DeviceError(
            f"{what}: core_grid is a {type(core_grid).__name__}; allowed: CoreGrid, CoreRangeSet"
        )
    if use_height_and_width_as_shard_shape:
        shard = (height, width) if orientation is ShardOrientation.ROW_MAJOR else (width, height)
    elif isinstance(core_grid, CoreGrid):
        shard = _even_shard(what, (math.prod(batch) * height, width), core_grid, strategy, orientation)
    else:
        raise DeviceError(
            f"{what}: with a CoreRangeSet give the shard's shape and use_height_and_width_as_shard_shape=True"
        )
    return _in_shards(strategy, cores, Shape(shard), orientation)


@lru_cache(maxsize=1024)
def _in_shards(
    strategy: ShardStrategy, cores: CoreRangeSet, shard: Shape, orientation: ShardOrientation
) -> MemoryConfig:
    layout = TensorMemoryLayout[f"{strategy.name}_SHARDED"]
    return MemoryConfig(layout, BufferType.L1, ShardSpec(cores, shard, orientation))


def _even_shard(
    what: str, size: tuple[int, int], grid: CoreGrid, strategy: ShardStrategy, orientation: ShardOrientation
) -> tuple[int, int]:
    """Return the (height, width) of a shard of a tensor of `size`; raises DeviceError where the grid does not divide it."""
    if strategy is ShardStrategy.HEIGHT:
        parts = (grid.num_cores, 1)
    elif strategy is ShardStrategy.WIDTH:
        parts = (1, grid.num_cores)
    else:
        parts = (grid.y, grid.x) if orientation is ShardOrientation.ROW_MAJOR else (grid.x, grid.y)
    if size[0] % parts[0] or size[1] % parts[1]:
        raise DeviceError(
            f"{what}: {size[0]}x{size[1]} elements over {parts[0]}x{parts[1]} {strategy.name} shards of {grid}; "
            "it must divide evenly"
        )
    return size[0] // parts[0], size[1] // parts[1]
