"""Collectives on meshes of every shape, each chip with values of its own, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import OpenMesh, assert_rounded, bfloat16, chips, generator, height_sharded, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError, NotEmulatedError


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 2), (2, 1)])
def test_gather_and_reduce_over_every_mesh(open_mesh: OpenMesh, shape: tuple[int, int]) -> None:
    mesh, count = open_mesh(*shape), shape[0] * shape[1]
    if min(shape) > 1 or shape == (2, 1):
        mesh.reshape(ttnn.MeshShape(1, count))
    x = values(1, 1, 40, 64 * count)
    device = put(mesh, x, cut=3)
    assert torch.equal(same_on_all(ttnn.all_gather(device, dim=3, cluster_axis=1)), x)
    assert torch.equal(same_on_all(ttnn.all_gather(device, dim=2)), torch.cat(x.chunk(count, 3), dim=2))
    assert_rounded(same_on_all(ttnn.all_reduce(device, cluster_axis=1)), sum(x.chunk(count, 3)))  # type: ignore[arg-type]


def test_gather_and_reduce_of_what_all_chips_share(mesh: Any) -> None:
    x = values(1, 1, 40, 64)
    assert torch.equal(same_on_all(ttnn.all_gather(put(mesh, x), dim=-1)), torch.cat([x, x], dim=-1))
    assert_rounded(same_on_all(ttnn.all_reduce(put(mesh, x))), 2 * x)


def test_gathering_rows_of_which_some_are_undefined_keeps_each_chips_rows_apart(mesh: Any) -> None:
    q = ttnn.to_memory_config(put(mesh, values(1, 3, 2, 64), cut=3), height_sharded(mesh, 3, 32, 32))
    x = ttnn.to_memory_config(
        ttnn.experimental.nlp_concat_heads_decode(q, num_heads=2), ttnn.DRAM_MEMORY_CONFIG
    )
    gathered = same_on_all(ttnn.all_gather(x, dim=2, cluster_axis=1))
    for chip, part in enumerate(chips(x)):
        torch.testing.assert_close(
            gathered[:, :, 32 * chip : 32 * (chip + 1)], part, rtol=0, atol=0, equal_nan=True
        )


def test_a_submesh_computes_on_its_own_chips(open_mesh: OpenMesh) -> None:
    parent = open_mesh(2, 2)
    low = parent.create_submesh(ttnn.MeshShape(1, 2), ttnn.MeshCoordinate(1, 0))
    assert low.get_device_ids() == [2, 3]
    x = values(1, 1, 32, 64)
    assert torch.equal(same_on_all(ttnn.all_gather(put(low, x, cut=3), dim=3, cluster_axis=1)), x)


def lines(rows: int, columns: int, axis: int | None) -> list[list[int]]:
    """Return the chips that take part together."""
    grid = torch.arange(rows * columns).view(rows, columns)
    if axis is None:
        return [grid.flatten().tolist()]
    return (grid if axis == 1 else grid.T).tolist()


MESHES = [(1, 2, None), (1, 2, 1), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, None), (2, 4, 0), (2, 4, 1)]


@pytest.mark.parametrize(("rows", "columns", "axis"), MESHES)
def test_each_line_of_chips_works_for_itself(open_mesh: OpenMesh, rows: int, columns: int, axis: Any) -> None:
    mesh, count = open_mesh(rows, columns), rows * columns
    x = values(count, 1, 40, 256)
    device = put(mesh, x, cut=0)
    gathered = chips(ttnn.all_gather(device, dim=2, cluster_axis=axis))
    reduced = chips(ttnn.all_reduce(device, cluster_axis=axis))
    scattered = chips(ttnn.reduce_scatter(device, dim=3, cluster_axis=axis))
    sent = [chips(t) for t in ttnn.all_broadcast(device, cluster_axis=axis)]
    for line in lines(rows, columns, axis):
        own = [x[chip : chip + 1] for chip in line]
        total = torch.stack(own).sum(0)
        for place, chip in enumerate(line):
            assert torch.equal(gathered[chip], torch.cat(own, dim=2))
            assert_rounded(reduced[chip], total)
            assert_rounded(scattered[chip], total.chunk(len(line), dim=3)[place])
            for tensor, expected in zip(sent, own, strict=True):
                assert torch.equal(tensor[chip], expected)


def test_scattering_what_all_chips_share(mesh: Any) -> None:
    x = values(1, 1, 40, 128)
    for chip, part in enumerate(chips(ttnn.reduce_scatter(put(mesh, x), dim=-1))):
        assert torch.equal(part, 2 * x.chunk(2, dim=-1)[chip])


def test_broadcast_gives_all_chips_the_senders_values(mesh: Any) -> None:
    x = values(2, 1, 40, 64)
    for column in range(2):
        result = ttnn.broadcast(put(mesh, x, cut=0), ttnn.MeshCoordinate(0, column), cluster_axis=1)
        assert torch.equal(same_on_all(result), x[column : column + 1])


def test_block_floats_are_summed_as_bfloat16_and_packed_again(mesh: Any) -> None:
    x = put(mesh, torch.randn(2, 1, 64, 64, generator=generator(5)), ttnn.bfloat8_b, cut=0)
    total = round_on_device(sum(chips(x)), DataType.BFLOAT16)  # type: ignore[arg-type]
    assert torch.equal(same_on_all(ttnn.all_reduce(x)), round_on_device(total, DataType.BFLOAT8_B))


def test_integer_sums_are_exact_and_wrap_around(mesh: Any) -> None:
    x = torch.tensor([[2**31 - 1] * 64, [1] * 64])
    assert same_on_all(ttnn.all_reduce(put(mesh, x, ttnn.int32, cut=0))).unique().tolist() == [-(2**31)]


def test_what_ttnn_rejects_is_rejected(mesh: Any) -> None:
    x = put(mesh, values(1, 1, 32, 96))
    for call, message in (
        (lambda: ttnn.all_reduce(x, cluster_axis=0), "spans one chip; two or more are needed"),
        (lambda: ttnn.all_reduce(x, cluster_axis=2), "cluster_axis 2; allowed: 0, 1"),
        (lambda: ttnn.all_gather(x, dim=4), "dim 4 of a tensor of 4 axes"),
        (lambda: ttnn.reduce_scatter(x, dim=0), r"axis 0 of \[1, 1, 32, 96\] over 2 chips"),
        (lambda: ttnn.broadcast(x, ttnn.MeshCoordinate(1, 0)), "sender"),
    ):
        with pytest.raises(DeviceError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_what_is_not_emulated_says_so(mesh: Any) -> None:
    x = put(mesh, values(1, 1, 64, 64))
    shards = height_sharded(mesh, 2, 32, 64)
    for call, message in (
        (lambda: ttnn.all_reduce(x, memory_config=shards), "does not work on shards"),
        (lambda: ttnn.reduce_scatter(ttnn.to_memory_config(x, shards), dim=2), "does not work on shards"),
        (lambda: ttnn.all_gather(x, dim=2, output_tensor=x), "does not take output_tensor"),
        (lambda: ttnn.experimental.all_gather_async(x, dim=2), "does not have collectives with semaphores"),
    ):
        with pytest.raises(NotEmulatedError, match=message):
            call()  # type: ignore[no-untyped-call]
