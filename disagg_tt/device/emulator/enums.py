"""ttnn's enumerations: dtypes, layouts, buffers, memory layouts, fabrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Named(Enum):
    """An enum whose members hash by identity, which is several times faster: each op looks its plan up by some."""

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class DataType(Named):
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
        return elements * _BYTES[self.value]


_FLOATS = {DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B, DataType.BFLOAT4_B}
_BYTES = {"float32": 4, "uint32": 4, "int32": 4, "bfloat16": 2, "uint16": 2, "uint8": 1}


class Layout(Named):
    ROW_MAJOR = 0
    TILE = 1


class StorageType(Named):
    HOST = 0
    DEVICE = 1


class BufferType(Named):
    DRAM = 0
    L1 = 1
    L1_SMALL = 3
    TRACE = 4


class TensorMemoryLayout(Named):
    INTERLEAVED = 0
    HEIGHT_SHARDED = 2
    WIDTH_SHARDED = 3
    BLOCK_SHARDED = 4
    ND_SHARDED = 5


class ShardOrientation(Named):
    ROW_MAJOR = 0
    COL_MAJOR = 1


class ShardStrategy(Named):
    HEIGHT = 1
    WIDTH = 2
    BLOCK = 3


class FabricConfig(Named):
    DISABLED = 0
    FABRIC_1D = 1
    FABRIC_1D_RING = 2
    FABRIC_1D_NEIGHBOR_EXCHANGE = 3
    FABRIC_2D = 4
    FABRIC_2D_TORUS_XY = 5
    FABRIC_2D_TORUS_X = 6
    FABRIC_2D_TORUS_Y = 7
    CUSTOM = 8


class DumpTensorMode(Named):
    DISTRIBUTED_GATHER = 0
    LOCAL = 1


class Arch(Named):
    WORMHOLE_B0 = 2
    BLACKHOLE = 3
    QUASAR = 4


class DispatchCoreType(Named):
    WORKER = 0
    ETH = 1


class DispatchCoreAxis(Named):
    ROW = 0
    COL = 1


@dataclass(frozen=True)
class DispatchCoreConfig:
    """Which cores dispatch work; an N300's default is ETH."""

    type: DispatchCoreType | None = None
    axis: DispatchCoreAxis | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", self.type or DispatchCoreType.ETH)
