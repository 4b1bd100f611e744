"""The bytes of host tensors: as many as ttnn's, writable in place, and what the tensor holds from then on."""

from __future__ import annotations

import pytest
import torch

from disagg_tt.device import ttnn
from disagg_tt.device.host import staging
from disagg_tt.errors import DeviceError, NotEmulatedError

TILE_BYTES = {
    "bfloat16": 2048,
    "float32": 4096,
    "uint32": 4096,
    "uint16": 2048,
    "bfloat8_b": 1088,
    "bfloat4_b": 576,
}


def view(tensor, column: int = 0, row: int = 0) -> torch.Tensor:
    return torch.from_dlpack(tensor.host_buffer().get_shard(ttnn.MeshCoordinate(row, column)))


def spec(shape: list[int], dtype: str, layout=None):
    return ttnn.TensorSpec(ttnn.Shape(shape), getattr(ttnn, dtype), layout or ttnn.TILE_LAYOUT)


@pytest.mark.parametrize("dtype", TILE_BYTES)
def test_a_part_has_the_bytes_of_its_tiles_and_stays_where_it_is(mesh, dtype):
    host = ttnn.allocate_tensor_on_host(spec([1, 2, 33, 64], dtype), mesh)
    parts = [view(host, column) for column in range(2)]
    for column, part in enumerate(parts):
        assert (part.dtype, part.shape) == (torch.uint8, (2 * 2 * 2 * TILE_BYTES[dtype],))
        part.fill_(column)
        assert view(host, column).data_ptr() == part.data_ptr()
    assert [int(part[0]) for part in parts] == [0, 1], "each chip has its own memory"


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, "TILE_LAYOUT") for dtype in TILE_BYTES]
    + [(dtype, "ROW_MAJOR_LAYOUT") for dtype in TILE_BYTES if not dtype.endswith("_b")],
)
def test_bytes_moved_from_one_mesh_to_another_carry_the_values(mesh, dtype, layout):
    generator = torch.Generator().manual_seed(3)
    shape = [2, 2, 33, 64]  # a chip's rows are no whole tiles: padding travels, and does not come back
    values = torch.randn(shape, generator=generator) * 100
    if "int" in dtype:
        values = values.abs().to(torch.int32)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=0)
    sent = ttnn.from_torch(
        values, getattr(ttnn, dtype), layout=getattr(ttnn, layout), device=mesh, mesh_mapper=mapper
    )
    out, out_parts = staging(mesh, spec([1, 2, 33, 64], dtype, getattr(ttnn, layout)))
    back, back_parts = staging(mesh, spec([1, 2, 33, 64], dtype, getattr(ttnn, layout)))
    ttnn.copy_device_to_host_tensor(sent, out, blocking=False)
    ttnn.synchronize_device(mesh)
    for source, target in zip(out_parts, back_parts, strict=True):
        assert source.any()
        target.copy_(source)
    received = ttnn.allocate_tensor_on_device(back.spec, mesh)
    ttnn.copy_host_to_device_tensor(back, received)
    for one, other in zip(ttnn.get_device_tensors(sent), ttnn.get_device_tensors(received), strict=True):
        assert torch.equal(ttnn.to_torch(one), ttnn.to_torch(other))
    joined = ttnn.to_torch(back, mesh_composer=ttnn.ConcatMeshToTensor(mesh, 0))
    for number, shard in enumerate(ttnn.get_device_tensors(sent)):
        assert torch.equal(joined[number : number + 1], ttnn.to_torch(shard))


def test_what_every_chip_holds_alike_fills_every_part(mesh):
    values = torch.arange(1024, dtype=torch.float32).reshape(1, 1, 32, 32)
    same = ttnn.from_torch(values, ttnn.float32, layout=ttnn.TILE_LAYOUT, device=mesh)
    host, parts = staging(mesh, spec([1, 1, 32, 32], "float32"))
    ttnn.copy_device_to_host_tensor(same, host)
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0].view(torch.float32)[:17], torch.tensor([*range(16), 32.0])), (
        "a face of 16 x 16"
    )


def test_a_tensor_on_a_device_and_a_place_outside_the_mesh_are_refused(mesh):
    device = ttnn.allocate_tensor_on_device(spec([1, 1, 32, 32], "bfloat16"), mesh)
    with pytest.raises(DeviceError, match="only host tensors have one"):
        device.host_buffer()
    host = ttnn.allocate_tensor_on_host(spec([1, 1, 32, 32], "bfloat16"), mesh)
    for place in ((0, 2), (1, 0)):
        with pytest.raises(DeviceError, match="is outside of"):
            host.host_buffer().get_shard(ttnn.MeshCoordinate(*place))
    with pytest.raises(NotEmulatedError, match="in several parts"):
        device.cpu().host_buffer()


def test_a_tensor_from_torch_has_its_bytes_at_the_origin():
    host = ttnn.from_torch(torch.tensor([[1.0, -2.0]]), ttnn.bfloat16)
    buffer = host.host_buffer().get_shard(ttnn.MeshCoordinate(0, 0))
    assert [len(buffer), *buffer] == [4, 0x80, 0x3F, 0x00, 0xC0]
    view(host)[1] = 0xBF
    assert ttnn.to_torch(host).tolist() == [[-1.0, -2.0]]
