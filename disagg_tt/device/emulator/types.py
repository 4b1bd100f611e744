"""ttnn's small value types in one place: enumerations, shapes, cores, memory and kernel configurations.

Names, arguments and comparison follow ttnn 0.81. Value types compare by value.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_tt.device.emulator.coordinates import (
    MeshCoordinate,
    MeshCoordinateRange,
    MeshCoordinateRangeSet,
    MeshShape,
)
from disagg_tt.device.emulator.cores import (
    CoreCoord,
    CoreGrid,
    CoreRange,
    CoreRangeSet,
    corerange_to_cores,
    grid_to_cores,
    num_cores_to_corerangeset,
    num_cores_to_corerangeset_in_subcoregrids,
)
from disagg_tt.device.emulator.enums import (
    Arch,
    BufferType,
    DataType,
    DispatchCoreAxis,
    DispatchCoreConfig,
    DispatchCoreType,
    DumpTensorMode,
    FabricConfig,
    Layout,
    Named,
    ShardOrientation,
    ShardStrategy,
    StorageType,
    TensorMemoryLayout,
)
from disagg_tt.device.emulator.memory_config import (
    DRAM_MEMORY_CONFIG,
    L1_BLOCK_SHARDED_MEMORY_CONFIG,
    L1_HEIGHT_SHARDED_MEMORY_CONFIG,
    L1_MEMORY_CONFIG,
    L1_WIDTH_SHARDED_MEMORY_CONFIG,
    MemoryConfig,
    ShardSpec,
    create_sharded_memory_config,
)
from disagg_tt.device.emulator.shape import TILE_SIZE, Shape, Tile, tile_size

__all__ = [
    "Arch",
    "BufferType",
    "CoreCoord",
    "CoreGrid",
    "CoreRange",
    "CoreRangeSet",
    "DRAM_MEMORY_CONFIG",
    "DataType",
    "DispatchCoreAxis",
    "DispatchCoreConfig",
    "DispatchCoreType",
    "DumpTensorMode",
    "FabricConfig",
    "L1_BLOCK_SHARDED_MEMORY_CONFIG",
    "L1_HEIGHT_SHARDED_MEMORY_CONFIG",
    "L1_MEMORY_CONFIG",
    "L1_WIDTH_SHARDED_MEMORY_CONFIG",
    "Layout",
    "MathFidelity",
    "MemoryConfig",
    "MeshCoordinate",
    "MeshCoordinateRange",
    "MeshCoordinateRangeSet",
    "MeshShape",
    "SDPAProgramConfig",
    "Shape",
    "ShardOrientation",
    "ShardSpec",
    "ShardStrategy",
    "StorageType",
    "TILE_SIZE",
    "TensorMemoryLayout",
    "Tile",
    "WormholeComputeKernelConfig",
    "corerange_to_cores",
    "create_sharded_memory_config",
    "grid_to_cores",
    "num_cores_to_corerangeset",
    "num_cores_to_corerangeset_in_subcoregrids",
    "tile_size",
]


class MathFidelity(Named):
    LoFi = 0
    HiFi2 = 2
    HiFi3 = 3
    HiFi4 = 4


@dataclass(frozen=True)
class WormholeComputeKernelConfig:
    math_fidelity: MathFidelity = MathFidelity.HiFi2
    math_approx_mode: bool = True
    fp32_dest_acc_en: bool = False
    packer_l1_acc: bool = False
    dst_full_sync_en: bool = False


@dataclass(frozen=True, kw_only=True)
class SDPAProgramConfig:
    """How attention is cut over the cores; its ops check the chunk sizes. None of it changes the values."""

    compute_with_storage_grid_size: CoreCoord
    sub_core_grids: CoreRangeSet | None = None
    q_chunk_size: int
    k_chunk_size: int
    exp_approx_mode: bool | None = None
    max_cores_per_head_batch: int = 16
    max_k_splits: int = 1
    matmul_math_fidelity: MathFidelity | None = None
    segmented_accumulation: bool = False
