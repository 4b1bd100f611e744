"""Emulated meshes, closed again after each test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError


@pytest.fixture
def open_mesh() -> Iterator[OpenMesh]:
    """open_mesh(rows, columns, **options of open_mesh_device), under FABRIC_2D."""
    meshes = []

    def opened(rows: int, columns: int, **options: Any) -> Any:
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
        meshes.append(ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), **options))
        return meshes[-1]

    yield opened
    for mesh in meshes:
        with contextlib.suppress(DeviceError):  # that a queue has failed is what some tests are about
            ttnn.close_mesh_device(mesh)
    ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


@pytest.fixture
def mesh(open_mesh: OpenMesh) -> Any:
    """A mesh of 1x2 chips with one command queue."""
    return open_mesh(1, 2)
