"""Between host and device: conversions, copies, tensors made from nothing, the tensor's own methods, files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensors import ROW_MAJOR, TILE, OpenMesh, bfloat16, chips, generator, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import file
from disagg_tt.errors import DeviceError, NotEmulatedError

VALUES = bfloat16(torch.randn(1, 1, 40, 50, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    ("kind", "ttnn_name"),
    [
        ("float32", "FLOAT32"),
        ("bfloat16", "BFLOAT16"),
        ("float16", "BFLOAT16"),
        ("int64", "UINT32"),
        ("int32", "INT32"),
        ("int16", "UINT16"),
        ("uint8", "UINT8"),
        ("bool", "UINT8"),
    ],
)
def test_from_torch_chooses_the_dtype_that_ttnn_does(kind: str, ttnn_name: str) -> None:
    tensor = ttnn.from_torch(torch.ones(3).to(getattr(torch, kind)))
    assert tensor.dtype.name == ttnn_name
    assert tensor.to_torch().tolist() == [1, 1, 1]
    with pytest.raises(DeviceError, match=r"no ttnn dtype for torch\.float64"):
        ttnn.from_torch(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "dtype", "read"),
    [
        (torch.tensor([1.7, -2.5, 3e9, -1.0]), ttnn.uint32, [1, 4294967294, 3000000000, 4294967295]),
        (torch.tensor([1.7, -2.5, -1.0]), ttnn.int32, [1, -2, -1]),
        (torch.tensor([1.7, -2.5, 70000.0]), ttnn.uint16, [1, 0, 65535]),
        (torch.tensor([1.7, -2.5, 300.0]), ttnn.uint8, [1, 254, 44]),
        (torch.tensor([-1, 2**31, 2**33 + 5]), ttnn.uint32, [4294967295, 2147483648, 5]),
        (torch.tensor([-1, 2**31, 2**33 + 5]), ttnn.int32, [-1, -(2**31), 5]),
        (torch.tensor([-1, 70000], dtype=torch.int32), ttnn.uint16, [65535, 4464]),
        (torch.tensor([2**24 + 1], dtype=torch.int32), ttnn.float32, [16777216.0]),
        (torch.tensor([257], dtype=torch.int32), ttnn.bfloat16, [256.0]),
    ],
)
def test_numbers_convert_as_on_the_real_host(values: torch.Tensor, dtype: Any, read: list[float]) -> None:
    tensor = ttnn.from_torch(values, dtype)
    assert tensor.to_torch().tolist() == read
    assert ttnn.to_torch(tensor, torch.float64).tolist() == read, "what ops compute with"


def test_from_torch_takes_arrays_specs_and_nothing(mesh: Any) -> None:
    assert ttnn.from_torch(None) is None
    assert ttnn.from_torch(np.ones((2, 3), dtype=np.float32)).shape == [2, 3]
    with pytest.raises(TypeError, match="not a list"):
        ttnn.from_torch([1, 2])
    spec = ttnn.TensorSpec(VALUES.shape, ttnn.bfloat16, TILE, ttnn.BufferType.L1)
    tensor = ttnn.from_torch(VALUES, spec=spec, device=mesh)
    assert tensor.spec is spec
    assert ttnn.from_torch(VALUES, dtype=ttnn.bfloat8_b).layout is TILE, "block floats have no other"
    for wrong in ({"dtype": ttnn.bfloat16}, {"layout": TILE}, {"memory_config": ttnn.L1_MEMORY_CONFIG}):
        with pytest.raises(DeviceError, match=f"{next(iter(wrong))} given beside it"):
            ttnn.from_torch(VALUES, spec=spec, **wrong)
    with pytest.raises(DeviceError, match="the shapes must agree"):
        ttnn.from_torch(VALUES[..., :32], spec=spec)
    with pytest.raises(NotEmulatedError, match="does not have col_tilize=True"):
        ttnn.from_torch(VALUES, ttnn.bfloat8_b, col_tilize=True)
    with pytest.raises(NotEmulatedError, match="does not have other tiles"):
        ttnn.from_torch(VALUES, layout=TILE, tile=ttnn.Tile((16, 32)))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float32", None), ("float32", ttnn.bfloat8_b), ("int64", ttnn.int32)]
)
def test_what_was_given_may_change_afterwards(mesh: Any, kind: str, dtype: Any) -> None:
    values = torch.ones(1, 1, 32, 32, dtype=getattr(torch, kind))
    tensor = ttnn.from_torch(values, dtype, layout=TILE, device=mesh)
    read = ttnn.to_torch(ttnn.get_device_tensors(tensor)[0])
    values += 1
    read += 5
    assert same_on_all(tensor).unique().tolist() == [1]


def test_to_torch_gives_the_dtype_and_rank_asked_for() -> None:
    tensor = ttnn.from_torch(VALUES)
    assert ttnn.to_torch(tensor, torch.float64).dtype is torch.float64
    assert ttnn.to_torch(tensor, torch_rank=2).shape == (40, 50)
    with pytest.raises(DeviceError, match=r"\[2, 1, 3\] cannot lose 2 axes"):
        ttnn.to_torch(ttnn.from_torch(torch.zeros(2, 1, 3)), torch_rank=1)


def test_tensors_go_to_the_device_and_back(mesh: Any) -> None:
    host = ttnn.from_torch(VALUES, ttnn.bfloat16, layout=TILE, memory_config=ttnn.L1_MEMORY_CONFIG)
    there = ttnn.to_device(host, mesh)
    assert there.memory_config() == ttnn.DRAM_MEMORY_CONFIG, "the host tensor's own place does not count"
    assert torch.equal(same_on_all(there), VALUES)
    in_l1 = host.to(mesh, ttnn.L1_MEMORY_CONFIG)
    assert in_l1.memory_config() == ttnn.L1_MEMORY_CONFIG
    assert ttnn.to_device(there, mesh, ttnn.L1_MEMORY_CONFIG) is there, "it is on the device already"
    back = ttnn.from_device(there)
    assert back.storage_type() is ttnn.StorageType.HOST
    assert len(parts := chips(back)) == 2, "one part a chip"
    assert all(torch.equal(part, VALUES) for part in parts)
    assert ttnn.from_device(back) is back


def test_what_came_to_the_host_does_not_change_with_the_device_tensor(mesh: Any) -> None:
    there = put(mesh, VALUES)
    there._values.private = True  # as after an op that writes its input in place
    back = there.cpu()
    assert not there._values.private, "the next such op must not write what the host holds"
    ttnn.zeros_like(there, optional_tensor=there)
    assert torch.equal(chips(back)[0], VALUES)
    assert not same_on_all(there).any()


def test_a_copy_that_does_not_block_is_read_after_synchronisation(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(1, 1)
    tensor, gate = put(mesh, VALUES), threading.Event()
    mesh.queue().submit("gate", lambda: (gate.wait(10), None)[1], waits=True)
    later = tensor.cpu(blocking=False)
    into = ttnn.allocate_tensor_on_host(tensor.spec, mesh)
    ttnn.copy_device_to_host_tensor(tensor, into, False)
    for host in (later, into):
        with pytest.raises(DeviceError, match="may still be writing"):
            host.to_torch()
    gate.set()
    ttnn.synchronize_device(mesh)
    assert all(torch.equal(host.to_torch().float(), VALUES) for host in (later, into))


def test_host_tensors_are_copied_into_device_tensors_of_their_kind(mesh: Any) -> None:
    target = put(mesh, torch.zeros(1, 1, 40, 50))
    ttnn.copy_host_to_device_tensor(ttnn.from_torch(VALUES, ttnn.bfloat16, layout=TILE), target, 0)
    assert torch.equal(same_on_all(target), VALUES)
    both = torch.stack([VALUES[0], 2 * VALUES[0]])
    cut = ttnn.from_torch(both, ttnn.bfloat16, layout=TILE, mesh_mapper=ttnn.ShardTensorToMesh(mesh, 0))
    ttnn.copy_host_to_device_tensor(cut, target)
    assert torch.equal(torch.cat(chips(target)), both)
    for wrong in (ttnn.from_torch(VALUES, ttnn.bfloat16), ttnn.from_torch(VALUES, layout=TILE)):
        with pytest.raises(DeviceError, match="shape, dtype and layout must match"):
            ttnn.copy_host_to_device_tensor(wrong, target)
        with pytest.raises(DeviceError, match="shape, dtype and layout must match"):
            ttnn.copy_device_to_host_tensor(target, wrong)
    one_part = ttnn.from_torch(VALUES, ttnn.bfloat16, layout=TILE)
    with pytest.raises(DeviceError, match="a host tensor of 1 parts for 2 chips"):
        ttnn.copy_device_to_host_tensor(target, one_part)
    with pytest.raises(DeviceError, match="must be a host tensor"):
        ttnn.copy_host_to_device_tensor(target, target)
    with pytest.raises(DeviceError, match="must be a host tensor"):
        ttnn.copy_device_to_host_tensor(target, target)


def test_tensors_of_one_value(mesh: Any) -> None:
    for make, value in ((ttnn.zeros, 0), (ttnn.ones, 1)):
        tensor = make([2, 3], ttnn.uint32, TILE, mesh, ttnn.L1_MEMORY_CONFIG)
        assert same_on_all(tensor).unique().tolist() == [value]
        assert tensor.memory_config() == ttnn.L1_MEMORY_CONFIG
        assert make([2, 3]).spec is ttnn.TensorSpec([2, 3], ttnn.bfloat16, ROW_MAJOR)
        assert make([2, 3], ttnn.bfloat8_b).layout is TILE
    assert ttnn.full([2], -7, ttnn.uint32).to_torch().tolist() == [4294967289] * 2
    assert ttnn.full([2], 1.5, ttnn.int32).to_torch().tolist() == [1, 1]
    x = ttnn.full([1, 1, 32, 32], 0.1, layout=TILE, device=mesh)
    assert same_on_all(x).unique().tolist() == [0.10009765625]
    assert ttnn.full_like(x, 3, ttnn.float32).dtype is ttnn.float32
    assert ttnn.ones_like(x, layout=ROW_MAJOR).layout is ROW_MAJOR
    assert ttnn.zeros_like(ttnn.from_torch(VALUES)).device() is None
    assert ttnn.full_like(x, 4, optional_tensor=x) is x
    assert same_on_all(x).unique().tolist() == [4]
    with pytest.raises(DeviceError, match="they must be alike"):
        ttnn.zeros_like(x, optional_tensor=ttnn.ones([2], device=mesh))


def test_tensors_of_undefined_values(mesh: Any) -> None:
    for tensor in (
        ttnn.empty([2, 3], device=mesh),
        ttnn.allocate_tensor_on_device([2, 3], ttnn.bfloat16, ROW_MAJOR, mesh),
        ttnn.allocate_tensor_on_device(ttnn.TensorSpec([2, 3], ttnn.bfloat16, ROW_MAJOR), mesh),
        ttnn.allocate_tensor_on_device(tensor_spec=ttnn.zeros([2, 3]).spec, mesh_device=mesh),
        ttnn.allocate_tensor_on_device(shape=[2, 3], dtype=ttnn.bfloat16, layout=ROW_MAJOR, mesh_device=mesh),
        ttnn.empty_like(ttnn.zeros([2, 3], device=mesh)),
    ):
        assert tensor.spec is ttnn.TensorSpec([2, 3], ttnn.bfloat16, ROW_MAJOR)
        assert same_on_all(tensor).isnan().all()
    with pytest.raises(TypeError, match="mesh_device is a NoneType"):
        ttnn.empty([2, 3])
    with pytest.raises(TypeError, match="takes"):
        ttnn.allocate_tensor_on_device([2, 3], ttnn.bfloat16, mesh_device=mesh)
    with pytest.raises(DeviceError, match="is on the host; pass device="):
        ttnn.empty_like(ttnn.zeros([2, 3]))


def test_ranges(mesh: Any) -> None:
    assert ttnn.arange(4).to_torch().tolist() == [0, 1, 2, 3]
    assert ttnn.arange(300).to_torch()[255:260].tolist() == [255, 256, 256, 258, 260]
    assert same_on_all(ttnn.arange(1, 9, 3, dtype=ttnn.int32, device=mesh)).tolist() == [1, 4, 7]
    assert ttnn.arange(5, 0, -2).to_torch().tolist() == [5, 3, 1]
    for wrong in ((5, 0), (0, 5, 0)):
        with pytest.raises(DeviceError, match="the step must lead from start to end"):
            ttnn.arange(*wrong)


def test_a_tensor_tells_of_itself(mesh: Any) -> None:
    x, rows = put(mesh, VALUES), put(mesh, VALUES, layout=ROW_MAJOR)
    assert (x.logical_volume(), x.volume(), x.element_size()) == (2000, 4096, 2)
    assert (x.buffer_page_size(), x.buffer_num_pages(), rows.buffer_aligned_page_size()) == (2048, 4, 128)
    assert (x.get_dtype(), x.get_layout(), x.devices()) == (ttnn.bfloat16, TILE, [mesh])
    assert x.tile == x.get_tile() == ttnn.Tile((32, 32))
    assert x.tile.get_tile_size(ttnn.bfloat8_b) == ttnn.tile_size(ttnn.bfloat8_b) == 1088
    assert x.spec == ttnn.TensorSpec([1, 1, 40, 50], ttnn.bfloat16, TILE)
    host = ttnn.from_torch(VALUES, ttnn.bfloat8_b)
    for wrong in (host.element_size, host.buffer_page_size):
        with pytest.raises(DeviceError):
            wrong()
    with pytest.raises(NotEmulatedError, match=r"Tensor\.buffer_address: the emulator does not have it"):
        x.buffer_address()
    with pytest.raises(AttributeError, match=r"ttnn\.Tensor has no colour"):
        x.colour  # noqa: B018
    assert "chip 1:\nttnn.Tensor(" in str(x)
    assert str(ttnn.arange(2)).startswith("ttnn.Tensor([0., 1.]")
    ttnn.deallocate(x)
    assert "Tensor(" in str(x)


def test_host_tensors_change_dtype_layout_and_shape() -> None:
    x = ttnn.from_torch(VALUES, ttnn.bfloat16)
    assert x.to(TILE).padded_shape == [1, 1, 64, 64]
    assert x.to(TILE).to(ROW_MAJOR).spec is x.spec
    assert x.reshape(1, 1, 50, 40).shape == [1, 1, 50, 40]
    assert torch.equal(x.reshape([-1, 25]).to_torch().float(), VALUES.reshape(-1, 25))
    assert ttnn.to_dtype(x, ttnn.float32).dtype is ttnn.float32
    assert ttnn.to_dtype(x.to(TILE), ttnn.bfloat8_b).dtype is ttnn.bfloat8_b
    with pytest.raises(DeviceError, match="needs padding; make it TILE layout first"):
        ttnn.to_dtype(x, ttnn.bfloat8_b)
    with pytest.raises(DeviceError, match="the element counts differ"):
        x.reshape([3, 3])
    with pytest.raises(
        DeviceError, match="on the host, where no tile is rearranged"
    ):  # ttnn gives other values
        x.to(TILE).reshape(1, 1, 50, 40)
    assert ttnn.from_torch(torch.tensor([2.5])).item() == 2.5
    assert ttnn.from_torch(torch.tensor([[1.0, 2.0]])).to_list() == [[1.0, 2.0]]
    assert x.to_numpy().dtype == np.float32
    with pytest.raises(DeviceError, match="item of a tensor of 2000 elements"):
        x.item()


INDICES: dict[str, Callable[[Any], Any]] = {
    "integer": lambda t: t[0],
    "negative": lambda t: t[-1, 1],
    "slices": lambda t: t[:, :, 0:32],
    "ellipsis": lambda t: t[..., :32],
    "mixed": lambda t: t[1, ..., 2:9, :],
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("where", ["host", "device"])
def test_indexing_is_that_of_torch(mesh: Any, name: str, where: str) -> None:
    values = bfloat16(torch.randn(2, 3, 64, 64, generator=generator(3)))
    x = put(mesh, values, layout=ROW_MAJOR) if where == "device" else ttnn.from_torch(values, ttnn.bfloat16)
    got = INDICES[name](x)
    assert torch.equal(chips(got)[0], INDICES[name](values))
    for wrong in (lambda: x[5], lambda: x[0, 0, 0, 0, 0]):
        with pytest.raises(IndexError):
            wrong()


def test_operators_are_the_ops(mesh: Any) -> None:
    x = put(mesh, VALUES)
    for made, right in ((x + x, 2 * VALUES), (x * 2, 2 * VALUES), (2 * x, 2 * VALUES), (x - x, 0 * VALUES)):
        assert torch.equal(same_on_all(made), right)
    assert same_on_all(x == x).all()
    assert not same_on_all(x != x).any()
    assert {x: 1}[x] == 1, "a tensor is a key by identity"


def test_the_constructor_takes_ttnns_forms(mesh: Any) -> None:
    assert ttnn.Tensor(VALUES).spec is ttnn.TensorSpec(VALUES.shape, ttnn.float32, ROW_MAJOR)
    assert ttnn.Tensor(VALUES, ttnn.bfloat16, mesh, TILE).device() is mesh
    named = ttnn.Tensor(tensor=VALUES, data_type=ttnn.bfloat16, layout=TILE, device=mesh,
                        mem_config=ttnn.L1_MEMORY_CONFIG, mesh_mapper=ttnn.ShardTensorToMesh(mesh, 3))  # fmt: skip
    assert (named.shape, named.memory_config()) == ([1, 1, 40, 25], ttnn.L1_MEMORY_CONFIG)
    numbers = ttnn.Tensor([1, 2, 3, 4], [1, 1, 2, 2], ttnn.int32, ROW_MAJOR, mesh)
    assert same_on_all(numbers).tolist() == [[[[1, 2], [3, 4]]]]
    same = ttnn.Tensor(numbers)
    assert torch.equal(same_on_all(same), same_on_all(numbers))
    with pytest.raises(DeviceError, match=r"3 numbers and shape \[2, 2\]"):
        ttnn.Tensor([1, 2, 3], [2, 2], ttnn.int32, ROW_MAJOR)


@pytest.mark.parametrize("dtype", list(ttnn.DataType))
@pytest.mark.parametrize("shape", [(2, 1, 40, 50), (7,), (0, 5), ()], ids=str)
def test_files_give_back_what_was_written(mesh: Any, tmp_path: Path, dtype: Any, shape: Any) -> None:
    values = torch.randint(0, 200, shape, generator=generator(8)).float()
    tensor = ttnn.from_torch(values, dtype, layout=TILE)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", tensor)
    read = ttnn.load_tensor(str(tmp_path / "x.tensorbin"))
    assert read.spec is tensor.spec
    assert torch.equal(read.to_torch().float(), tensor.to_torch().float())
    assert [path.name for path in tmp_path.iterdir()] == ["x.tensorbin"]


def test_files_keep_the_parts_and_the_place(mesh: Any, tmp_path: Path) -> None:
    cores = ttnn.CoreRangeSet([ttnn.CoreRange((0, 0), (1, 0))])
    shard = ttnn.ShardSpec(cores, (64, 32), ttnn.ShardOrientation.ROW_MAJOR)
    place = ttnn.MemoryConfig(ttnn.TensorMemoryLayout.WIDTH_SHARDED, ttnn.BufferType.L1, shard)
    mapper = ttnn.ShardTensorToMesh(mesh, 3)
    both = torch.cat([VALUES, -VALUES], dim=3)
    tensor = ttnn.from_torch(both, ttnn.bfloat16, layout=TILE, memory_config=place, mesh_mapper=mapper)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", tensor)
    read = ttnn.load_tensor(tmp_path / "x.tensorbin", device=mesh)
    assert read.memory_config() == place
    assert torch.equal(torch.cat(chips(read), dim=3), both)


def test_a_damaged_cache_of_as_tensor_is_made_anew(mesh: Any, tmp_path: Path) -> None:
    def made() -> Any:
        return ttnn.as_tensor(VALUES, ttnn.bfloat16, layout=TILE, cache_file_name=tmp_path / "x")

    made()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert torch.equal(made().to_torch(), VALUES.bfloat16()) and file.read_bytes() == whole


def test_of_several_ranks_each_writes_a_file_of_its_own(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "distributed_context_is_initialized", lambda: True)
    monkeypatch.setattr(file, "size", lambda: 2)
    with pytest.raises(
        NotEmulatedError, match="rank 0 alone writes the file; give mode=ttnn.DumpTensorMode.LOCAL"
    ):
        ttnn.dump_tensor(tmp_path / "x.tensorbin", ttnn.ones([8, 8]))
    assert not list(tmp_path.iterdir())
    ttnn.dump_tensor(tmp_path / "x.tensorbin", ttnn.ones([8, 8]), mode=ttnn.DumpTensorMode.LOCAL)
    assert ttnn.load_tensor(tmp_path / "x.tensorbin").shape == (8, 8)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tensorbin"
    with pytest.raises(DeviceError, match=r"must end in \.tensorbin"):
        ttnn.dump_tensor(tmp_path / "x.bin", ttnn.zeros([2]))
    with pytest.raises(DeviceError, match="is not a file"):
        ttnn.load_tensor(path)
    path.write_bytes(b"\x18\0\0\0 a flatbuffer of the real ttnn")
    with pytest.raises(DeviceError, match="a file of the real ttnn is a flatbuffer"):
        ttnn.load_tensor(path)
    with pytest.raises(RuntimeError, match="mode is 'LOCAL'"):
        ttnn.dump_tensor(path, ttnn.ones([8, 8]), mode="LOCAL")
    ttnn.dump_tensor(path, ttnn.ones([8, 8]))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole.replace(b'"BFLOAT16"', b'"BFLOAT17"'), whole[:40]):
        path.write_bytes(damaged)
        with pytest.raises(DeviceError, match="is damaged"):
            ttnn.load_tensor(path)


def test_as_tensor_fills_its_cache_once(mesh: Any, tmp_path: Path) -> None:
    calls = []

    def cached(values: torch.Tensor) -> Any:
        return ttnn.as_tensor(
            values, ttnn.bfloat8_b, layout=TILE, device=mesh, memory_config=ttnn.L1_MEMORY_CONFIG,
            cache_file_name=tmp_path / "deep" / "w", preprocess=lambda t: calls.append(1) or 2 * t,
            mesh_mapper=ttnn.ShardTensorToMesh(mesh, 3),
        )  # fmt: skip

    first, second = cached(VALUES), cached(0 * VALUES)
    assert calls == [1]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [
        "w_dtype_BFLOAT8_B_layout_TILE.emulator.tensorbin"
    ]
    assert second.memory_config() == ttnn.L1_MEMORY_CONFIG
    assert all(torch.equal(a, b) for a, b in zip(chips(first), chips(second), strict=True))
    assert ttnn.as_tensor(VALUES).device() is None
    with pytest.raises(DeviceError, match="memory_config must be given with device"):
        ttnn.as_tensor(VALUES, device=mesh)


def test_the_host_does_not_read_while_a_trace_is_captured(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(1, 1, trace_region_size=1 << 20)
    x = put(mesh, VALUES)
    trace = ttnn.begin_trace_capture(mesh, cq_id=0)
    assert ttnn.is_trace_capture_active(mesh)
    for read in (x.cpu, lambda: x.cpu(blocking=False), x.to_torch):
        with pytest.raises(DeviceError, match="captures a trace"):
            read()
    ttnn.end_trace_capture(mesh, trace, cq_id=0)
    assert not ttnn.is_trace_capture_active(mesh)
    assert torch.equal(x.to_torch().float(), VALUES)
