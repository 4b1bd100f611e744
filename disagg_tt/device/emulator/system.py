"""The chips that this process has: those of its mesh in the mesh graph descriptor, as tt-run tells it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from disagg_tt.device.emulator.distributed import init_distributed_context
from disagg_tt.errors import DeviceError
from disagg_tt.mesh_descriptor import read_mesh_descriptor

SYSTEM = (2, 4)  # rows and columns of chips where nothing says how many there are
CHIPS_A_DEVICE = 2  # an N300 has two chips behind one PCIe device

open_chips: set[int] = set()
"""The chips of all meshes that are open in this process."""


def system_shape(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return rows and columns of this process's chips.

    They are those of mesh TT_MESH_ID in the descriptor TT_MESH_GRAPH_DESC_PATH; of no more devices than
    TT_VISIBLE_DEVICES names; 2x4 when neither is set. Raises DeviceError or RankBindingError for wrong ones.
    """
    shape = SYSTEM
    mesh, descriptor = environ.get("TT_MESH_ID"), environ.get("TT_MESH_GRAPH_DESC_PATH")
    if mesh and descriptor:
        meshes = read_mesh_descriptor(Path(descriptor))
        if not mesh.isdigit() or int(mesh) not in meshes:
            raise DeviceError(f"TT_MESH_ID={mesh}; {descriptor} has the meshes {sorted(meshes)}")
        shape = meshes[int(mesh)]
    visible = [d for d in environ.get("TT_VISIBLE_DEVICES", "").split(",") if d.strip()]
    if visible and CHIPS_A_DEVICE * len(visible) < math.prod(shape):
        return 1, CHIPS_A_DEVICE * len(visible)
    return shape


def get_num_devices() -> int:
    """Return the number of chips that this process has. The first look for chips joins the ranks, as in ttnn."""
    init_distributed_context()
    return math.prod(system_shape())


def get_device_ids() -> list[int]:
    """Return the ids of the chips that this process has: 0, 1, ..."""
    return list(range(get_num_devices()))


def get_num_pcie_devices() -> int:
    """Return the number of PCIe devices: two chips each."""
    return -(-get_num_devices() // CHIPS_A_DEVICE)


def get_pcie_device_ids() -> list[int]:
    """Return the ids of the PCIe devices: 0, 1, ..."""
    return list(range(get_num_pcie_devices()))


def get_arch_name() -> str:
    return "wormhole_b0"


def choose(shape: tuple[int, ...], offset: tuple[int, ...] | None, ids: list[int]) -> list[int]:
    """Return the chips of a new mesh: those of `ids`, those at `offset` in the system's mesh, or the first free ones.

    Raises DeviceError for chips that are not there or that an open mesh has.
    """
    init_distributed_context()
    count, system = math.prod(shape), system_shape()
    free = [chip for chip in range(math.prod(system)) if chip not in open_chips]
    what = f"open_mesh_device({shape})"
    if count == 0:
        raise DeviceError(f"{what}: each axis must be 1 or more")
    if ids:
        if len(ids) != count:
            raise DeviceError(f"{what}: {len(ids)} physical_device_ids; it needs {count}")
        chips = list(ids)
    elif offset is not None:
        if (
            len(shape) != 2
            or len(offset) != 2
            or any(o + n > s for o, n, s in zip(offset, shape, system, strict=True))
        ):
            raise DeviceError(f"{what} at {offset} leaves the system's mesh of {system[0]}x{system[1]} chips")
        (top, left), (rows, columns) = offset, shape
        chips = [(top + r) * system[1] + left + c for r in range(rows) for c in range(columns)]
    else:
        chips = free[:count]
    if len(chips) < count:
        raise DeviceError(
            f"{what}: {count} chips asked, {len(free)} of {math.prod(system)} are free; close a mesh, or run with a rank "
            "binding whose mesh descriptor has more"
        )
    taken = [chip for chip in chips if chip not in free]
    if taken or len(set(chips)) != count:
        raise DeviceError(
            f"{what}: chips {chips} asked, of which {free} are free; each can be in one open mesh"
        )
    return chips
