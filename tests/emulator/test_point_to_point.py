"""point_to_point moves one chip's shard and leaves the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import OpenMesh, chips, put

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError

LEFT, RIGHT = ttnn.MeshCoordinate(0, 0), ttnn.MeshCoordinate(0, 1)


def test_the_shard_arrives_and_the_others_are_undefined(mesh: Any) -> None:
    x = put(mesh, torch.arange(2.0).view(2, 1).expand(2, 64).reshape(1, 2, 1, 64), cut=1)
    there, gone = chips(ttnn.point_to_point(x, RIGHT, LEFT))
    assert there.unique().tolist() == [1]
    assert gone.isnan().all()


@pytest.mark.parametrize("source", [LEFT, RIGHT])
def test_an_output_keeps_what_it_is_not_sent(mesh: Any, source: Any) -> None:
    x = put(mesh, torch.tensor([[[[3.0]], [[5.0]]]]).expand(1, 2, 32, 32), cut=1)
    out = put(mesh, torch.full((1, 1, 32, 32), 7.0))
    assert ttnn.point_to_point(x, source, RIGHT, output_tensor=out) is out
    assert [c.unique().tolist() for c in chips(out)] == [[7], [3.0 if source is LEFT else 5.0]]
    assert ttnn.point_to_point(x, source, RIGHT, output_tensor=x) is x
    assert [c.unique().tolist() for c in chips(x)] == [[3], [3.0 if source is LEFT else 5.0]]


def test_what_cannot_be_sent_says_why(mesh: Any) -> None:
    x = put(mesh, torch.ones(1, 1, 32, 32))
    with pytest.raises(DeviceError, match=r"receiver_coord .* is not in the mesh of 1x2 chips"):
        ttnn.point_to_point(x, LEFT, ttnn.MeshCoordinate(0, 2))
    with pytest.raises(TypeError, match="sender_coord is a tuple; give a MeshCoordinate"):
        ttnn.point_to_point(x, (0, 0), RIGHT)
    with pytest.raises(DeviceError, match=r"output .* for .*; they must be alike"):
        ttnn.point_to_point(x, LEFT, RIGHT, output_tensor=put(mesh, torch.ones(1, 1, 32, 32), ttnn.float32))
    with pytest.raises(DeviceError, match="pages of 24 B; they must be whole 16 bytes"):
        ttnn.point_to_point(put(mesh, torch.ones(1, 1, 5, 12), layout=ttnn.ROW_MAJOR_LAYOUT), LEFT, RIGHT)
    with pytest.raises(DeviceError, match="bfloat8_b, which is not sent; use typecast"):
        ttnn.point_to_point(put(mesh, torch.ones(1, 1, 32, 32), ttnn.bfloat8_b), LEFT, RIGHT)


def test_what_is_sent_goes_along_one_row_or_column(open_mesh: OpenMesh) -> None:
    x = put(open_mesh(2, 2), torch.ones(1, 1, 32, 32))
    with pytest.raises(DeviceError, match="both must be in one row or column"):
        ttnn.point_to_point(x, LEFT, ttnn.MeshCoordinate(1, 1))
    ttnn.point_to_point(x, LEFT, ttnn.MeshCoordinate(1, 0))
