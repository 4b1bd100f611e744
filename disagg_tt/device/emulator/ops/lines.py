"""The lines of chips of a mesh along which collectives work.

A tensor's values are [chips, ..] in row order of the mesh, or [1, ..] when all chips hold the same. With a cluster_axis
the chips of each line along it take part together: along axis 1 those of a row, along axis 0 those of a column.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

import torch

from disagg_tt.device.emulator.coordinates import MeshShape
from disagg_tt.device.emulator.ops.plan import need


class Topology(Enum):
    """How chips are connected; the collectives take it and choose for themselves, as ttnn's do."""

    Linear = 1
    Ring = 2
    Mesh = 3
    Torus = 4


class Lines:
    """The lines of chips of a mesh that take part together, and the values of a tensor arranged by them."""

    def __init__(self, op: str, mesh: MeshShape, cluster_axis: int | None):
        self.rows, self.columns = mesh
        self.axis = cluster_axis
        if cluster_axis is None:
            self.length = self.rows * self.columns
        else:
            need(cluster_axis in (0, 1), op, f"cluster_axis {cluster_axis}; allowed: 0, 1")
            self.length = mesh[cluster_axis]
        need(
            self.length > 1,
            op,
            f"cluster_axis {cluster_axis} of a {self.rows}x{self.columns} mesh spans one chip; two or more are needed",
        )

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """Return [lines, chips of a line, *shape] of [chips or 1, *shape]; one line when all hold the same."""
        if values.shape[0] == 1:
            return values[:, None].expand(1, self.length, *values.shape[1:])
        if self.axis is None:
            return values[None]
        grid = values.view(self.rows, self.columns, *values.shape[1:])
        return grid if self.axis == 1 else grid.transpose(0, 1)

    def give(self, values: torch.Tensor) -> torch.Tensor:
        """Return [chips or 1, *shape] of what every chip of a line gets: [lines, *shape]."""
        if values.shape[0] == 1:
            return values
        return self.join(values[:, None].expand(values.shape[0], self.length, *values.shape[1:]))

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """Return [chips, *shape] of [lines, chips of a line, *shape]; a line that stands for all is repeated."""
        count = self.rows * self.columns
        values = values.expand(count // self.length, *values.shape[1:])
        if self.axis == 0:
            values = values.transpose(0, 1)
        return values.reshape(count, *values.shape[2:])


lines_of = lru_cache(maxsize=1024, typed=True)(Lines)  # typed: 1.0 is no axis
