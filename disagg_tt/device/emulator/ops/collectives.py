"""Collectives over the chips of a mesh: all_gather and all_reduce."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device, whole
from disagg_tt.device.emulator.types import MemoryConfig


def _ring(op: str, mesh: MeshDevice, cluster_axis: int | None) -> int:
    """Return the number of chips that take part; the axis must be the mesh's only one longer than 1."""
    rows, columns = mesh.shape
    if cluster_axis is None:
        need(1 in (rows, columns), op, f"cluster_axis is needed on a mesh of {rows}x{columns}; allowed: 0, 1")
        return rows * columns
    need(cluster_axis in (0, 1), op, f"cluster_axis {cluster_axis}; allowed: 0, 1")
    chips = mesh.shape[cluster_axis]
    need(
        chips == rows * columns and chips > 1,
        op,
        f"cluster_axis {cluster_axis} of a {rows}x{columns} mesh spans {chips} of {rows * columns} chips; "
        "open the mesh as one row and use axis 1",
    )
    return int(chips)


@lru_cache(maxsize=1024)
def _gather_plan(a: Spec, dim: int, chips: int, memory_config: MemoryConfig | None) -> Spec:
    shape = list(a.shape)
    shape[dim] *= chips
    return make_spec(shape, a.dtype, a.layout, placed(memory_config, a.memory_config))


def all_gather(input_tensor: Tensor, dim: int, *, cluster_axis: int | None = None,
               memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return all chips' shards joined along `dim`, on every chip."""
    chips = _ring("all_gather", on_device("all_gather", input_tensor), cluster_axis)
    rank = len(input_tensor.shape)
    need(
        -rank <= dim < rank,
        "all_gather",
        f"dim {dim} of a tensor of {rank} axes; it must be from {-rank} to {rank - 1}",
    )
    axis = dim % rank
    source = input_tensor.spec
    spec = _gather_plan(source, axis, chips, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        if axis < rank - 1:
            a = whole(a, source)
        return torch.cat(list(a.expand(chips, *a.shape[1:])), dim=axis)[None]

    return launch("all_gather", spec, compute, input_tensor)


@lru_cache(maxsize=1024)
def _reduce_plan(a: Spec, memory_config: MemoryConfig | None) -> Spec:
    need_tile("all_reduce", input=a)
    return make_spec(a.shape, a.dtype, a.layout, placed(memory_config, a.memory_config), a.padded_shape)


def all_reduce(input_tensor: Tensor, *, cluster_axis: int | None = None,
               memory_config: MemoryConfig | None = None) -> Tensor:  # fmt: skip
    """Return the sum of all chips' values, on every chip."""
    chips = _ring("all_reduce", on_device("all_reduce", input_tensor), cluster_axis)
    spec = _reduce_plan(input_tensor.spec, memory_config)

    def compute(a: torch.Tensor) -> torch.Tensor:
        total = a.sum(dim=0, keepdim=True) if a.shape[0] == chips else a * chips
        return round_on_device(total, spec.dtype)

    return launch("all_reduce", spec, compute, input_tensor)
