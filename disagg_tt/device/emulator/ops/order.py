"""What depends on the order of values: argmax and topk."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype
from disagg_tt.device.emulator.ops.reduce import reduced_spec
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, whole
from disagg_tt.device.emulator.types import TILE_SIZE, CoreRangeSet, DataType, Layout, MemoryConfig

_FLOATS = (DataType.BFLOAT16, DataType.FLOAT32)
_INTEGERS = (DataType.INT32, DataType.UINT32, DataType.UINT16)


@lru_cache(maxsize=4096)
def _argmax_plan(a: Spec, dim: int | None, keepdim: bool, memory_config: MemoryConfig | None) -> Spec:
    op, rank = "argmax", len(a.shape)
    need(
        dim is None or -rank <= dim < rank,
        op,
        f"dim {dim} of {list(a.shape)}; it must be from {-rank} to {rank - 1}",
    )
    row_major = a.layout is Layout.ROW_MAJOR
    need(dim is not None or row_major, op, f"dim None of {a!r}; all axes at once need ROW_MAJOR layout")
    by_rows = row_major and (dim is None or dim % rank == rank - 1)
    need_dtype(op, "input", a, *_FLOATS, *(_INTEGERS if by_rows else ()))
    axes = tuple(range(rank)) if dim is None else (dim % rank,)
    return reduced_spec(
        op, a, axes, keepdim, DataType.UINT32, Layout.ROW_MAJOR, memory_config or a.memory_config
    )


def argmax(
    input_tensor: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    sub_core_grids: CoreRangeSet | None = None,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    enable_secondary_dm: bool | None = None,
) -> Tensor:
    """Return the index of the first largest value along `dim`, or in the whole tensor; uint32 in ROW_MAJOR.

    `output_tensor` of the same spec is written and returned, if given.
    """
    source = input_tensor.spec
    if output_tensor is not None:
        memory_config = output_tensor.spec.memory_config
    spec = _argmax_plan(source, dim, keepdim, memory_config)
    axis = None if dim is None else dim % len(source.shape) + 1

    def compute(values: torch.Tensor) -> torch.Tensor:
        if axis is None:
            values = whole(values, source).flatten(1)
            return values.argmax(dim=1).view(-1, *spec.shape)
        if axis < values.dim() - 1 or values.shape[-1] != source.shape[-1]:
            values = whole(values, source)  # a prefix of whole rows does for the last axis only
        return values.argmax(dim=axis, keepdim=keepdim)

    if output_tensor is None:
        return launch("argmax", spec, compute, input_tensor)
    need(output_tensor.spec is spec, "argmax", f"output_tensor {output_tensor.spec!r}; it must be {spec!r}")
    launch_in_place("argmax", output_tensor, compute, input_tensor)
    return output_tensor


@lru_cache(maxsize=4096)
def _topk_plan(
    a: Spec, k: int, dim: int, memory_config: MemoryConfig | None, labels: Spec | None, stable: bool
) -> tuple[Spec, Spec]:
    """Return the specs of the values and of the indices."""
    op, rank = "topk", len(a.shape)
    need(-rank <= dim < rank, op, f"dim {dim} of {list(a.shape)}; it must be from {-rank} to {rank - 1}")
    size = a.shape[dim]
    need(0 < k <= size, op, f"k {k} of {size} values; it must be from 1 to {size}")
    need(a.layout is Layout.TILE, op, f"input {a!r} must be in TILE layout; convert it with to_layout")
    need_dtype(op, "input", a, DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B)
    wide = -(-size // TILE_SIZE) * TILE_SIZE > 65536 or a.dtype is DataType.FLOAT32
    index = DataType.UINT32 if wide else DataType.UINT16
    if labels is not None:
        need(not stable, op, "stable=True together with indices_tensor; use one of them")
        need(
            labels.shape == a.shape, op, f"indices_tensor {list(labels.shape)} of an input of {list(a.shape)}"
        )
        need(labels.layout is Layout.TILE, op, f"indices_tensor {labels!r} must be in TILE layout")
        need(dim in (-1, rank - 1), op, f"indices_tensor with dim {dim}; it needs the last axis")
        need(
            rank >= 4 or size >= 64, op, f"indices_tensor of {size} values; below rank 4 it needs 64 or more"
        )
        narrow = () if wide else (DataType.UINT16,)
        need_dtype(op, "indices_tensor", labels, DataType.UINT32, DataType.INT32, *narrow)
        index = labels.dtype
    place = memory_config or a.memory_config
    sharded = a.memory_config.is_sharded() or place.is_sharded()
    emulated(not sharded, op, "take or make shards; use interleaved")
    if dim not in (-1, rank - 1):
        place = a.memory_config  # ttnn moves the axis back into the input's place
    shape = list(a.shape)
    shape[dim] = k
    return make_spec(shape, a.dtype, Layout.TILE, place), make_spec(shape, index, Layout.TILE, place)


def topk(
    input_tensor: Tensor,
    k: int = 32,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    memory_config: MemoryConfig | None = None,
    sub_core_grids: CoreRangeSet | None = None,
    indices_tensor: Tensor | None = None,
    output_tensor: tuple[Tensor, Tensor] | None = None,
    stable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest (or smallest) values along `dim`, best first, and their indices, or their labels.

    Among equal values the first come first, whether `stable` or not; `sorted` makes no difference. `indices_tensor` has a
    label for each value. Indices are uint16, or uint32 for more than 65,536 values and for float32.
    """
    leave_out("topk", output_tensor=output_tensor)
    source = input_tensor.spec
    labels = None if indices_tensor is None else indices_tensor.spec
    values_spec, indices_spec = _topk_plan(source, k, dim, memory_config, labels, stable)
    axis = dim % len(source.shape) + 1

    def order(values: torch.Tensor) -> torch.Tensor:
        values = whole(values, source)
        return values.sort(dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, k)

    def chosen(values: torch.Tensor, spec: Spec, at: torch.Tensor) -> torch.Tensor:
        values = whole(values, spec)
        chips = at.shape[0] if at.shape[0] > 1 else values.shape[0]
        return values.expand(chips, *values.shape[1:]).gather(axis, at.expand(chips, *at.shape[1:]))

    indices = launch("topk", indices_spec, order, input_tensor)
    values = launch("topk", values_spec, lambda x, at: chosen(x, source, at), input_tensor, indices)
    if indices_tensor is not None and labels is not None:
        indices = launch("topk", indices_spec, lambda x, at: chosen(x, labels, at), indices_tensor, indices)
    return values, indices
