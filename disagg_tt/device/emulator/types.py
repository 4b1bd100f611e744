"""ttnn's small value types: dtypes, layouts, shapes, core grids, memory and kernel configurations.

Names, arguments and comparison follow ttnn 0.81. Value types compare by value; TensorSpec is interned, so that two equal
specs are the same object and a validated call can be looked up by identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch

from disagg_tt.errors import DeviceError

TILE_SIZE = 32


class _Named(Enum):
    """An enum whose members hash by identity, which is several times faster: each op looks its plan up by some."""

    __hash__ = object.__hash__


class DataType(_Named):
    """Element types. `bits` is the size of one element in a packed tile (block floats add one exponent byte a row of 16)."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    UINT32 = "uint32"
    INT32 = "int32"
    UINT16 = "uint16"
    UINT8 = "uint8"
    BFLOAT8_B = "bfloat8_b"
    BFLOAT4_B = "bfloat4_b"

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_block_float(self) -> bool:
        return self in (DataType.BFLOAT8_B, DataType.BFLOAT4_B)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds emulated values: float32 for floats, int64 for integers (exact for uint32)."""
        return torch.float32 if self.is_float else torch.int64

    def bytes_of(self, elements: int) -> int:
        """Return the packed size in bytes of `elements` elements (whole rows of 16 for block floats)."""
        if self is DataType.BFLOAT8_B:
            return elements + elements // 16
        if self is DataType.BFLOAT4_B:
            return elements // 2 + elements // 16
        return (
            elements
            * {"float32": 4, "uint32": 4, "int32": 4, "bfloat16": 2, "uint16": 2, "uint8": 1}[self.value]
        )


_FLOATS = {DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B, DataType.BFLOAT4_B}


class Layout(_Named):
    ROW_MAJOR = 0
    TILE = 1


class BufferType(_Named):
    DRAM = 0
    L1 = 1


class TensorMemoryLayout(_Named):
    INTERLEAVED = 0
    HEIGHT_SHARDED = 2
    WIDTH_SHARDED = 3
    BLOCK_SHARDED = 4


class ShardOrientation(_Named):
    ROW_MAJOR = 0
    COL_MAJOR = 1


class ShardStrategy(Enum):
    HEIGHT = 1
    WIDTH = 2
    BLOCK = 3


class MathFidelity(_Named):
    LoFi = 0
    HiFi2 = 2
    HiFi3 = 3
    HiFi4 = 4


class UnaryOpType(_Named):
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


class FabricConfig(Enum):
    DISABLED = 0
    FABRIC_1D = 1
    FABRIC_2D = 2


class DispatchCoreType(Enum):
    WORKER = 0
    ETH = 1


@dataclass(frozen=True)
class DispatchCoreConfig:
    type: DispatchCoreType = DispatchCoreType.ETH


class Shape(tuple):
    """A tensor shape; compares equal to any sequence of the same numbers, as ttnn.Shape does."""

    def __new__(cls, dims: Any) -> Shape:
        return super().__new__(cls, (int(d) for d in dims))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (tuple, list)) else NotImplemented

    __hash__ = tuple.__hash__

    @property
    def rank(self) -> int:
        return len(self)

    def __repr__(self) -> str:
        return f"Shape({list(self)})"


@dataclass(frozen=True)
class CoreCoord:
    x: int
    y: int


@dataclass(frozen=True)
class CoreRange:
    start: CoreCoord
    end: CoreCoord

    def num_cores(self) -> int:
        return (self.end.x - self.start.x + 1) * (self.end.y - self.start.y + 1)


class CoreRangeSet:
    """A set of core rectangles."""

    def __init__(self, ranges: Any):
        self._ranges = tuple(ranges)

    def ranges(self) -> list[CoreRange]:
        return list(self._ranges)

    def num_cores(self) -> int:
        return sum(r.num_cores() for r in self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoreRangeSet) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(self._ranges)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"[{r.start.x}-{r.start.y} - {r.end.x}-{r.end.y}]" for r in self._ranges) + "}"


@lru_cache(maxsize=256)
def num_cores_to_corerangeset(target: int, grid: CoreCoord, row_wise: bool = False) -> CoreRangeSet:
    """Return the first `target` cores of `grid`, row by row (or column by column); raises DeviceError if too few."""
    if not 0 < target <= grid.x * grid.y:
        raise DeviceError(
            f"{target} cores asked of a grid of {grid.x}x{grid.y}; at most {grid.x * grid.y} are there"
        )
    along = grid.x if row_wise else grid.y
    full, rest = divmod(target, along)
    boxes = [(0, 0, along - 1, full - 1)] * bool(full) + [(0, full, rest - 1, full)] * bool(rest)
    if not row_wise:
        boxes = [(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes]
    return CoreRangeSet(CoreRange(CoreCoord(x0, y0), CoreCoord(x1, y1)) for x0, y0, x1, y1 in boxes)


@dataclass(frozen=True)
class ShardSpec:
    grid: CoreRangeSet
    shape: tuple[int, int]
    orientation: ShardOrientation = ShardOrientation.ROW_MAJOR


@dataclass(frozen=True)
class MemoryConfig:
    """Where a tensor lies: interleaved over banks, or sharded over cores by `shard_spec`."""

    memory_layout: TensorMemoryLayout = TensorMemoryLayout.INTERLEAVED
    buffer_type: BufferType = BufferType.DRAM
    shard_spec: ShardSpec | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.memory_layout, self.buffer_type, self.shard_spec)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def is_sharded(self) -> bool:
        return self.memory_layout is not TensorMemoryLayout.INTERLEAVED

    def __repr__(self) -> str:
        shard = f", shard {list(self.shard_spec.shape)} on {self.shard_spec.grid}" if self.shard_spec else ""
        return f"{self.memory_layout.name} {self.buffer_type.name}{shard}"


DRAM_MEMORY_CONFIG = MemoryConfig()
L1_MEMORY_CONFIG = MemoryConfig(buffer_type=BufferType.L1)
L1_HEIGHT_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.HEIGHT_SHARDED, BufferType.L1)
L1_WIDTH_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.WIDTH_SHARDED, BufferType.L1)


def create_sharded_memory_config(
    shape: Any,
    core_grid: CoreRangeSet,
    strategy: ShardStrategy,
    orientation: ShardOrientation | None = None,
    use_height_and_width_as_shard_shape: bool = False,
) -> MemoryConfig:
    """Return an L1 sharded memory config; only the form that gives the shard's own height and width is supported."""
    if not use_height_and_width_as_shard_shape:
        raise DeviceError(
            "create_sharded_memory_config: pass use_height_and_width_as_shard_shape=True with the shard's shape"
        )
    layout = TensorMemoryLayout[f"{strategy.name}_SHARDED"]
    shard = ShardSpec(core_grid, (int(shape[-2]), int(shape[-1])), orientation or ShardOrientation.ROW_MAJOR)
    return MemoryConfig(layout, BufferType.L1, shard)


