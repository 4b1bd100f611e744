"""Mappers cut a tensor over the chips of a mesh and composers join it again, as the real ttnn was seen to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import OpenMesh, chips, generator

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError, NotEmulatedError

SIXTEEN = torch.arange(16.0).reshape(1, 1, 4, 4)
CUT, ALL = ttnn.PlacementShard, ttnn.PlacementReplicate

# What the real runtime gave the four chips of a 2x2 mesh: rows and columns of SIXTEEN.
PLACEMENTS: dict[str, tuple[list[Any], Any, list[tuple[slice, slice]]]] = {
    "rows over rows": (
        [CUT(2), CUT(3)],
        None,
        [(slice(r, r + 2), slice(c, c + 2)) for r in (0, 2) for c in (0, 2)],
    ),
    "columns over rows": (
        [CUT(3), CUT(2)],
        None,
        [(slice(r, r + 2), slice(c, c + 2)) for c in (0, 2) for r in (0, 2)],
    ),
    "over rows only": (
        [CUT(-1), ALL()],
        None,
        [(slice(0, 4), slice(c, c + 2)) for c in (0, 2) for _ in range(2)],
    ),
    "over columns only": (
        [ALL(), CUT(3)],
        None,
        [(slice(0, 4), slice(c, c + 2)) for _ in range(2) for c in (0, 2)],
    ),
    "as a line": ([CUT(3)], [4], [(slice(0, 4), slice(c, c + 1)) for c in range(4)]),
    "as one row": ([CUT(2), CUT(3)], [1, 4], [(slice(0, 4), slice(c, c + 1)) for c in range(4)]),
    "as one column": ([CUT(2), CUT(3)], [4, 1], [(slice(r, r + 1), slice(0, 4)) for r in range(4)]),
    "in three axes": (
        [CUT(2), CUT(3), ALL()],
        [2, 2, 1],
        [(slice(r, r + 2), slice(c, c + 2)) for r in (0, 2) for c in (0, 2)],
    ),
    "nowhere": ([ALL(), ALL()], None, [(slice(0, 4), slice(0, 4))] * 4),
}


def mapper(mesh: Any, placements: list[Any], shape: Any = None) -> Any:
    over = None if shape is None else ttnn.MeshShape(shape)
    return ttnn.create_mesh_mapper(mesh, ttnn.MeshMapperConfig(placements, over))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("where", ["host", "device"])
def test_each_chip_gets_its_part(open_mesh: OpenMesh, name: str, where: str) -> None:
    mesh = open_mesh(2, 2)
    placements, shape, parts = PLACEMENTS[name]
    device = mesh if where == "device" else None
    tensor = ttnn.from_torch(SIXTEEN, device=device, mesh_mapper=mapper(mesh, placements, shape))
    assert len(got := chips(tensor)) == 4
    for part, (rows, columns) in zip(got, parts, strict=True):
        assert torch.equal(part, SIXTEEN[:, :, rows, columns])


def test_older_names_cut_alike(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 2)
    pairs = {
        ttnn.ShardTensorToMesh(mesh, dim=3): mapper(mesh, [CUT(3)], [4]),
        ttnn.shard_tensor_to_mesh_mapper(mesh, 2): mapper(mesh, [CUT(2)], [4]),
        ttnn.ReplicateTensorToMesh(mesh): mapper(mesh, [ALL(), ALL()]),
        ttnn.ShardTensor2dMesh(mesh, dims=(2, 3), mesh_shape=(2, 2)): mapper(mesh, [CUT(2), CUT(3)]),
        ttnn.ShardTensor2dMesh(mesh, mesh.shape, (None, 2)): mapper(mesh, [ALL(), CUT(2)]),
        ttnn.create_mesh_mapper(mesh, ttnn.MeshMapperConfig(2, 3)): mapper(mesh, [CUT(2), CUT(3)]),
        ttnn.create_mesh_mapper(mesh, ttnn.MeshMapperConfig(row_dim=2)): mapper(mesh, [CUT(2), ALL()]),
    }
    for old, new in pairs.items():
        assert torch.equal(old.shards(SIXTEEN), new.shards(SIXTEEN))
        assert isinstance(old, ttnn.TensorToMesh)


def test_what_cannot_be_cut_is_rejected(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 2)
    for placements, shape, message in (
        ([CUT(3)], None, "needs a placement for each of its 2 axes"),
        ([CUT(3)], [5], "no more chips than that"),
        ([CUT(2), CUT(2)], None, "each axis of the tensor can be named once"),
        ([CUT(7), ALL()], None, r"its axes are -4\.\.3"),
        ([CUT(0), ALL()], None, "gives 1 parts"),
    ):
        with pytest.raises(DeviceError, match=message):
            mapper(mesh, placements, shape).shards(SIXTEEN)
    with pytest.raises(DeviceError, match="the axis must be divisible by the chips"):
        ttnn.from_torch(torch.zeros(1, 7), mesh_mapper=ttnn.ShardTensorToMesh(mesh, 1))
    for placements, shape in (([CUT(3)], [2]), ([CUT(2), CUT(3)], [1, 2])):
        with pytest.raises(
            NotEmulatedError, match=r"on 2 of 4 chips; the emulator does not have tensors on part"
        ):
            mapper(mesh, placements, shape).shards(SIXTEEN)
    with pytest.raises(NotEmulatedError, match="on 3 of 4 chips"):
        ttnn.from_torch(torch.zeros(1, 6), mesh_mapper=ttnn.ShardTensorToMesh(mesh, 1))
    with pytest.raises(DeviceError, match="a mapper for 4 chips and a device of 1"):
        ttnn.from_torch(SIXTEEN, device=open_mesh(1, 1), mesh_mapper=ttnn.ReplicateTensorToMesh(mesh))
    with pytest.raises(TypeError, match="mesh_mapper is a function"):
        ttnn.from_torch(SIXTEEN, device=mesh, mesh_mapper=lambda t: t)


def test_composers_join_what_mappers_cut(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 2)
    values = torch.randn(2, 3, 8, 12, generator=generator(1))
    for placements, dims, shape in (
        ([CUT(2), CUT(3)], [2, 3], None),
        ([CUT(3), CUT(2)], [3, 2], None),
        ([CUT(3)], [3], [4]),
        ([CUT(2), CUT(3)], [2, 3], [4, 1]),
    ):
        tensor = ttnn.from_torch(values, device=mesh, mesh_mapper=mapper(mesh, placements, shape))
        config = ttnn.MeshComposerConfig(dims, None if shape is None else ttnn.MeshShape(shape))
        composer = ttnn.create_mesh_composer(mesh, config)
        assert torch.equal(ttnn.to_torch(tensor, mesh_composer=composer), values)
        assert torch.equal(tensor.to_torch(composer), values)
        joined = ttnn.aggregate_tensor(tensor, composer)
        assert joined.device() is None
        assert torch.equal(joined.to_torch(), values)


def test_composers_take_parts_in_the_order_of_the_mesh(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 2)
    tensor = ttnn.from_torch(
        torch.arange(4.0)[:, None], device=mesh, mesh_mapper=ttnn.ShardTensorToMesh(mesh, 0)
    )

    def joined(dims: list[int], *shape: int) -> list[Any]:
        over = ttnn.MeshShape(shape) if shape else None
        composer = ttnn.create_mesh_composer(mesh, ttnn.MeshComposerConfig(dims, over))
        return ttnn.to_torch(tensor, mesh_composer=composer).tolist()

    assert joined([0, 1]) == [[0, 1], [2, 3]]
    assert joined([1, 0]) == [[0, 2], [1, 3]]
    assert joined([0, 1], 2, 1) == [[0], [2]], "a smaller grid is a corner of the mesh"
    assert joined([0], 2) == [[0], [1]], "a line runs along the rows"
    assert ttnn.to_torch(tensor, mesh_composer=ttnn.ConcatMeshToTensor(mesh, -1)).tolist() == [[0, 1, 2, 3]]
    two = ttnn.ConcatMesh2dToTensor(mesh, mesh_shape=(2, 2), dims=(0, 1))
    assert ttnn.to_torch(tensor, mesh_composer=two).tolist() == [[0, 1], [2, 3]]
    for dims, message in (([0], "a dim for each"), ([1, 1], "named once"), ([0, 5], r"its axes are -2\.\.1")):
        with pytest.raises(DeviceError, match=message):
            joined(dims)
    with pytest.raises(DeviceError, match="for a tensor with 1 parts; it needs 4"):
        ttnn.to_torch(ttnn.from_torch(SIXTEEN), mesh_composer=ttnn.ConcatMeshToTensor(mesh, 0))
    with pytest.raises(DeviceError, match="a tensor on 4 chips; pass mesh_composer"):
        ttnn.to_torch(tensor)


def test_distribute_sets_what_is_used_where_none_is_named(mesh: Any) -> None:
    with ttnn.distribute(ttnn.ShardTensorToMesh(mesh, 3)), ttnn.distribute(ttnn.ConcatMeshToTensor(mesh, 3)):
        tensor = ttnn.from_torch(SIXTEEN, device=mesh)
        assert tensor.shape == [1, 1, 4, 2]
        assert torch.equal(ttnn.to_torch(tensor), SIXTEEN)
    assert ttnn.from_torch(SIXTEEN, device=mesh).shape == [1, 1, 4, 4]
    with pytest.raises(ValueError, match="takes a mapper or a composer"), ttnn.distribute(3):
        pass


def test_parts_are_taken_apart_and_put_together(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 2)
    host = ttnn.from_host_shards([ttnn.from_torch(SIXTEEN + i) for i in range(4)], mesh.shape)
    assert [int(part[0, 0, 0, 0]) for part in chips(host)] == [0, 1, 2, 3]
    device = host.to(mesh)
    assert [int(part[0, 0, 0, 0]) for part in chips(device)] == [0, 1, 2, 3]
    again = ttnn.combine_device_tensors(tensors=ttnn.get_device_tensors(device))
    assert [int(part[0, 0, 0, 0]) for part in chips(ttnn.add(again, again))] == [0, 2, 4, 6]
    with pytest.raises(NotEmulatedError, match="other parts than all of one tensor"):
        ttnn.combine_device_tensors(tensors=ttnn.get_device_tensors(device)[:2])
    with pytest.raises(DeviceError, match="3 tensors for"):
        ttnn.from_host_shards([ttnn.from_torch(SIXTEEN)] * 3, mesh.shape)
    with pytest.raises(DeviceError, match="of one spec"):
        ttnn.from_host_shards(
            [ttnn.from_torch(SIXTEEN), ttnn.from_torch(SIXTEEN[..., :2])], ttnn.MeshShape(1, 2)
        )
    cut = ttnn.distribute_tensor(ttnn.from_torch(SIXTEEN), mapper(mesh, [CUT(2), CUT(3)]), mesh)
    assert (cut.shape, cut.device()) == ([1, 1, 2, 2], mesh)
