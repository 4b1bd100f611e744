"""Normalisation of rows: rms_norm and layer_norm, with weight, bias and a residual added first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    CoreCoord,
    DataType,
    Layout,
    MemoryConfig,
    ShardOrientation,
    TensorMemoryLayout,
    WormholeComputeKernelConfig,
)
from disagg_tt.errors import NotEmulatedError


@dataclass(frozen=True)
class LayerNormDefaultProgramConfig:
    """How the kernels of an interleaved input work; the values do not depend on it."""

    legacy_reduction: bool = False
    legacy_rsqrt: bool = False
    use_welford: bool = False


@dataclass(frozen=True)
class LayerNormShardedMultiCoreProgramConfig:
    """The blocks, in tiles, of a sharded input: each core's is block_h x block_w."""

    compute_with_storage_grid_size: CoreCoord
    subblock_w: int
    block_h: int
    block_w: int
    inplace: bool = False
    legacy_reduction: bool = False
    legacy_rsqrt: bool = False
    use_welford: bool = False


ProgramConfig = LayerNormDefaultProgramConfig | LayerNormShardedMultiCoreProgramConfig


def _uses_welford(config: ProgramConfig | None) -> bool:
    return config is not None and config.use_welford


def _need_row(op: str, name: str, row: Spec, x: Spec) -> None:
    """`row` (weight or bias) must hold one value for each column of `x`: folded into rows of 32, or a row of tiles."""
    width = x.padded_shape[-1]
    blocks = (DataType.BFLOAT8_B, DataType.BFLOAT4_B) if row.layout is Layout.TILE else ()
    need_dtype(op, name, row, DataType.BFLOAT16, DataType.FLOAT32, *blocks)
    if row.layout is Layout.ROW_MAJOR:
        folded = row.shape[-1] == TILE_SIZE and math.prod(row.shape) // TILE_SIZE == width // TILE_SIZE
        need(
            folded,
            op,
            f"ROW_MAJOR {name} {list(row.shape)} for width {x.shape[-1]}; it must be folded to "
            f"[1, 1, {width // TILE_SIZE}, {TILE_SIZE}]",
        )
        return
    need(
        row.padded_shape[-1] == width and row.shape[-1] >= x.shape[-1],
        op,
        f"{name} {list(row.shape)} for width {x.shape[-1]}; the widths must be the same",
    )
    need(row.padded_shape[-2] == TILE_SIZE, op, f"{name} {row!r} must be one row of tiles")


@lru_cache(maxsize=4096)
def _plan(
    op: str,
    x: Spec,
    weight: Spec | None,
    bias: Spec | None,
    residual: Spec | None,
    memory_config: MemoryConfig | None,
    config: ProgramConfig | None,
) -> Spec:
    if op == "rms_norm" or x.shape[-1] % TILE_SIZE:
        need_tile(op, input=x)
    need(
        not (_uses_welford(config) and x.layout is Layout.ROW_MAJOR),
        op,
        "use_welford needs an input in TILE layout",
    )
    need_dtype(op, "input", x, DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)
    if residual is not None:
        need_tile(op, residual_input_tensor=residual)
        same = (residual.shape, residual.padded_shape) == (x.shape, x.padded_shape)
        need(same, op, f"residual {residual!r} of input {x!r}; their shapes must be the same")
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None:
            _need_row(op, name, row, x)
    if weight is not None and bias is not None:
        need(
            weight.layout is bias.layout, op, f"weight {weight!r} and bias {bias!r} must have the same layout"
        )
    if isinstance(config, LayerNormShardedMultiCoreProgramConfig) and config.inplace:
        raise NotEmulatedError(f"{op}: the emulator does not write into its input; use inplace=False")
    place = memory_config or x.memory_config
    blocks = isinstance(config, LayerNormShardedMultiCoreProgramConfig)
    need(
        not blocks or x.memory_config.is_sharded(),
        op,
        f"{config!r} of interleaved input {x!r}; shard it first",
    )
    if x.memory_config.is_sharded():
        _need_blocks(op, x, place, residual, config)
        if place.shard_spec is None:
            place = MemoryConfig(place.memory_layout, place.buffer_type, x.memory_config.shard_spec)
    return make_spec(x.shape, x.dtype, x.layout, place, x.padded_shape)


