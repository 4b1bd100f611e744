"""Values on their way: copied piece by piece from a tensor's memory into shared memory, and from there into a tensor's.

They travel in the smallest torch dtype that holds them exactly and converts fast: a block float has fewer significant bits
than bfloat16, so it goes as that. What is held otherwise is converted on the way: bfloat16 in float32, integers. A piece is
at most PIECE bytes, so that it is still in the cache when the other side takes it. Both ends cut alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from disagg_tt.device.emulator.types import DataType

PIECE = 1 << 20  # bytes
LINE = 64  # bytes to which pieces are rounded up

_CARRIER = {
    DataType.BFLOAT16: torch.bfloat16,
    DataType.BFLOAT8_B: torch.bfloat16,
    DataType.BFLOAT4_B: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.UINT32: torch.uint32,
    DataType.INT32: torch.int32,
    DataType.UINT16: torch.uint16,
    DataType.UINT8: torch.uint8,
}


def form(dtype: DataType) -> torch.dtype:
    """Return the torch dtype in which a tensor of `dtype` holds what is received."""
    carrier = _CARRIER[dtype]
    return carrier if carrier.is_floating_point else dtype.storage


def pieces(count: int, dtype: DataType) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, bytes of its room) of each piece of `count` values."""
    size = _CARRIER[dtype].itemsize
    most = PIECE // size
    for start in range(0, count, most):
        end = min(start + most, count)
        yield start, end, -(-(end - start) * size // LINE) * LINE


def put(values: torch.Tensor, memory: torch.Tensor, at: int, dtype: DataType) -> None:
    """Copy flat `values`, as they are held, into `memory` (uint8) from byte `at` on, a multiple of LINE."""
    _room(memory, at, values.numel(), dtype).copy_(values)


def get(memory: torch.Tensor, at: int, values: torch.Tensor, dtype: DataType) -> None:
    """Copy what is in `memory` from byte `at` on into flat `values`: the inverse of `put`."""
    values.copy_(_room(memory, at, values.numel(), dtype))


def _room(memory: torch.Tensor, at: int, count: int, dtype: DataType) -> torch.Tensor:
    carrier = _CARRIER[dtype]
    return memory.view(carrier).narrow(0, at // carrier.itemsize, count)
