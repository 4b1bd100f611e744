"""What matmul, linear and minimal_matmul accept, and the shape, dtype and placement of the product."""

from __future__ import annotations

import math
from functools import lru_cache

from disagg_tt.device.emulator.ops.matmul_config import (
    MatmulMultiCoreReuseMultiCast1DProgramConfig,
    MatmulMultiCoreReuseMultiCastProgramConfig,
    MatmulProgramConfig,
    need_blocks,
)
from disagg_tt.device.emulator.ops.plan import emulated, need, need_tile
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    BufferType,
    CoreCoord,
    DataType,
    MemoryConfig,
    ShardOrientation,
    ShardSpec,
    TensorMemoryLayout,
    num_cores_to_corerangeset,
)


def as_matrix(shape: tuple[int, ...], turned: bool, column: bool) -> tuple[int, ...]:
    """Return the shape that is multiplied: a vector is a row, or on the right a column; then `turned`."""
    if len(shape) == 1:
        shape = (*shape, 1) if column else (1, *shape)
    return (*shape[:-2], shape[-1], shape[-2]) if turned else tuple(shape)


def _product(op: str, a: Spec, b: Spec, turn_a: bool, turn_b: bool) -> tuple[int, ...]:
    """Return the shape of a @ b; raises DeviceError for shapes that ttnn does not multiply."""
    need(
        len(a.shape) > 0 and len(b.shape) > 0, op, f"{list(a.shape)} times {list(b.shape)}; both need an axis"
    )
    left, right = as_matrix(a.shape, turn_a, False), as_matrix(b.shape, turn_b, True)
    need(left[-1] == right[-2], op, f"inner sizes differ: {list(left)} times {list(right)}")
    outer, inner = left[:-2], right[:-2]
    if math.prod(inner) == 1 and all(d == 1 for d in inner):
        lead = (1,) * (len(inner) - len(outer)) + outer
    else:
        alike = len(outer) == len(inner) and (outer == inner or all(d == 1 for d in outer))
        need(
            alike,
            op,
            f"batches of {list(left)} times {list(right)}; the second's must be 1, as the first's, or the first's all 1",
        )
        lead = inner
    rows: tuple[int, ...] = left[-2:-1]
    columns: tuple[int, ...] = right[-1:]
    if len(a.shape) == 1:
        need(rows == (1,), op, f"transpose_a of a vector {list(a.shape)}")
        rows = ()
    if len(b.shape) == 1:
        need(columns == (1,), op, f"transpose_b of a vector {list(b.shape)}")
        columns = ()
    return (*lead, *rows, *columns)


def _with_bias(op: str, shape: tuple[int, ...], bias: Spec | None) -> tuple[int, ...]:
    if bias is None:
        return shape
    need(bias.dtype.is_float, op, f"bias is {bias.dtype.value}; a float is needed")
    pairs = list(zip(reversed(bias.shape), reversed(shape), strict=False))
    need(all(d in (1, s) for d, s in pairs), op, f"bias {list(bias.shape)} for a product {list(shape)}")
    longer = bias.shape[: len(bias.shape) - len(pairs)]
    need(all(d == 1 for d in longer), op, f"bias {list(bias.shape)} for a product {list(shape)}")
    return (*longer, *shape)