def _need_blocks(
    op: str, x: Spec, out: MemoryConfig, residual: Spec | None, config: ProgramConfig | None
) -> None:
    """Check the placement of a sharded input, its output and its program config."""
    place, height_sharded = x.memory_config, TensorMemoryLayout.HEIGHT_SHARDED
    need(
        place.memory_layout is not height_sharded,
        op,
        f"input {x!r} is height sharded; use width or block shards",
    )
    need(
        out.is_sharded() and out.memory_layout is not height_sharded,
        op,
        f"output {out!r} of sharded input {x!r}; it must be width or block sharded too",
    )
    if residual is not None:
        need(
            residual.memory_config == place,
            op,
            f"residual {residual!r} must be placed as the input, {place!r}",
        )
    need(
        (out.memory_layout, out.buffer_type) == (place.memory_layout, place.buffer_type),
        op,
        f"output {out!r} must be placed as the input, {place!r}",
    )
    if config is None:
        return
    sharded_config = isinstance(config, LayerNormShardedMultiCoreProgramConfig)
    need(sharded_config, op, f"{config!r} of sharded input {x!r}; use LayerNormShardedMultiCoreProgramConfig")
    assert isinstance(config, LayerNormShardedMultiCoreProgramConfig)
    shard = place.shard_spec
    assert shard is not None
    tall, wide = math.prod(x.padded_shape[:-1]) // TILE_SIZE, x.padded_shape[-1] // TILE_SIZE
    end = [max(getattr(r.end, axis) for r in shard.grid.ranges()) + 1 for axis in "xy"]
    across, down = end if shard.orientation is ShardOrientation.ROW_MAJOR else end[::-1]
    if tall == config.block_h:
        across, down = shard.grid.num_cores(), 1
    blocks = (tall // down, -(-wide // across))
    need(
        (config.block_h, config.block_w) == blocks and config.block_w % config.subblock_w == 0,
        op,
        f"program_config has blocks of {config.block_h}x{config.block_w} tiles, subblock_w {config.subblock_w}; "
        f"the input's shards are {blocks[0]}x{blocks[1]} and subblock_w must divide block_w",
    )


def _rms_norm(
    values: torch.Tensor, shape: tuple[int], weight: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """The same numbers as F.rms_norm, which takes longer: by a fifth for 32 rows, by more for many."""
    out = values * torch.mean(values * values, -1, keepdim=True).add_(epsilon).rsqrt_()
    return out if weight is None else out.mul_(weight)


def _layer_norm(
    values: torch.Tensor, shape: tuple[int], weight: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    return F.layer_norm(values, shape, weight, None, epsilon)


def _row(values: torch.Tensor, axes: int, width: int) -> torch.Tensor:
    """Return the first `width` values of each chip, [chips or 1, 1, ..., width]: folded rows, or the first of a tile's."""
    row = values.flatten(1)[:, :width]
    return row.view(row.shape[0], *(1,) * (axes - 2), width)


def _norm(
    op: str,
    x: Tensor,
    epsilon: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    memory_config: MemoryConfig | None,
    program_config: ProgramConfig | None,
) -> Tensor:
    need(isinstance(epsilon, (int, float)), op, f"epsilon {epsilon!r} must be a number")
    source = x.spec
    spec = _plan(
        op,
        source,
        None if weight is None else weight.spec,
        None if bias is None else bias.spec,
        None if residual is None else residual.spec,
        memory_config,
        program_config,
    )
    width, exact = spec.shape[-1], spec.dtype is DataType.FLOAT32
    given = [t for t in (weight, bias, residual) if t is not None]
    normalise = _rms_norm if op == "rms_norm" else _layer_norm

    def compute(values: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if exact:
            values, others = values.double(), tuple(t.double() for t in others)
        if values.shape[-1] != width:
            values = whole(values, source)
        if residual is not None:
            added = others[-1]
            if added.shape[1:] != values.shape[1:]:  # more of one is defined
                values, added = whole(values, source), whole(added, residual.spec)
            values = values + added
        scale = None if weight is None else others[0]
        if scale is None or scale.numel() == width:
            out = normalise(values, (width,), None if scale is None else scale.reshape(-1), epsilon)
        else:
            out = normalise(values, (width,), None, epsilon) * _row(scale, values.dim(), width)
        if bias is not None:
            out = out + _row(others[weight is not None], values.dim(), width)
        return round_on_device(out.to(torch.float32) if exact else out, spec.dtype)

    return launch(op, spec, compute, x, *given)


def rms_norm(
    input_tensor: Tensor,
    *,
    epsilon: float = 1e-12,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_input_tensor: Tensor | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: ProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return y / sqrt(mean(y^2) + epsilon) * weight + bias over the last axis, y being input + residual.

    Weight and bias: one value a column, folded to [1, 1, width / 32, 32] in ROW_MAJOR, or [1, 1, 1, width] in TILE
    layout. Note ttnn's default epsilon. Raises DeviceError for what the device rejects.
    """
    need(not _uses_welford(program_config), "rms_norm", "use_welford is for layer_norm only")
    return _norm(
        "rms_norm", input_tensor, epsilon, weight, bias, residual_input_tensor, memory_config, program_config
    )


def layer_norm(
    input_tensor: Tensor,
    *,
    epsilon: float = 1e-12,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_input_tensor: Tensor | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: ProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    recip_tensor: Tensor | None = None,
) -> Tensor:
    """Return (y - mean(y)) / sqrt(variance(y) + epsilon) * weight + bias; the rest is as for rms_norm."""
    if recip_tensor is not None:
        raise NotEmulatedError("layer_norm: the emulator does not take a recip_tensor; leave it out")
    return _norm(
        "layer_norm",
        input_tensor,
        epsilon,
        weight,
        bias,
        residual_input_tensor,
        memory_config,
        program_config,
    )
