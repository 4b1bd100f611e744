"""Memory: what each tensor takes of a DRAM bank or a core's L1, when it is given back, and what does not fit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensors import OpenMesh

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError

DRAM, L1 = ttnn.BufferType.DRAM, ttnn.BufferType.L1

# Run on the emulator here and on the real runtime in a process of its own: bytes of each bank or core that each takes.
TENSORS = """
def sharded(strategy, height, width, cores):
    return ttnn.create_sharded_memory_config(
        (height, width),
        core_grid=ttnn.num_cores_to_corerangeset(cores, ttnn.CoreCoord(8, 7), True),
        strategy=strategy,
        orientation=ttnn.ShardOrientation.ROW_MAJOR,
        use_height_and_width_as_shard_shape=True,
    )


def blocks(order, height, width, columns, rows):
    cores = ttnn.CoreRangeSet([ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(columns - 1, rows - 1))])
    shard = ttnn.ShardSpec(cores, [height, width], getattr(ttnn.ShardOrientation, order))
    return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.BLOCK_SHARDED, ttnn.BufferType.L1, shard)


def in_dram(height, width, banks):
    cores = ttnn.num_cores_to_corerangeset(banks, ttnn.CoreCoord(12, 1), True)
    shard = ttnn.ShardSpec(cores, [height, width], ttnn.ShardOrientation.ROW_MAJOR)
    return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.WIDTH_SHARDED, ttnn.BufferType.DRAM, shard)


def tensors():
    tile, rows = ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT
    dram, l1 = ttnn.DRAM_MEMORY_CONFIG, ttnn.L1_MEMORY_CONFIG
    height, width = ttnn.ShardStrategy.HEIGHT, ttnn.ShardStrategy.WIDTH
    return {
        "bfloat16 tiles": ([1, 1, 100, 100], ttnn.bfloat16, tile, dram),
        "bfloat8_b tiles": ([1, 1, 100, 100], ttnn.bfloat8_b, tile, dram),
        "bfloat4_b tiles": ([1, 1, 1000, 100], ttnn.bfloat4_b, tile, dram),
        "float32 tiles": ([3, 2, 40, 40], ttnn.float32, tile, dram),
        "K/V pool": ([64, 4, 32, 128], ttnn.bfloat8_b, tile, dram),
        "embedding": ([1, 1, 2048, 128], ttnn.bfloat16, rows, dram),
        "rows of 200 B": ([1, 1, 100, 100], ttnn.bfloat16, rows, dram),
        "rows of 6 B": ([1, 1, 100, 3], ttnn.bfloat16, rows, dram),
        "page table": ([3, 5], ttnn.int32, rows, dram),
        "positions": ([3], ttnn.int32, rows, dram),
        "ids in L1": ([1, 3], ttnn.uint32, rows, l1),
        "bfloat16 tiles in L1": ([1, 1, 32, 4096], ttnn.bfloat16, tile, l1),
        "bfloat8_b tiles in L1": ([1, 1, 32, 4096], ttnn.bfloat8_b, tile, l1),
        "rows in L1": ([1, 1, 100, 100], ttnn.bfloat16, rows, l1),
        "three users": ([1, 3, 4, 64], ttnn.bfloat16, tile, sharded(height, 32, 64, 3)),
        "32 users": ([1, 32, 16, 128], ttnn.bfloat16, tile, sharded(height, 32, 128, 32)),
        "width sharded": ([1, 1, 32, 1024], ttnn.bfloat8_b, tile, sharded(width, 32, 128, 8)),
        "one axis in tiles": ([5], ttnn.bfloat16, tile, dram),
        "no axis": ([], ttnn.bfloat16, rows, dram),
        "short rows of shards": ([1, 1, 7, 64], ttnn.uint32, rows, sharded(width, 7, 5, 13)),
        "wider shards than rows": ([3, 1, 50, 5], ttnn.uint32, rows, sharded(height, 25, 6, 6)),
        "more rows in shards than there are": ([1, 1, 100, 64], ttnn.bfloat16, tile, sharded(height, 64, 64, 2)),
        "blocks": ([1, 1, 128, 192], ttnn.bfloat16, tile, blocks("ROW_MAJOR", 64, 64, 3, 2)),
        "blocks by columns": ([1, 1, 128, 192], ttnn.bfloat16, tile, blocks("COL_MAJOR", 64, 64, 2, 3)),
        "DRAM shards": ([1, 1, 32, 768], ttnn.bfloat8_b, tile, in_dram(32, 64, 12)),
        "DRAM shards of rows": ([3, 1, 4, 5], ttnn.uint16, rows, in_dram(12, 1, 9)),
    }


