"""What the ops that move values without changing them share: argument checks, host and device, what is not emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch, view
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import emulated, need
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values
from disagg_tt.device.emulator.transfer import read_parts
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig

L1_ALIGNMENT = 16  # bytes: where a row of a shard may start


def integers(op: str, name: str, values: Any) -> tuple[int, ...]:
    """Return `values` as a tuple; raises TypeError unless they are a sequence of integers, as ttnn does."""
    try:
        numbers = tuple(values)
    except TypeError:
        numbers = (values, None)
    if not all(isinstance(v, int) for v in numbers):
        raise TypeError(f"{op}: {name} is {values!r}; it must be a list of integers")
    return numbers


def axis_of(op: str, dim: Any, rank: int, extra: int = 0) -> int:
    """Return `dim` from 0, where negative ones count from the end of `rank` axes (and `extra` ones to be made)."""
    if not isinstance(dim, int):
        raise TypeError(f"{op}: axis {dim!r} must be an integer")
    rank += extra
    need(-rank <= dim < rank, op, f"axis {dim}; it must be from {-rank} to {rank - 1}")
    return dim % rank


def interleaved(op: str, a: Spec, place: MemoryConfig | None) -> None:
    """What moves values between pages is emulated for interleaved outputs, and for sharded inputs when that is asked for."""
    out = place or a.memory_config
    emulated(
        not out.is_sharded(),
        op,
        f"write shards ({out!r}) here; pass an interleaved memory_config and use interleaved_to_sharded after it",
    )
    emulated(
        aligned_rows(a),
        op,
        f"read shards whose rows do not start at multiples of {L1_ALIGNMENT} bytes ({a!r}) here; use to_memory_config "
        "before it",
    )


def aligned_rows(a: Spec) -> bool:
    """Whether the rows of the shards of `a`, if it has any, start where L1 can be read."""
    shard = a.memory_config.shard_spec
    if a.layout is Layout.TILE or shard is None:
        return True
    return a.dtype.bytes_of(shard.shape[1]) % L1_ALIGNMENT == 0


def need_aligned_rows(op: str, *specs: Spec) -> None:
    """Rows of shards must start where L1 can be read."""
    for spec in specs:
        need(
            aligned_rows(spec),
            op,
            f"the rows of a shard of {spec!r} must take a multiple of {L1_ALIGNMENT} bytes",
        )


def unchanged(op: str, tensor: Tensor) -> Tensor:
    """Return `tensor` again: on a device a view of its memory."""
    return tensor if tensor.device() is None else view(op, tensor.spec, lambda a: a, tensor, as_held=True)


def moved(
    op: str,
    spec: Spec,
    compute: Callable[[torch.Tensor], torch.Tensor],
    tensor: Tensor,
    as_held: bool = False,
) -> Tensor:
    """Return the tensor of `spec` that `compute` makes from the values of `tensor`, on the host or its device.

    `as_held`: see launch.
    """
    if tensor.device() is not None:
        return launch(op, spec, compute, tensor, as_held=as_held)
    return Tensor(spec, None, Values(compute(read_parts(op, tensor, as_held=as_held))))


def requantised(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return values whose rows have changed as the device packs them: block floats share exponents along a row."""
    return round_on_device(values, dtype) if dtype.is_block_float else values
