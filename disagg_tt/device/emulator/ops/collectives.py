"""Collectives over the chips of a mesh: all_gather, reduce_scatter, all_reduce, all_broadcast and broadcast."""

from __future__ import annotations

from functools import lru_cache
from typing import NoReturn

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.lines import lines_of
from disagg_tt.device.emulator.ops.moves import L1_ALIGNMENT
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    TILE_SIZE,
    CoreRangeSet,
    DataType,
    Layout,
    MemoryConfig,
    MeshCoordinate,
    WormholeComputeKernelConfig,
)
from disagg_tt.errors import NotEmulatedError


def _summed(parts: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return the sums over axis 1 as `spec`'s dtype holds them; integers wrap around."""
    total = parts.sum(dim=1)
    if spec.dtype.is_float:
        return round_on_device(total, spec.dtype)
    bits = 8 * spec.dtype.bytes_of(1)
    if spec.dtype is DataType.INT32:
        return (total + 2**31) % 2**32 - 2**31
    return total % 2**bits


def _need_whole_blocks(op: str, a: Spec, axis: int, size: int) -> None:
    """What is not cut at tiles goes through ROW_MAJOR, for which bfloat8_b is unpacked, but bfloat4_b is not."""
    need(
        a.dtype is not DataType.BFLOAT4_B or not _inside_tiles(a, axis, size),
        op,
        f"axis {axis} of {a!r}; bfloat4_b is cut and joined at whole tiles only",
    )


def _inside_tiles(a: Spec, axis: int, size: int) -> bool:
    return a.layout is Layout.TILE and axis >= len(a.shape) - 2 and size % TILE_SIZE != 0


def _need_interleaved(op: str, a: Spec, place: MemoryConfig) -> None:
    emulated(
        not (a.memory_config.is_sharded() or place.is_sharded()),
        op,
        f"work on shards, {a!r} into {place!r}; move it to DRAM or L1 and back",
    )


def _axis(op: str, dim: int, spec: Spec) -> int:
    rank = len(spec.shape)
    need(
        -rank <= dim < rank,
        op,
        f"dim {dim} of a tensor of {rank} axes; it must be from {-rank} to {rank - 1}",
    )
    return dim % rank


@lru_cache(maxsize=1024)
def _gather_plan(a: Spec, axis: int, chips: int, memory_config: MemoryConfig | None) -> Spec:
    op, shape = "all_gather", list(a.shape)
    shape[axis] *= chips
    _need_whole_blocks(op, a, axis, a.shape[axis])
    emulated(
        memory_config is not None or not a.memory_config.is_sharded(),
        op,
        f"choose the shards of its output for an input {a!r}; pass memory_config",
    )
    place = placed(memory_config, a.memory_config)
    if _inside_tiles(a, axis, a.shape[axis]):
        emulated(
            place == a.memory_config == DRAM_MEMORY_CONFIG,
            op,
            f"join axis {axis} of {a!r} inside tiles outside DRAM, as {place!r}; use DRAM, or whole tiles",
        )
    interleaved_rows = a.layout is Layout.ROW_MAJOR and not (
        place.is_sharded() or a.memory_config.is_sharded()
    )
    if interleaved_rows and axis == len(shape) - 1 and a.page % L1_ALIGNMENT:
        # ttnn joins such rows as tiles, in DRAM, whatever was asked for
        return make_spec(shape, a.dtype, a.layout, DRAM_MEMORY_CONFIG)
    emulated(
        a.layout is Layout.TILE
        or place == a.memory_config
        or (a.page % 32 == 0 and not a.memory_config.is_sharded()),
        op,
        f"move rows of {a.page} B, {a!r}, to {place!r}; leave memory_config out, or use interleaved rows of a multiple of 32 B",
    )
    return make_spec(shape, a.dtype, a.layout, place)


def all_gather(
    input_tensor: Tensor,
    dim: int,
    *,
    cluster_axis: int | None = None,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    subdevice_id: object = None,
    sub_core_grids: CoreRangeSet | None = None,
    num_links: int | None = None,
    topology: object = None,
    chunks_per_sync: int | None = None,
    num_workers_per_link: int | None = None,
    num_buffers_per_channel: int | None = None,
    use_l1_small_for_semaphores: bool = False,
) -> Tensor:
    """Return the shards of all chips of a line joined along `dim`, on every chip of it."""
    op = "all_gather"
    leave_out(op, output_tensor=output_tensor, subdevice_id=subdevice_id, sub_core_grids=sub_core_grids)
    lines = lines_of(op, on_device(op, input_tensor).shape, cluster_axis)
    source = input_tensor.spec
    axis = _axis(op, dim, source)
    spec = _gather_plan(source, axis, lines.length, memory_config)
    last = axis == len(source.shape) - 1

    def compute(a: torch.Tensor) -> torch.Tensor:
        if not last:
            a = whole(a, source)
        return lines.give(torch.cat(lines.split(a).unbind(1), dim=axis + 1))

    return launch(op, spec, compute, input_tensor)


@lru_cache(maxsize=1024)
def _scatter_plan(a: Spec, axis: int, chips: int, memory_config: MemoryConfig | None) -> Spec:
    op = "reduce_scatter"
    size = a.shape[axis]
    place = placed(memory_config, a.memory_config)
    need(len(a.shape) > 1, op, f"input {list(a.shape)}; it must have at least two axes")
    need(size % chips == 0, op, f"axis {axis} of {list(a.shape)} over {chips} chips; it must be divisible")
    shape = list(a.shape)
    shape[axis] //= chips
    _need_whole_blocks(op, a, axis, shape[axis])
    _need_interleaved(op, a, place)
    return make_spec(shape, a.dtype, a.layout, place)


def reduce_scatter(
    input_tensor: Tensor,
    dim: int,
    *,
    cluster_axis: int | None = None,
    subdevice_id: object = None,
    memory_config: MemoryConfig | None = None,
    intermediate_memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    num_links: int | None = None,
    topology: object = None,
    chunks_per_sync: int | None = None,
    num_workers_per_link: int | None = None,
    num_buffers_per_channel: int | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    use_l1_small_for_semaphores: bool = False,
) -> Tensor:
    """Return the sum over the chips of a line, cut along `dim`: the n-th chip of the line gets the n-th part."""
    op = "reduce_scatter"
    leave_out(
        op,
        output_tensor=output_tensor,
        subdevice_id=subdevice_id,
        intermediate_memory_config=intermediate_memory_config,
    )
    lines = lines_of(op, on_device(op, input_tensor).shape, cluster_axis)
    source = input_tensor.spec
    axis = _axis(op, dim, source)
    spec = _scatter_plan(source, axis, lines.length, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        parts = _summed(lines.split(whole(a, source)), spec).chunk(lines.length, dim=axis + 1)
        return lines.join(torch.stack(parts, dim=1))

    return launch(op, spec, compute, input_tensor)


@lru_cache(maxsize=1024)
def _reduce_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    op, place = "all_reduce", placed(memory_config, a.memory_config)
    emulated(
        a.dtype in (DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B, DataType.INT32),
        op,
        f"sum {a.dtype.value}, which ttnn does for some shapes only; use typecast",
    )
    _need_interleaved(op, a, place)
    return make_spec(a.shape, a.dtype, a.layout, place, a.padded_shape)


def all_reduce(
    input_tensor: Tensor,
    *,
    cluster_axis: int | None = None,
    subdevice_id: object = None,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = None,
    topology: object = None,
) -> Tensor:
    """Return the sum of the values of the chips of a line, on every chip of it."""
    op = "all_reduce"
    leave_out(op, subdevice_id=subdevice_id)
    lines = lines_of(op, on_device(op, input_tensor).shape, cluster_axis)
    spec = _reduce_plan(input_tensor.spec, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        if not spec.dtype.is_block_float:
            return lines.give(_summed(lines.split(a), spec))
        total = round_on_device(
            lines.split(a).sum(dim=1), DataType.BFLOAT16
        )  # summed as bfloat16, then packed
        return lines.give(round_on_device(total, spec.dtype))

    return launch(op, spec, compute, input_tensor)


@lru_cache(maxsize=1024)
def _copy_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    padded = a.padded_shape if a.layout is Layout.TILE else None
    return make_spec(a.shape, a.dtype, a.layout, placed(memory_config, a.memory_config), padded)


def all_broadcast(
    input_tensor: Tensor,
    *,
    cluster_axis: int | None = None,
    subdevice_id: object = None,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = 1,
    topology: object = None,
    use_l1_small_for_semaphores: bool = False,
) -> list[Tensor]:
    """Return one tensor for each chip of a line: the n-th holds the values of the n-th chip, on every chip of it."""
    op = "all_broadcast"
    leave_out(op, subdevice_id=subdevice_id)
    lines = lines_of(op, on_device(op, input_tensor).shape, cluster_axis)
    source = input_tensor.spec
    spec = _copy_plan(source, memory_config)

    def of(chip: int) -> Tensor:
        return launch(op, spec, lambda a: lines.give(lines.split(a)[:, chip]), input_tensor)

    return [of(chip) for chip in range(lines.length)]


def broadcast(
    input_tensor: Tensor,
    sender_coord: MeshCoordinate,
    *,
    num_links: int | None = None,
    memory_config: MemoryConfig | None = None,
    topology: object = None,
    cluster_axis: int | None = None,
    subdevice_id: object = None,
) -> Tensor:
    """Return the values of the chip at `sender_coord` on every chip of its line.

    Chips of other lines receive nothing on hardware, so a mesh of several lines is rejected.
    """
    op = "broadcast"
    leave_out(op, subdevice_id=subdevice_id)
    mesh = on_device(op, input_tensor)
    need(
        cluster_axis is not None or 1 in mesh.shape, op, f"cluster_axis is needed on {mesh!r}; allowed: 0, 1"
    )
    lines = lines_of(op, mesh.shape, cluster_axis)
    row, column = sender_coord
    need(row < lines.rows and column < lines.columns, op, f"sender {sender_coord!r} of a mesh {mesh!r}")
    emulated(
        lines.length == lines.rows * lines.columns, op, "send along one line of several; use all_broadcast"
    )
    source = input_tensor.spec
    spec = _copy_plan(source, memory_config)
    chip = row * lines.columns + column
    return launch(op, spec, lambda a: a[chip if a.shape[0] > 1 else 0][None], input_tensor)


def _with_semaphores(name: str, plain: str) -> NoReturn:
    raise NotEmulatedError(
        f"{name}: the emulator does not have collectives with semaphores; use ttnn.{plain}"
    )


def all_gather_async(*args: object, **kwargs: object) -> NoReturn:
    """ttnn's all_gather with the caller's semaphores; not emulated."""
    _with_semaphores("all_gather_async", "all_gather")


def reduce_scatter_minimal_async(*args: object, **kwargs: object) -> NoReturn:
    """ttnn's reduce_scatter with the caller's semaphores; not emulated."""
    _with_semaphores("reduce_scatter_minimal_async", "reduce_scatter")


def all_reduce_async(*args: object, **kwargs: object) -> NoReturn:
    """ttnn's all_reduce with the caller's semaphores; not emulated."""
    _with_semaphores("all_reduce_async", "all_reduce")
