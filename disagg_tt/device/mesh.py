"""Opening and closing the meshes of a run: one a rank, or two submeshes of one mesh in one process."""

from __future__ import annotations

from typing import Any

from loguru import logger

from disagg_tt.device import features, kind, ttnn
from disagg_tt.errors import InputError

Shape = tuple[int, int]

TRACE_REGION_BYTES = 50_000_000  # tt_transformers reserves 38 MB for Llama-3.1-8B on an N300


def open_mesh(shape: Shape, *, queues: int = 1, trace: bool = False) -> Any:
    """Open a mesh of `shape` (rows, columns) chips, under FABRIC_2D, as one row of chips for tensor parallelism.

    Raises InputError when a second command queue or a trace is asked of a mock cluster, which has neither.
    """
    mesh = _open(shape, queues, trace)
    if min(shape) > 1:
        mesh.reshape(ttnn.MeshShape(1, shape[0] * shape[1]))
    return mesh


def _open(shape: Shape, queues: int, trace: bool) -> Any:
    if queues > 1 and not features.cross_queue_events:
        raise InputError(
            "--overlap queue needs a second command queue, which a mock cluster lacks; use inline or after"
        )
    if trace and not features.trace:
        raise InputError("--enable-trace: a mock cluster cannot capture a trace; leave it out")
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    options: dict[str, Any] = {"num_command_queues": queues}
    if trace:
        options["trace_region_size"] = TRACE_REGION_BYTES
    if kind == "mock":
        # The mock's validator assumes worker dispatch (tt-metal#54475); hardware keeps its default.
        options["dispatch_core_config"] = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
    return ttnn.open_mesh_device(ttnn.MeshShape(*shape), **options)


def open_two(shape: Shape, *, queues: int = 1, trace: bool = False) -> tuple[Any, Any, Any]:
    """Open one mesh that holds two of `shape` and return (it, prefill submesh, decode submesh)."""
    rows, columns = shape
    beside = rows == columns == 1
    whole = (1, 2) if beside else (2 * rows, columns)
    if min(shape) > 1:
        raise InputError(
            f"--one-process with meshes of {rows}x{columns}; allowed: 1x1 and 1xN, whose submeshes are rows"
        )
    if kind == "ttnn":
        logger.warning(
            "two submeshes of one mesh: a socket on a submesh at an offset can hang on hardware (tt-metal#48186)"
        )
    parent = _open(whole, queues, trace)
    offsets = [(0, 0), (0, 1) if beside else (rows, 0)]
    prefill, decode = (
        parent.create_submesh(ttnn.MeshShape(rows, columns), ttnn.MeshCoordinate(*offset))
        for offset in offsets
    )
    return parent, prefill, decode


def close_mesh(mesh: Any) -> None:
    """Close a mesh, its submeshes first, and switch the fabric off."""
    for submesh in mesh.get_submeshes():
        ttnn.close_mesh_device(submesh)
    ttnn.close_mesh_device(mesh)
    ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)