def _shards(op: str, place: MemoryConfig, shape: tuple[int, ...], grid: CoreCoord) -> MemoryConfig:
    """Return the sharded placement that ttnn gives a product of interleaved operands: it deals tiles over all cores."""
    emulated(
        math.prod(shape[:-2]) == 1, op, f"shard a product of a batch, {list(shape)}; use to_memory_config"
    )
    rows = -(-shape[-2] // TILE_SIZE) if len(shape) > 1 else 1
    columns, cores = -(-shape[-1] // TILE_SIZE), grid.x * grid.y
    by_rows = place.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED
    emulated(
        (by_rows or place.memory_layout is TensorMemoryLayout.WIDTH_SHARDED)
        and place.buffer_type is BufferType.L1,
        op,
        f"shard a product by blocks or in DRAM, as {place!r}; use to_memory_config",
    )
    each = -(-(rows if by_rows else columns) // cores)
    count = -(-(rows if by_rows else columns) // each)
    size = (each * TILE_SIZE, columns * TILE_SIZE) if by_rows else (rows * TILE_SIZE, each * TILE_SIZE)
    shard = ShardSpec(num_cores_to_corerangeset(count, grid, True), size, ShardOrientation.ROW_MAJOR)
    made = MemoryConfig(place.memory_layout, place.buffer_type, shard)
    emulated(
        place.shard_spec is None or place == made,
        op,
        f"place a product as {place!r}, where ttnn chooses its own shards; use to_memory_config",
    )
    return made


@lru_cache(maxsize=4096)
def product_plan(
    op: str,
    a: Spec,
    b: Spec,
    bias: Spec | None,
    turns: tuple[bool, bool],
    dtype: DataType | None,
    place: MemoryConfig,
    config: MatmulProgramConfig | None,
    has_grid: bool,
    has_activation: bool,
    grid: CoreCoord,
) -> Spec:
    """Return the output's spec of a @ b + bias, each turned as `turns` says; raises DeviceError."""
    need_tile(op, input=a, weight=b)
    need(
        a.dtype.is_float and b.dtype.is_float,
        op,
        f"inputs are {a.dtype.value} and {b.dtype.value}; floats are needed",
    )
    dtype = dtype or a.dtype
    need(dtype.is_float, op, f"dtype {dtype.value} of a product of floats; a float is needed")
    shape = _product(op, a, b, *turns)
    simple = bias is None and not (any(turns) or has_grid or has_activation or config or place.is_sharded())
    flat = math.prod(a.shape[:-2]) == math.prod(b.shape[:-2]) == 1 and len(a.shape) > 1 and len(b.shape) > 1
    by_width = a.memory_config.memory_layout is TensorMemoryLayout.WIDTH_SHARDED
    for spec in (b,) if bias is None else (b, bias):
        emulated(
            not spec.memory_config.is_sharded(), op, f"multiply by shards, {spec!r}; move it to DRAM or L1"
        )
    emulated(
        not a.memory_config.is_sharded() or (by_width and simple and flat),
        op,
        f"multiply shards, {a!r}, in this form; move it to DRAM or L1",
    )
    _need_quirks(op, a, b, bias, turns, place, has_grid, has_activation)
    if place.is_sharded():
        emulated(
            config is None and not has_grid,
            op,
            f"shard a product under a program_config or core_grid, {place!r}; use to_memory_config",
        )
        place = _shards(op, place, shape, grid)
    if config is not None:
        _need_config(op, config, a, b, turns, shape, grid)
    shape = _with_bias(op, shape, bias)
    if (
        bias is None
        and not any(turns)
        and len(a.shape) > 1
        and len(b.shape) > 1
        and shape[:-1] == a.shape[:-1]
    ):
        return make_spec(shape, dtype, a.layout, place, (*a.padded_shape[:-1], b.padded_shape[-1]))
    return make_spec(shape, dtype, a.layout, place)


def _need_quirks(
    op: str,
    a: Spec,
    b: Spec,
    bias: Spec | None,
    turns: tuple[bool, bool],
    place: MemoryConfig,
    has_grid: bool,
    has_activation: bool,
) -> None:
    """Check what ttnn asks only of some of the programs that it chooses from."""
    in_dram = all(m.buffer_type is BufferType.DRAM for m in (a.memory_config, b.memory_config, place))
    batches, batched = math.prod(a.shape[:-2]), math.prod(b.shape[:-2]) > 1
    emulated(
        batches > 1 or not batched or (in_dram and not has_grid),
        op,
        f"multiply {list(a.shape)} by the batch {list(b.shape)} in L1 or on a core_grid; put them and the output in DRAM",
    )
    if has_grid:
        need(len(b.shape) > 1, op, "core_grid with a vector; leave core_grid out")
        need(
            not (has_activation and batched), op, "core_grid and activation with a batch; leave core_grid out"
        )
        tall = batches > 1 and not batched and a.padded_shape[-1] > TILE_SIZE
        need(not (turns[0] and tall), op, "core_grid and transpose_a of a batch; leave core_grid out")
    else:
        emulated(
            bias is None or not any(turns) or in_dram,
            op,
            "multiply with a bias what is transposed in L1, where ttnn mistakes the shape; put the operands and the output in DRAM",
        )
    emulated(
        not (turns[0] and len(b.shape) == 1), op, "multiply what is transposed by a vector; make it a column"
    )


def _need_config(
    op: str,
    config: MatmulProgramConfig,
    a: Spec,
    b: Spec,
    turns: tuple[bool, bool],
    shape: tuple[int, ...],
    grid: CoreCoord,
) -> None:
    emulated(
        isinstance(
            config,
            (MatmulMultiCoreReuseMultiCastProgramConfig, MatmulMultiCoreReuseMultiCast1DProgramConfig),
        )
        and not any(turns)
        and all(d == 1 for d in b.shape[:-2])
        and len(shape) > 1
        and config.fuse_batch
        and not (config.fused_activation or config.allowed_worker_cores)
        and not getattr(config, "gather_in0", False),
        op,
        f"multiply {list(a.shape)} by {list(b.shape)} under this {type(config).__name__}; leave program_config out",
    )
    assert isinstance(
        config, (MatmulMultiCoreReuseMultiCastProgramConfig, MatmulMultiCoreReuseMultiCast1DProgramConfig)
    )
    rows = math.prod(a.padded_shape[:-1]) // TILE_SIZE
    need_blocks(op, config, rows, a.padded_shape[-1] // TILE_SIZE, b.padded_shape[-1] // TILE_SIZE, grid)


@lru_cache(maxsize=1024)
def minimal_plan(a: Spec, b: Spec, bias: Spec | None, dtype: DataType | None, place: MemoryConfig) -> Spec:
    """Return the output's spec of minimal_matmul; raises DeviceError."""
    op = "minimal_matmul"
    inputs = {"input": a, "weight": b} if bias is None else {"input": a, "weight": b, "bias": bias}
    need_tile(op, **inputs)
    for name, spec in inputs.items():
        need(spec.dtype.is_float, op, f"{name} is {spec.dtype.value}; a float is needed")
    dtype, shape = dtype or a.dtype, (*a.shape[:-1], b.shape[-1])
    need(dtype.is_float, op, f"dtype {dtype.value} of a product of floats; a float is needed")
    need(
        len(a.shape) > 1 and len(b.shape) > 1,
        op,
        f"{list(a.shape)} times {list(b.shape)}; both need two axes",
    )
    need(all(d == 1 for d in b.shape[:-2]), op, f"weight {list(b.shape)} must have leading axes of 1")
    need(a.shape[-1] == b.shape[-2], op, f"inner sizes differ: {list(a.shape)} times {list(b.shape)}")
    need(
        not (a.dtype is b.dtype is DataType.FLOAT32) or dtype.is_block_float,
        op,
        f"float32 times float32 as {dtype.value} overflows L1; typecast the inputs to bfloat16",
    )
    if bias is not None:
        width = math.prod(bias.shape) == bias.shape[-1] == b.shape[-1]
        need(width, op, f"bias {list(bias.shape)}; it must be [.., 1, {b.shape[-1]}]")
    return make_spec(shape, dtype, a.layout, place, (*a.padded_shape[:-1], b.padded_shape[-1]))
