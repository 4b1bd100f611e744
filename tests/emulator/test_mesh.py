"""Meshes: the chips there are, opening and closing, submeshes, coordinates and cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError, NotEmulatedError

DESCRIPTOR = """
mesh_descriptors { name: "A" arch: WORMHOLE_B0 device_topology { dims: [ 8, 4 ] } }
mesh_descriptors { name: "B" arch: WORMHOLE_B0 device_topology { dims: [ 1, 2 ] } }
graph_descriptors { name: "G" type: "FABRIC"
  instances { mesh { mesh_descriptor: "A" mesh_id: 0 } }
  instances { mesh { mesh_descriptor: "B" mesh_id: 1 } }
  connections { }
}
top_level_instance { graph { graph_descriptor: "G" graph_id: 0 } }
"""


@pytest.fixture
def in_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """in_mesh(id): as tt-run starts the rank of that mesh of DESCRIPTOR, 8x4 or 1x2 chips."""
    path = tmp_path / "meshes.textproto"
    path.write_text(DESCRIPTOR)

    def chosen(mesh_id: str) -> None:
        monkeypatch.setenv("TT_MESH_GRAPH_DESC_PATH", str(path))
        monkeypatch.setenv("TT_MESH_ID", mesh_id)

    return chosen


def test_a_process_has_eight_chips_where_nothing_says_otherwise() -> None:
    assert ttnn.get_device_ids() == list(range(8))
    assert ttnn.get_num_devices() == ttnn.GetNumAvailableDevices() == 8
    assert ttnn.get_num_pcie_devices() == ttnn.GetNumPCIeDevices() == 4
    assert ttnn.get_pcie_device_ids() == [0, 1, 2, 3]


def test_a_rank_has_the_chips_of_its_mesh(in_mesh: Callable[[str], None], open_mesh: OpenMesh) -> None:
    in_mesh("0")
    mesh = open_mesh(8, 4, physical_device_ids=ttnn.get_device_ids())
    assert mesh.get_num_devices() == ttnn.get_num_devices() == 32
    in_mesh("1")
    assert ttnn.get_device_ids() == [0, 1]
    in_mesh("7")
    with pytest.raises(DeviceError, match=r"TT_MESH_ID=7; .* has the meshes \[0, 1\]"):
        ttnn.get_device_ids()


def test_visible_devices_hide_the_others(
    in_mesh: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "3")
    assert ttnn.get_device_ids() == [0, 1], "one N300 has two chips"
    in_mesh("1")
    assert ttnn.get_num_devices() == 2
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "0,1,2,3")
    assert ttnn.get_num_devices() == 2, "no more than the mesh has"


def test_a_mesh_is_opened_on_all_chips_on_some_or_at_an_offset(open_mesh: OpenMesh) -> None:
    with ttnn.create_mesh_device() as mesh:
        assert tuple(mesh.shape) == (2, 4)
    with ttnn.create_mesh_device(ttnn.MeshShape(1, 2), physical_device_ids=[5, 3]) as mesh:
        assert mesh.get_device_ids() == [5, 3]
        with pytest.raises(DeviceError, match=r"chips \[3\] asked, of which \[0, 1, 2, 4, 6, 7\] are free"):
            ttnn.open_mesh_device(ttnn.MeshShape(1, 1), physical_device_ids=[3])
    mesh = open_mesh(1, 2, offset=ttnn.MeshCoordinate(1, 2))
    assert mesh.get_device_ids() == [6, 7]
    assert mesh.get_device_id(ttnn.MeshCoordinate(0, 1)) == 7
    for wrong, message in (
        ({"physical_device_ids": [0]}, "1 physical_device_ids; it needs 2"),
        ({"physical_device_ids": [9, 10]}, r"chips \[9, 10\] asked"),
        ({"offset": ttnn.MeshCoordinate(1, 3)}, r"at \(1, 3\) leaves the system's mesh of 2x4 chips"),
    ):
        with pytest.raises(DeviceError, match=message):
            open_mesh(1, 2, **wrong)
    with pytest.raises(TypeError, match="takes a MeshShape"):
        ttnn.open_mesh_device((1, 2))


def test_a_device_is_a_mesh_of_one_chip_opened_once() -> None:
    with ttnn.manage_device(1) as device:
        assert tuple(device.shape) == (1, 1)
        assert device.get_device_ids() == [1]
        assert ttnn.open_device(device_id=1) is device
        ttnn.SetDefaultDevice(device)
        assert ttnn.GetDefaultDevice() is device
        ttnn.SetDefaultDevice(None)
    assert ttnn.GetDefaultDevice() is None
    devices = ttnn.CreateDevices([0, 1])
    assert devices[1] is not device, "that one was closed"
    ttnn.CloseDevices(devices)


def test_a_mesh_tells_of_itself(mesh: Any) -> None:
    assert mesh.arch() is ttnn.Arch.WORMHOLE_B0
    assert ttnn.device.is_wormhole_b0(mesh)
    assert not ttnn.device.is_blackhole()
    assert mesh.core_grid == ttnn.CoreGrid(x=8, y=8)
    assert mesh.compute_with_storage_grid_size() == ttnn.CoreCoord(8, 8)
    assert mesh.dram_grid_size() == (12, 1)
    mesh.enable_program_cache()
    assert mesh.num_program_cache_entries() == 0
    mesh.quiesce_devices()
    with pytest.raises(
        DeviceError, match=r"MeshCoordinate\(\[0, 5\]\) is not in a mesh of MeshShape\(\[1, 2\]\)"
    ):
        mesh.get_device_id(ttnn.MeshCoordinate(0, 5))
    with pytest.raises(NotEmulatedError, match=r"MeshDevice\.get_view: the emulator does not have it"):
        mesh.get_view()
    with pytest.raises(AttributeError, match="MeshDevice has no colour"):
        mesh.colour  # noqa: B018


def test_submeshes_cover_the_mesh_row_by_row(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(2, 4)
    rows = mesh.create_submeshes(ttnn.MeshShape(1, 4))
    assert [m.get_device_ids() for m in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [m.get_device_ids() for m in mesh.create_submeshes(ttnn.MeshShape(2, 2))] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]
    inner = rows[1].create_submesh(ttnn.MeshShape(1, 2), ttnn.MeshCoordinate(0, 2))
    assert inner.get_device_ids() == [6, 7]
    assert len({m.id() for m in (mesh, inner, *mesh.get_submeshes())}) == 6
    for shape, message in (((2, 3), "does not divide"), ((0, 1), "does not divide")):
        with pytest.raises(DeviceError, match=message):
            mesh.create_submeshes(ttnn.MeshShape(*shape))
    with pytest.raises(DeviceError, match=r"create_submesh: 0x1 at \(0, 0\) leaves the mesh of 2x4"):
        mesh.create_submesh(ttnn.MeshShape(0, 1))
    ttnn.close_mesh_device(rows[1])
    with pytest.raises(DeviceError, match="is closed"):
        ttnn.zeros([1], device=inner)
    ttnn.zeros([1], device=mesh)


def test_coordinates_are_compared_and_iterated_as_in_ttnn() -> None:
    shape, place = ttnn.MeshShape(2, 2), ttnn.MeshCoordinate(0, 1)
    assert shape == ttnn.MeshShape([2, 2])
    assert place != ttnn.MeshCoordinate(1, 0)
    assert {place: 1}[ttnn.MeshCoordinate((0, 1))] == 1
    assert (list(shape), shape[-1], shape.dims(), shape.mesh_size()) == ([2, 2], 2, 2, 4)
    assert [tuple(c) for c in ttnn.MeshCoordinateRange(shape)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    column = ttnn.MeshCoordinateRange(place, ttnn.MeshCoordinate(1, 1))
    assert [tuple(c) for c in column] == [(0, 1), (1, 1)]
    assert repr(column) == "MeshCoordinateRange(start=MeshCoordinate([0, 1]), end=MeshCoordinate([1, 1]))"
    with pytest.raises(TypeError, match="compared with a tuple"):
        shape == (2, 2)  # noqa: B015
    with pytest.raises(DeviceError, match="has no axis 2"):
        place[2]
    with pytest.raises(TypeError):
        len(place)
    with pytest.raises(TypeError):
        ttnn.MeshShape(-1, 2)
    with pytest.raises(TypeError):
        ttnn.MeshShape(4)
    with pytest.raises(DeviceError, match="must not be past the last"):
        ttnn.MeshCoordinateRange(ttnn.MeshCoordinate(1, 1), place)


def box(x0: int, y0: int, x1: int, y1: int) -> Any:
    return ttnn.CoreRange(ttnn.CoreCoord(x0, y0), ttnn.CoreCoord(x1, y1))


def test_core_sets_are_what_their_ranges_hold() -> None:
    two = ttnn.CoreRangeSet([box(0, 0, 1, 0), box(0, 2, 1, 2)])
    assert (two.num_cores(), two.size(), two.empty(), str(two)) == (4, 2, False, "{[0-0 - 1-0], [0-2 - 1-2]}")
    assert two.bounding_box() == box(0, 0, 1, 2)
    assert two.contains(ttnn.CoreCoord(1, 2))
    assert not two.contains(ttnn.CoreCoord(1, 1))
    assert two.contains(box(0, 0, 1, 0))
    assert two.merge(ttnn.CoreRangeSet([box(0, 1, 1, 1)])) == ttnn.CoreRangeSet([box(0, 0, 1, 2)])
    square = ttnn.CoreRangeSet({box(0, 0, 3, 3)})
    hole = square.subtract(ttnn.CoreRangeSet([box(1, 1, 1, 1)]))
    assert hole.num_cores() == 15
    assert not hole.contains(ttnn.CoreCoord(1, 1))
    assert square.subtract(square).empty()
    for wrong in (
        lambda: ttnn.CoreRangeSet([box(0, 0, 1, 2), box(1, 1, 5, 5)]),
        lambda: box(1, 1, 0, 0),
        lambda: ttnn.CoreRangeSet([]).bounding_box(),
    ):
        with pytest.raises(DeviceError):
            wrong()


def test_cores_are_chosen_by_rows_or_columns() -> None:
    square = ttnn.CoreRangeSet([box(0, 0, 1, 1)])
    assert ttnn.corerange_to_cores(square) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert ttnn.corerange_to_cores(square, 3, True) == [(0, 0), (1, 0), (0, 1)]
    assert ttnn.grid_to_cores(3, 2, 2, True) == [(0, 0), (1, 0), (0, 1)]
    assert str(ttnn.num_cores_to_corerangeset(5, ttnn.CoreCoord(4, 2), True)) == "{[0-0 - 3-0], [0-1 - 0-1]}"
    corners = ttnn.CoreRangeSet([box(0, 0, 1, 1), box(4, 4, 5, 5)])
    chosen = ttnn.num_cores_to_corerangeset_in_subcoregrids(ttnn.CoreCoord(0, 0), 5, corners, True)
    assert str(chosen) == "{[0-0 - 1-1], [4-4 - 4-4]}"
    with pytest.raises(DeviceError, match="9 cores asked .* 8 are there"):
        ttnn.num_cores_to_corerangeset_in_subcoregrids(ttnn.CoreCoord(0, 0), 9, corners, True)
