"""A tensor's shape, and the tile that TILE layout is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

from disagg_tt.device.emulator.enums import DataType
from disagg_tt.errors import DeviceError, NotEmulatedError

TILE_SIZE = 32


class Shape(tuple):
    """A tensor shape; compares equal to any sequence of the same numbers, as ttnn.Shape does."""

    def __new__(cls, shape: Any) -> Shape:
        return super().__new__(cls, (index(d) for d in shape))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (tuple, list)) else NotImplemented

    __hash__ = tuple.__hash__

    @property
    def rank(self) -> int:
        return len(self)

    def to_rank(self, rank: int) -> Shape:
        """Return the same shape with axes of 1 added or removed in front; raises DeviceError where another is there."""
        extra = len(self) - rank
        if extra > 0 and math.prod(self[:extra]) != 1:
            raise DeviceError(f"{self!r}.to_rank({rank}): the first {extra} axes must be 1")
        return Shape(self[extra:] if extra > 0 else (1,) * -extra + self)

    def __repr__(self) -> str:
        return f"Shape({list(self)})"


class Tile:
    """The tile of TILE layout: 32x32 elements. ttnn's smaller ones are not emulated."""

    tile_shape = [TILE_SIZE, TILE_SIZE]
    face_shape = [16, 16]
    num_faces = 4

    def __init__(self, tile_shape: Sequence[int] = tile_shape, transpose_tile: bool = False):
        if list(tile_shape) != Tile.tile_shape or transpose_tile:
            raise NotEmulatedError(
                f"Tile({list(tile_shape)}, transpose_tile={transpose_tile}): the emulator does not have other tiles than "
                f"{Tile.tile_shape}, not transposed"
            )

    def get_tile_size(self, dtype: DataType) -> int:
        """Return the packed bytes of one tile."""
        return tile_size(dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tile)

    def __hash__(self) -> int:
        return hash(Tile)

    def __repr__(self) -> str:
        return f"Tile with shape: {self.tile_shape}"


def tile_size(dtype: DataType) -> int:
    """Return the packed bytes of one tile of `dtype`."""
    return dtype.bytes_of(TILE_SIZE * TILE_SIZE)
