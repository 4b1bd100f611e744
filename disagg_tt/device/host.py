"""What crosses between host and device, both ways. The one place where a mock cluster's garbage is replaced.

On a mock cluster every call is real except that values read back mean nothing. A caller of `read` therefore says what
an ideal device would hold (`scripted`); that is returned there, and only there, and the log says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from loguru import logger

from disagg_tt.device import features, ttnn

_told = False


def host_tensor(mesh: Any, values: torch.Tensor, dtype: Any, layout: Any = None) -> Any:
    """Return `values` as a host tensor replicated over `mesh`, ready for copy_host_to_device_tensor."""
    return ttnn.from_torch(
        values,
        dtype=dtype,
        layout=ttnn.ROW_MAJOR_LAYOUT if layout is None else layout,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh),
    )


def to_device(mesh: Any, values: torch.Tensor, dtype: Any, layout: Any = None) -> Any:
    """Return `values` as a device tensor in DRAM, the same on every chip of `mesh`."""
    return ttnn.from_torch(
        values,
        dtype=dtype,
        layout=ttnn.ROW_MAJOR_LAYOUT if layout is None else layout,
        device=mesh,
        memory_config=ttnn.DRAM_MEMORY_CONFIG,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh),
    )


def staging(mesh: Any, spec: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return a host tensor of `spec` a chip, for copies from and to `mesh`, and the bytes of every chip's part.

    The bytes, uint8 [bytes of the packed part], row by row of the mesh, are the tensor's own memory: written there, they
    are what copy_host_to_device_tensor copies.
    """
    host = ttnn.allocate_tensor_on_host(spec, mesh)
    buffer = host.host_buffer()
    chips = ttnn.MeshCoordinateRange(mesh.shape)
    return host, [torch.from_dlpack(buffer.get_shard(chip)) for chip in chips]


def zeros(mesh: Any, shape: list[int], dtype: Any, layout: Any = None) -> Any:
    """Return a device tensor of zeros in DRAM, `shape` on each chip of `mesh`; TILE layout unless another is given.

    Filled on the device: ttnn.zeros converts on the host, 0.7 s for one K pool of 32 x 8192 tokens at 8B's size.
    """
    where = (ttnn.TILE_LAYOUT if layout is None else layout, mesh, ttnn.DRAM_MEMORY_CONFIG)
    made = ttnn.allocate_tensor_on_device(ttnn.Shape(shape), dtype, *where)
    return ttnn.zeros_like(made, optional_tensor=made)


def read(tensor: Any, scripted: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the first chip's copy of a replicated device tensor as a torch tensor, waiting for its computation.

    On a mock cluster the device is read all the same (so that the call is checked) and `scripted()` is returned.
    """
    global _told
    values = ttnn.to_torch(ttnn.get_device_tensors(tensor)[0])
    if features.numbers:
        return values
    if not _told:
        logger.warning(
            "mock cluster: values read back from the device are garbage and replaced by scripted ones"
        )
        _told = True
    return scripted()
