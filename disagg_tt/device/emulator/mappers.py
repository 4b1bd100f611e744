"""How a tensor is cut over the chips of a mesh, and joined again: mappers and composers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch

from disagg_tt.device.emulator.coordinates import MeshCoordinate, MeshShape, places
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.errors import DeviceError, NotEmulatedError


class PlacementReplicate:
    """Along this axis of the mesh every chip holds the same."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementReplicate)

    def __hash__(self) -> int:
        return hash(PlacementReplicate)

    def __repr__(self) -> str:
        return "PlacementReplicate()"


class PlacementShard:
    """Along this axis of the mesh the tensor is cut along its axis `dim`."""

    def __init__(self, dim: int, /):
        self.dim = dim

    def __repr__(self) -> str:
        return f"PlacementShard({self.dim})"


Placement = PlacementReplicate | PlacementShard


class MeshMapperConfig:
    """A placement for each axis of the mesh, or of `mesh_shape_override`; MeshMapperConfig(row_dim, col_dim) in 2D."""

    def __init__(
        self,
        placements: Sequence[Placement] | int | None = None,
        col_dim: int | MeshShape | None = None,
        mesh_shape_override: MeshShape | None = None,
        mesh_offset_override: MeshCoordinate | None = None,
        *,
        row_dim: int | None = None,
    ):
        if isinstance(col_dim, MeshShape):  # placements, mesh_shape_override, mesh_offset_override
            col_dim, mesh_shape_override = None, col_dim
        if placements is None or isinstance(placements, int):
            dims = (row_dim if placements is None else placements, col_dim)
            placements = [PlacementReplicate() if d is None else PlacementShard(int(d)) for d in dims]
        elif col_dim is not None:
            raise TypeError(
                "MeshMapperConfig: with a list of placements, mesh_shape_override must be a MeshShape"
            )
        if not all(isinstance(p, (PlacementReplicate, PlacementShard)) for p in placements):
            raise TypeError(
                "MeshMapperConfig: placements must be PlacementReplicate() or PlacementShard(dim)"
            )
        self.placements = list(placements)
        self.mesh_shape_override = _shape(mesh_shape_override)
        _refuse_offset("MeshMapperConfig", mesh_offset_override)

    def __repr__(self) -> str:
        return f"MeshMapperConfig(placements: {self.placements}{_override(self.mesh_shape_override)})"


class MeshComposerConfig:
    """The tensor axis to join along for each axis of the mesh, or of `mesh_shape_override`."""

    def __init__(
        self,
        dims: Sequence[int] | int | None = None,
        col_dim: int | MeshShape | None = None,
        mesh_shape_override: MeshShape | None = None,
        mesh_offset_override: MeshCoordinate | None = None,
        *,
        row_dim: int | None = None,
    ):
        if isinstance(col_dim, MeshShape):  # dims, mesh_shape_override, mesh_offset_override
            col_dim, mesh_shape_override = None, col_dim
        if dims is None or isinstance(dims, int):
            pair = (row_dim if dims is None else dims, col_dim)
            if None in pair:
                raise TypeError("MeshComposerConfig takes a list of axes, or row_dim and col_dim")
            dims = [int(d) for d in pair if d is not None]
        self.dims = list(dims)
        self.mesh_shape_override = _shape(mesh_shape_override)
        _refuse_offset("MeshComposerConfig", mesh_offset_override)

    def __repr__(self) -> str:
        return f"MeshComposerConfig(dims: {self.dims}{_override(self.mesh_shape_override)})"


def _shape(shape: MeshShape | None) -> MeshShape | None:
    if shape is not None and not isinstance(shape, MeshShape):
        raise TypeError(f"mesh_shape_override takes a MeshShape, not a {type(shape).__name__}")
    return shape


def _override(shape: MeshShape | None) -> str:
    return "" if shape is None else f", mesh_shape_override={shape!r}"


def _refuse_offset(what: str, offset: MeshCoordinate | None) -> None:
    if offset is not None and any(offset):
        raise NotEmulatedError(
            f"{what}: the emulator does not have mesh_offset_override; use a submesh (create_submesh)"
        )