def taken(mesh, used):
    sizes = {}
    for name, (shape, dtype, layout, place) in tensors().items():
        before = used(mesh)
        tensor = ttnn.allocate_tensor_on_device(ttnn.Shape(shape), dtype, layout, mesh, place)
        sizes[name] = [now - then for now, then in zip(used(mesh), before)]
        sizes[name] += [tensor.buffer_page_size(), tensor.buffer_aligned_page_size(), tensor.buffer_num_pages()]
        sizes[name] += [list(tensor.padded_shape), tensor.volume()]
        del tensor
    return sizes
"""

ON_TTNN = (
    "import json, ttnn\n"
    + TENSORS
    + """
def used(mesh):
    kinds = (ttnn.BufferType.DRAM, ttnn.BufferType.L1)
    return [ttnn.get_memory_view(mesh, kind).total_bytes_allocated_per_bank for kind in kinds]


ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
dispatch = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 2), dispatch_core_config=dispatch)
views = [ttnn.get_memory_view(mesh, kind) for kind in (ttnn.BufferType.DRAM, ttnn.BufferType.L1)]
sizes = taken(mesh, used)
sizes["capacity"] = [n for view in views for n in (view.num_banks, view.total_bytes_per_bank)]
print("RESULT", json.dumps(sizes))
"""
)


def used(mesh: Any) -> list[int]:
    return [mesh.memory.used[DRAM], mesh.memory.used[L1]]


@pytest.mark.mock
def test_tensors_take_what_the_real_allocator_gives_them(
    open_mesh: OpenMesh, mock_environment: dict[str, str]
) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", ON_TTNN],
        env={**os.environ, "PYTHONPATH": root, **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout.split("RESULT", 1)[1])

    dispatch = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
    mesh = open_mesh(1, 2, dispatch_core_config=dispatch)
    names: dict[str, Any] = {"ttnn": ttnn}
    exec(TENSORS, names)
    ours = names["taken"](mesh, used)
    memory = mesh.memory
    ours["capacity"] = [memory.banks[DRAM], memory.limit[DRAM], memory.banks[L1], memory.limit[L1]]
    assert ours == real


REJECTED = {
    "half a tile": (([1, 1, 64, 64], "TILE"), ("HEIGHT", (16, 64), (2, 1)), "must be whole tiles of 32x32"),
    "narrow": (
        ([1, 1, 64, 64], "TILE"),
        ("HEIGHT", (32, 32), (2, 1)),
        "height shards are 32 wide, the tensor 64",
    ),
    "low": (([1, 1, 64, 64], "TILE"), ("WIDTH", (32, 32), (2, 1)), "width shards are 32 high, the tensor 64"),
    "few cores": (([1, 1, 96, 64], "TILE"), ("HEIGHT", (32, 64), (2, 1)), "3 shards of 32x64 for 2 cores"),
    "few columns": (([1, 1, 64, 96], "TILE"), ("BLOCK", (32, 32), (2, 2)), "2x3 blocks .* has room for 2x2"),
    "one axis": (([64], "ROW_MAJOR"), ("HEIGHT", (2, 64), (2, 1)), "it must be 1 high"),
    "outside": (
        ([1, 1, 64, 64], "TILE"),
        ("HEIGHT", (32, 64), (9, 1)),
        "core 8-0 has no L1 bank; the chip has 8x8",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_tensors_that_cannot_be_cut_into_the_shards_are_rejected(mesh: Any, case: str) -> None:
    (shape, layout), (kind, shard, (columns, rows)), message = REJECTED[case]
    cores = ttnn.CoreRangeSet([ttnn.CoreRange((0, 0), (columns - 1, rows - 1))])
    spec = ttnn.ShardSpec(cores, shard, ttnn.ShardOrientation.ROW_MAJOR)
    place = ttnn.MemoryConfig(ttnn.TensorMemoryLayout[f"{kind}_SHARDED"], L1, spec)
    with pytest.raises(DeviceError, match=message):
        ttnn.allocate_tensor_on_device(shape, ttnn.bfloat16, ttnn.Layout[layout], mesh, place)
    assert used(mesh) == [0, 0]


def test_the_regions_asked_for_are_taken_from_tensors(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(1, 1, l1_small_size=100, trace_region_size=50_000_000, worker_l1_size=1_000_001)
    views = {kind: ttnn.get_memory_view(mesh, kind) for kind in ttnn.BufferType}
    assert {kind.name: view.total_bytes_per_bank for kind, view in views.items()} == {
        "DRAM": 1_072_693_184 - 4_169_728,
        "TRACE": 4_169_728,
        "L1": 1_000_000 - 128,
        "L1_SMALL": 128,
    }, "as on the mock cluster"
    allocate(keep := mesh, 12)
    assert ttnn.get_memory_view(keep, DRAM).total_bytes_allocated_per_bank == 0, "nobody kept the tensor"
    with pytest.raises(DeviceError, match="worker_l1_size=1463969; allowed: at most 1463968 B"):
        open_mesh(1, 1, worker_l1_size=1_463_969)


def test_a_mesh_and_its_submesh_must_not_hold_tensors_at_once(mesh: Any) -> None:
    """On hardware their allocators know nothing of each other: the first tensors of both get one address."""
    left, right = mesh.create_submeshes(ttnn.MeshShape(1, 1))
    mine, theirs = allocate(left, 12), allocate(right, 12)
    with pytest.raises(
        DeviceError, match="holds 2,048 B a bank there; a mesh and its submeshes allocate without"
    ):
        allocate(mesh, 12)
    again = left.create_submesh(ttnn.MeshShape(1, 1))
    with pytest.raises(DeviceError, match="overwrite each other"):
        allocate(again, 12)
    in_l1 = allocate(mesh, 12, ttnn.L1_MEMORY_CONFIG)
    assert in_l1.is_allocated(), "another kind of memory is another place"
    del mine, theirs
    allocate(mesh, 12)


def allocate(mesh: Any, tiles: int, memory: Any = ttnn.DRAM_MEMORY_CONFIG) -> Any:
    return ttnn.allocate_tensor_on_device(
        ttnn.Shape([1, 1, 32, 32 * tiles]), ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh, memory
    )


@pytest.mark.parametrize(("kind", "memory"), [(DRAM, ttnn.DRAM_MEMORY_CONFIG), (L1, ttnn.L1_MEMORY_CONFIG)])
def test_memory_ends_at_the_real_capacity(mesh: Any, kind: Any, memory: Any) -> None:
    tiles = mesh.memory.limit[kind] // 2048 * mesh.memory.banks[kind]
    whole = allocate(mesh, tiles, memory)
    with pytest.raises(
        DeviceError, match=rf"out of {kind.name}: .*needs 2,048 B of each .* are free; free tensors"
    ):
        allocate(mesh, 1, memory)
    assert mesh.memory.used[kind] == tiles // mesh.memory.banks[kind] * 2048, "the rejected tensor counts"
    del whole
    allocate(mesh, 1, memory)
    with pytest.raises(DeviceError, match=f"out of {kind.name}"):
        allocate(mesh, tiles + mesh.memory.banks[kind], memory)


def test_memory_is_given_back_by_deallocate_and_by_the_last_reference(mesh: Any) -> None:
    tensor, other = allocate(mesh, 12), allocate(mesh, 12)
    assert used(mesh) == [2 * 2048, 0]
    ttnn.deallocate(tensor)
    assert used(mesh) == [2048, 0]
    assert not tensor.is_allocated()
    tensor.deallocate()
    del tensor
    gc.collect()
    assert used(mesh) == [2048, 0], "memory was given back twice"
    del other
    assert used(mesh) == [0, 0]


def test_an_ops_inputs_are_given_back_when_the_program_drops_them(mesh: Any) -> None:
    x = allocate(mesh, 12)
    for _ in range(3):
        x = ttnn.add(x, x)
    assert used(mesh) == [2048, 0]
    assert mesh.memory.peak[DRAM] == 2 * 2048


def test_a_view_takes_no_memory_and_keeps_what_it_views(mesh: Any) -> None:
    x = allocate(mesh, 12)
    view = ttnn.unsqueeze_to_4D(ttnn.reshape(x, [32, 384]))
    assert used(mesh) == [2048, 0]
    del x
    assert used(mesh) == [2048, 0]
    moved = ttnn.to_memory_config(view, ttnn.L1_MEMORY_CONFIG)
    assert used(mesh) == [2048, 2048]
    ttnn.deallocate(view)
    assert used(mesh) == [0, 2048]
    del view, moved
    assert used(mesh) == [0, 0]


def test_deallocating_a_view_deallocates_what_it_views(mesh: Any) -> None:
    x = allocate(mesh, 12)
    ttnn.deallocate(ttnn.reshape(x, [32, 384]))
    assert not x.is_allocated()
    with pytest.raises(DeviceError, match="was deallocated"):
        ttnn.add(x, x)


def test_a_socket_takes_its_fifo_on_the_receiving_end_only(open_mesh: OpenMesh) -> None:
    meshes = open_mesh(1, 1), open_mesh(1, 1)
    core = ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, 0), ttnn.CoreCoord(0, 0))

    def pair(kind: Any, fifo: int) -> Any:
        memory = ttnn.SocketMemoryConfig(kind, fifo)
        return ttnn.create_socket_pair(
            *meshes, ttnn.SocketConfig([ttnn.SocketConnection(core, core)], memory)
        )

    ends = pair(L1, 8192)
    assert [used(m) for m in meshes] == [[0, 64], [0, 8256]]  # as on the mock cluster
    del ends
    ends = pair(DRAM, 1 << 20)
    assert [used(m) for m in meshes] == [[0, 64], [1 << 20, 64]]
    del ends
    assert [used(m) for m in meshes] == [[0, 0], [0, 0]]
    with pytest.raises(DeviceError, match="out of L1: a MeshSocket needs 2,097,152 B"):
        pair(L1, 1 << 21)
