"""Specs: what a tensor is on one chip. Interned, so that equal specs are one object and a plan is found by identity."""

from __future__ import annotations

import math
from typing import Any

from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    TILE_SIZE,
    BufferType,
    DataType,
    Layout,
    MemoryConfig,
    Shape,
    ShardSpec,
    TensorMemoryLayout,
)
from disagg_tt.errors import DeviceError


class Spec:
    """A tensor's shape, padded shape, dtype, layout and memory config on one chip; interned by `make_spec`.

    `bytes` is the packed size, `page` that of one page: a tile, or a row (of a shard) in ROW_MAJOR layout.
    """

    __slots__ = ("bytes", "dtype", "layout", "memory_config", "padded_shape", "page", "shape")

    def __init__(
        self, shape: Shape, padded: Shape, dtype: DataType, layout: Layout, memory_config: MemoryConfig
    ):
        self.shape, self.padded_shape, self.dtype, self.layout = shape, padded, dtype, layout
        self.memory_config = memory_config
        self.bytes = dtype.bytes_of(math.prod(padded))
        shard = memory_config.shard_spec
        row = (padded[-1] if padded else 1) if shard is None else shard.shape[1]
        self.page = dtype.bytes_of(TILE_SIZE * TILE_SIZE if layout is Layout.TILE else row)

    def __repr__(self) -> str:
        padded = "" if self.padded_shape == self.shape else f" padded to {list(self.padded_shape)}"
        return f"{list(self.shape)}{padded} {self.dtype.value} {self.layout.name} {self.memory_config!r}"


_specs: dict[Any, Spec] = {}


def make_spec(
    shape: Any,
    dtype: DataType,
    layout: Layout,
    memory_config: MemoryConfig | None = None,
    padded: Any = None,
) -> Spec:
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
    memory_config = memory_config or DRAM_MEMORY_CONFIG
    if padded is None:
        padded = tile_padded(shape) if layout is Layout.TILE else shape
    _check_shard(padded, layout, memory_config)
    spec = Spec(shape, Shape(padded), dtype, layout, memory_config)
    canonical = (tuple(shape), dtype, layout, memory_config, tuple(spec.padded_shape))
    spec = _specs.setdefault(canonical, spec)
    _specs[key] = spec
    return spec


def _check_shard(padded: Any, layout: Layout, place: MemoryConfig) -> None:
    """Raise DeviceError unless a tensor of this padded shape can be cut into the shards of `place`."""
    if not place.is_sharded():
        return
    shard = place.shard_spec
    if shard is None:
        raise DeviceError(f"{place!r} lacks a shard spec; make one with create_sharded_memory_config")
    (height, width), rows, columns = shard.shape, math.prod(padded[:-1]), padded[-1]
    if layout is Layout.TILE and (height % TILE_SIZE or width % TILE_SIZE):
        raise DeviceError(
            f"shard {height}x{width} of a tensor in TILE layout; it must be whole tiles of {TILE_SIZE}x{TILE_SIZE}"
        )
    if place.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED and width != columns:
        raise DeviceError(
            f"height shards are {width} wide, the tensor {columns}; they must be as wide as the tensor"
        )
    if place.memory_layout is TensorMemoryLayout.WIDTH_SHARDED and height != rows:
        raise DeviceError(
            f"width shards are {height} high, the tensor {rows}; they must be as high as the tensor"
        )
    shards, cores = -(-rows // height) * -(-columns // width), shard.grid.num_cores()
    if shards > cores:
        raise DeviceError(
            f"{shards} shards of {height}x{width} for {cores} cores; give a core a shard or larger shards"
        )


def tile_padded(shape: Any) -> tuple[int, ...]:
    """Return `shape` with its last two axes rounded up to whole tiles (a rank-1 shape gets its only axis rounded)."""
    dims = list(shape)
    for axis in range(max(len(dims) - 2, 0), len(dims)):
        dims[axis] = -(-dims[axis] // TILE_SIZE) * TILE_SIZE
    return tuple(dims)


class TensorSpec:
    """ttnn.TensorSpec: shape, dtype, layout and placement, for allocate_tensor_on_device."""

    def __init__(
        self,
        shape: Any,
        dtype: DataType,
        layout: Layout,
        memory_layout: TensorMemoryLayout | BufferType = TensorMemoryLayout.INTERLEAVED,
        shard_spec: ShardSpec | None = None,
        buffer_type: BufferType = BufferType.DRAM,
    ):
        if isinstance(memory_layout, BufferType):
            place = MemoryConfig(TensorMemoryLayout.INTERLEAVED, memory_layout)
        else:
            place = MemoryConfig(memory_layout, buffer_type, shard_spec)
        self.spec = make_spec(shape, dtype, layout, place)

    shape = property(lambda self: self.spec.shape)
    dtype = property(lambda self: self.spec.dtype)
    layout = property(lambda self: self.spec.layout)
    memory_config = property(lambda self: self.spec.memory_config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorSpec) and self.spec is other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"TensorSpec({self.spec!r})"
