"""point_to_point: one chip's shard goes to another chip of the same mesh."""

from __future__ import annotations

import torch

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.mesh import MeshDevice, get_fabric_config
from disagg_tt.device.emulator.ops.lines import Topology
from disagg_tt.device.emulator.ops.plan import need
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, on_device, undefined, whole
from disagg_tt.device.emulator.types import FabricConfig, MeshCoordinate

OP = "point_to_point"
_ALIGNMENT = 16


def point_to_point(
    input_tensor: Tensor,
    sender_coord: MeshCoordinate,
    receiver_coord: MeshCoordinate,
    *,
    output_tensor: Tensor | None = None,
    intermediate_tensor: Tensor | None = None,
    topology: Topology = Topology.Linear,
) -> Tensor:
    """Return a tensor like the input whose shard on `receiver_coord` is the input's on `sender_coord`.

    The other chips' shards are those of `output_tensor`, which is then written and returned, or undefined without one.
    `topology` and `intermediate_tensor` change nothing here. Raises DeviceError for sharded tensors, block floats, pages
    that are not whole 16 bytes, coordinates outside the mesh or on no common line, or an output of another spec.
    """
    mesh = on_device(OP, input_tensor, *([] if output_tensor is None else [output_tensor]))
    spec, chips = input_tensor.spec, mesh.get_num_devices()
    source, target = (
        _chip(mesh, name, c) for name, c in (("sender", sender_coord), ("receiver", receiver_coord))
    )
    need(get_fabric_config() is not FabricConfig.DISABLED, OP, "needs a fabric; call set_fabric_config first")
    need(not spec.memory_config.is_sharded(), OP, f"input {spec!r} is sharded; move it to DRAM or L1")
    if source != target:
        one_line = sender_coord[0] == receiver_coord[0] or sender_coord[1] == receiver_coord[1]
        need(one_line, OP, f"{sender_coord!r} to {receiver_coord!r}; both must be in one row or column")
        name = spec.dtype.value
        need(
            not spec.dtype.is_block_float, OP, f"input is {name}, which is not sent; use typecast to bfloat16"
        )
    need(spec.page % _ALIGNMENT == 0, OP, f"pages of {spec.page} B; they must be whole {_ALIGNMENT} bytes")

    def moved(data: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        out = whole(before, spec).expand(chips, *spec.shape).clone(memory_format=torch.contiguous_format)
        out[target] = whole(data, spec)[min(source, data.shape[0] - 1)]
        return out

    if output_tensor is None:
        return launch(OP, spec, lambda data: moved(data, _nothing(spec)), input_tensor)
    need(output_tensor.spec is spec, OP, f"output {output_tensor.spec!r} for {spec!r}; they must be alike")
    launch_in_place(OP, output_tensor, moved, input_tensor, output_tensor)
    return output_tensor


def _chip(mesh: MeshDevice, name: str, coord: MeshCoordinate) -> int:
    """Return the chip at `coord`."""
    if not isinstance(coord, MeshCoordinate):
        raise TypeError(f"{OP}: {name}_coord is a {type(coord).__name__}; give a MeshCoordinate")
    rows, columns = mesh.shape[0], mesh.shape[1]
    inside = coord.dims() == 2 and coord[0] < rows and coord[1] < columns
    need(inside, OP, f"{name}_coord {coord!r} is not in the mesh of {rows}x{columns} chips")
    return coord[0] * columns + coord[1]


def _nothing(spec: Spec) -> torch.Tensor:
    return torch.full((1,), undefined(spec), dtype=spec.dtype.storage).expand(1, *spec.shape)