@dataclass(frozen=True)
class WormholeComputeKernelConfig:
    math_fidelity: MathFidelity = MathFidelity.HiFi2
    math_approx_mode: bool = True
    fp32_dest_acc_en: bool = False
    packer_l1_acc: bool = False
    dst_full_sync_en: bool = False


@dataclass(frozen=True)
class SDPAProgramConfig:
    compute_with_storage_grid_size: CoreCoord
    q_chunk_size: int
    k_chunk_size: int
    exp_approx_mode: bool | None = None
    max_cores_per_head_batch: int = 16

    def __init__(self, *, compute_with_storage_grid_size: CoreCoord, q_chunk_size: int, k_chunk_size: int,
                 exp_approx_mode: bool | None = None, max_cores_per_head_batch: int = 16):  # fmt: skip
        for name, size in (("q_chunk_size", q_chunk_size), ("k_chunk_size", k_chunk_size)):
            if size % TILE_SIZE or size <= 0:
                raise DeviceError(
                    f"SDPAProgramConfig: {name} is {size}; it must be a positive multiple of {TILE_SIZE}"
                )
        for name, value in list(locals().items()):
            if name in type(self).__dataclass_fields__:
                object.__setattr__(self, name, value)


class MeshShape(tuple):
    """Rows and columns of a mesh: MeshShape(1, 2)."""

    def __new__(cls, *dims: Any) -> MeshShape:
        return super().__new__(cls, (int(d) for d in (dims[0] if len(dims) == 1 else dims)))

    def mesh_size(self) -> int:
        return math.prod(self)

    def __repr__(self) -> str:
        return f"MeshShape({list(self)})"


class MeshCoordinate(tuple):
    """A chip's place in a mesh: MeshCoordinate(0, 1)."""

    def __new__(cls, *dims: Any) -> MeshCoordinate:
        return super().__new__(
            cls, (int(d) for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims))
        )

    def __repr__(self) -> str:
        return f"MeshCoordinate({list(self)})"