class TensorToMesh:
    """Cuts a tensor into one part for each chip of a mesh. Made by create_mesh_mapper and its short forms."""

    def __init__(self, mesh_shape: MeshShape, config: MeshMapperConfig):
        over = config.mesh_shape_override or mesh_shape
        if len(config.placements) != over.dims():
            raise DeviceError(
                f"{config!r} for a mesh of {over!r}; it needs a placement for each of its {over.dims()} axes"
            )
        if over.mesh_size() > mesh_shape.mesh_size():
            raise DeviceError(f"{config!r} for a mesh of {mesh_shape!r}; it has no more chips than that")
        self._mesh_shape, self._over, self._config = mesh_shape, over, config
        self.chips = mesh_shape.mesh_size()

    def config(self) -> MeshMapperConfig:
        return self._config

    def shards(self, values: torch.Tensor) -> torch.Tensor:
        """Return [chips, *shard]; without shards along any axis, the values once, expanded to all chips."""
        sharded = [
            (axis, p.dim) for axis, p in enumerate(self._config.placements) if isinstance(p, PlacementShard)
        ]
        _check_dims(repr(self._config), [dim for _, dim in sharded], values.dim())
        if not sharded and self._over.mesh_size() == self.chips:
            return values[None].expand(self.chips, *values.shape)
        cut: dict[tuple[int, ...], torch.Tensor] = {(): values}
        for axis, size in enumerate(self._over):
            placement = self._config.placements[axis]
            nearer: dict[tuple[int, ...], torch.Tensor] = {}
            for place, part in cut.items():
                chunks = (
                    _chunks(part, placement.dim, size, self._over.dims())
                    if isinstance(placement, PlacementShard)
                    else [part] * size
                )
                nearer.update({(*place, i): chunk for i, chunk in enumerate(chunks)})
            cut = nearer
        if len(cut) != self.chips:
            raise NotEmulatedError(
                f"{self._config!r} puts {list(values.shape)} on {len(cut)} of {self.chips} chips; the emulator does not have "
                "tensors on part of a mesh, use a submesh"
            )
        shapes = {tuple(part.shape) for part in cut.values()}
        if len(shapes) > 1:
            raise DeviceError(
                f"{self._config!r} cuts {list(values.shape)} into parts of {sorted(map(list, shapes))}; "
                "all chips must get the same shape, so the axis must be divisible by the chips"
            )
        return torch.stack([cut[place] for place in product(*map(range, self._over))])


def _chunks(part: torch.Tensor, dim: int, count: int, axes: int) -> list[torch.Tensor]:
    chunks = list(part.chunk(count, dim=dim))
    if len(chunks) != count and axes > 1:
        raise DeviceError(
            f"axis {dim} of {list(part.shape)} cut in {count} gives {len(chunks)} parts; it must be at least as long as that"
        )
    return chunks


