"""How a matmul may be cut over the cores: ttnn's program configs, and what they ask of the sizes.

None of it changes the values. Sizes are in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_tt.device.emulator.ops.plan import need
from disagg_tt.device.emulator.types import CoreCoord, CoreRangeSet


@dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseProgramConfig:
    """One core a block of batches; not emulated, made so that the refusal says so."""

    compute_with_storage_grid_size: CoreCoord
    in0_block_w: int
    out_subblock_h: int
    out_subblock_w: int
    per_core_M: int
    per_core_N: int
    allowed_worker_cores: CoreRangeSet | None = None


@dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseMultiCastProgramConfig:
    """Blocks of rows over the grid's rows, blocks of columns over its columns."""

    compute_with_storage_grid_size: CoreCoord
    in0_block_w: int
    out_subblock_h: int
    out_subblock_w: int
    out_block_h: int | None = None
    out_block_w: int | None = None
    per_core_M: int
    per_core_N: int
    transpose_mcast: bool
    fused_activation: object = None
    fuse_batch: bool = True
    allowed_worker_cores: CoreRangeSet | None = None


@dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseMultiCast1DProgramConfig:
    """All rows, blocks of columns over the cores (mcast_in0), or all columns, blocks of rows over the cores."""

    compute_with_storage_grid_size: CoreCoord
    in0_block_w: int
    out_subblock_h: int
    out_subblock_w: int
    out_block_h: int | None = None
    out_block_w: int | None = None
    per_core_M: int
    per_core_N: int
    fuse_batch: bool
    fused_activation: object = None
    mcast_in0: bool
    gather_in0: bool = False
    hop_cores: CoreRangeSet | None = None
    num_global_cb_receivers: int = 1
    untilize_out: bool = False
    allowed_worker_cores: CoreRangeSet | None = None
    stream_in1: bool = False


@dataclass(frozen=True, kw_only=True)
class MatmulMultiCoreReuseMultiCastDRAMShardedProgramConfig:
    """Weights sharded over the DRAM banks; not emulated, made so that the refusal says so."""

    in0_block_w: int
    per_core_M: int
    per_core_N: int
    fused_activation: object = None
    num_workers_per_dram_bank: int = 1


MatmulProgramConfig = (
    MatmulMultiCoreReuseProgramConfig
    | MatmulMultiCoreReuseMultiCastProgramConfig
    | MatmulMultiCoreReuseMultiCast1DProgramConfig
    | MatmulMultiCoreReuseMultiCastDRAMShardedProgramConfig
)


@dataclass(frozen=True, kw_only=True)
class MinimalMatmulConfig:
    """Block sizes of minimal_matmul."""

    M_block_size: int = 1
    K_block_size: int = 1
    N_block_size: int = 1
    subblock_h: int = 1
    subblock_w: int = 1
    compute_with_storage_grid_size: CoreCoord = CoreCoord(1, 1)


def need_blocks(
    op: str,
    config: MatmulMultiCoreReuseMultiCastProgramConfig | MatmulMultiCoreReuseMultiCast1DProgramConfig,
    rows: int,
    inner: int,
    columns: int,
    grid: CoreCoord,
) -> None:
    """Check that [rows, inner] times [inner, columns] can be cut as `config` says on a chip of `grid` cores."""
    name, given = type(config).__name__, config.compute_with_storage_grid_size
    need(
        given.x <= grid.x and given.y <= grid.y,
        op,
        f"{name}: a grid of {given.x}x{given.y}; there are {grid.x}x{grid.y}",
    )
    for field in ("in0_block_w", "out_subblock_h", "out_subblock_w", "per_core_M", "per_core_N"):
        need(
            getattr(config, field) > 0, op, f"{name}: {field} {getattr(config, field)}; it must be 1 or more"
        )
    high, wide = config.out_block_h or config.per_core_M, config.out_block_w or config.per_core_N
    for what, size, part in (
        ("inner tiles, in0_block_w", inner, config.in0_block_w),
        ("per_core_M, out_block_h", config.per_core_M, high),
        ("per_core_N, out_block_w", config.per_core_N, wide),
        ("out_block_h, out_subblock_h", high, config.out_subblock_h),
        ("out_block_w, out_subblock_w", wide, config.out_subblock_w),
    ):
        need(
            size % part == 0, op, f"{name}: {size} {what} {part}; the first must be a multiple of the second"
        )
    need(
        config.out_subblock_h == 1 or config.out_subblock_w == wide,
        op,
        f"{name}: out_subblock_h {config.out_subblock_h}; it must be 1 unless out_subblock_w is {wide}",
    )
    need(
        config.out_subblock_h * config.out_subblock_w <= 8,
        op,
        f"{name}: subblocks of {config.out_subblock_h}x{config.out_subblock_w} tiles; at most 8 fit",
    )
    down, across = -(-rows // config.per_core_M), -(-columns // config.per_core_N)
    if isinstance(config, MatmulMultiCoreReuseMultiCastProgramConfig):
        most_down, most_across = (given.x, given.y) if config.transpose_mcast else (given.y, given.x)
        need(
            config.per_core_M <= rows and config.per_core_N <= columns,
            op,
            f"{name}: {config.per_core_M}x{config.per_core_N} tiles a core of {rows}x{columns}",
        )
    elif config.mcast_in0:
        most_down, most_across = 1, given.x * given.y
    else:
        most_down, most_across = given.x * given.y, 1
    need(
        down <= most_down and across <= most_across,
        op,
        f"{name}: {down}x{across} blocks for {most_down}x{most_across}; give a core more tiles",
    )