class MeshToTensor:
    """Joins the parts of all chips into one tensor. Made by create_mesh_composer and its short forms."""

    def __init__(self, mesh_shape: MeshShape, config: MeshComposerConfig):
        over = config.mesh_shape_override or mesh_shape
        if len(config.dims) != over.dims():
            raise DeviceError(
                f"{config!r} for a mesh of {over!r}; it needs a dim for each of its {over.dims()} axes"
            )
        self._places = places(tuple(over), tuple(mesh_shape))
        self._over, self._config = over, config

    def join(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the tensor that the parts [chips, *shard] make; raises DeviceError for too few of them."""
        _check_dims(repr(self._config), self._config.dims, parts.dim() - 1)
        if max(self._places) >= parts.shape[0]:
            raise DeviceError(
                f"{self._config!r} for a tensor with {parts.shape[0]} parts; it needs {max(self._places) + 1}"
            )
        joined = [parts[place] for place in self._places]
        for size, dim in zip(reversed(list(self._over)), reversed(self._config.dims), strict=True):
            joined = [torch.cat(joined[i : i + size], dim=dim) for i in range(0, len(joined), size)]
        return joined[0]


def _check_dims(what: str, dims: Sequence[int], rank: int) -> None:
    """Raise DeviceError unless all dims are axes of a tensor of that rank, each named once."""
    if any(not -rank <= dim < rank for dim in dims):
        raise DeviceError(f"{what} for a tensor of rank {rank}; its axes are {-rank}..{rank - 1}")
    if len({dim % rank for dim in dims}) < len(dims):
        raise DeviceError(f"{what}: each axis of the tensor can be named once")


def create_mesh_mapper(mesh_device: MeshDevice | MeshShape, config: MeshMapperConfig) -> TensorToMesh:
    """Return a mapper over a mesh (or a mesh shape) by placements."""
    return TensorToMesh(_shape_of(mesh_device), config)


def create_mesh_composer(mesh_device: MeshDevice, config: MeshComposerConfig) -> MeshToTensor:
    """Return a composer that joins the parts of a mesh along the axes of `config`."""
    return MeshToTensor(_shape_of(mesh_device), config)


def _shape_of(mesh: MeshDevice | MeshShape) -> MeshShape:
    return mesh if isinstance(mesh, MeshShape) else mesh.shape


def replicate_tensor_to_mesh_mapper(mesh_device: MeshDevice) -> TensorToMesh:
    """Give every chip of the mesh the whole tensor."""
    return TensorToMesh(mesh_device.shape, MeshMapperConfig([PlacementReplicate()], _line(mesh_device)))


def shard_tensor_to_mesh_mapper(mesh_device: MeshDevice, dim: int) -> TensorToMesh:
    """Cut the tensor along `dim` into one equal part a chip, in row order of the mesh."""
    return TensorToMesh(mesh_device.shape, MeshMapperConfig([PlacementShard(dim)], _line(mesh_device)))


def concat_mesh_to_tensor_composer(mesh_device: MeshDevice, dim: int) -> MeshToTensor:
    """Read all chips' parts as one tensor, joined along `dim`."""
    return MeshToTensor(mesh_device.shape, MeshComposerConfig([dim], _line(mesh_device)))


def _line(mesh: MeshDevice) -> MeshShape:
    return MeshShape([mesh.get_num_devices()])


# ttnn's older names
ReplicateTensorToMesh = replicate_tensor_to_mesh_mapper
ShardTensorToMesh = shard_tensor_to_mesh_mapper
ConcatMeshToTensor = concat_mesh_to_tensor_composer


def ShardTensor2dMesh(
    mesh_device: MeshDevice, mesh_shape: Any, dims: tuple[int | None, int | None]
) -> TensorToMesh:
    """Cut along dims[0] over the rows of `mesh_shape` and along dims[1] over its columns; None replicates."""
    placements = [PlacementReplicate() if dim is None else PlacementShard(dim) for dim in (dims[0], dims[1])]
    return create_mesh_mapper(
        mesh_device, MeshMapperConfig(placements, MeshShape(mesh_shape[0], mesh_shape[1]))
    )


def ConcatMesh2dToTensor(mesh_device: MeshDevice, mesh_shape: Any, dims: tuple[int, int]) -> MeshToTensor:
    """Join along dims[0] over the rows of `mesh_shape` and along dims[1] over its columns."""
    shape = MeshShape(mesh_shape[0], mesh_shape[1])
    return create_mesh_composer(mesh_device, MeshComposerConfig([dims[0], dims[1]], shape))


_distributed: list[TensorToMesh | MeshToTensor] = []


@contextlib.contextmanager
def distribute(default: TensorToMesh | MeshToTensor) -> Iterator[None]:
    """Make a mapper the default of from_torch, or a composer that of to_torch, inside the block."""
    if not isinstance(default, (TensorToMesh, MeshToTensor)):
        raise ValueError(f"distribute takes a mapper or a composer, not a {type(default).__name__}")
    _distributed.append(default)
    try:
        yield
    finally:
        _distributed.pop()


def default_mapper() -> TensorToMesh | None:
    """Return the mapper that `distribute` set, if it did."""
    return next((d for d in reversed(_distributed) if isinstance(d, TensorToMesh)), None)


def default_composer() -> MeshToTensor | None:
    """Return the composer that `distribute` set, if it did."""
    return next((d for d in reversed(_distributed) if isinstance(d, MeshToTensor)), None)
