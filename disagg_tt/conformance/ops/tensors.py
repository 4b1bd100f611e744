"""Cases of specs, allocation, creation, host-device transfer and mappers: shapes, dtypes, layouts, places, shards."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from disagg_tt.conformance.case import (
    DRAM,
    GRID,
    L1,
    MESH,
    MESHES,
    Case,
    Value,
    attribute,
    cores,
    made,
    rectangle,
    sharded,
    tensor,
    torch_zeros,
)
from disagg_tt.conformance.known import looser, stricter

DTYPES = ("bfloat16", "float32", "uint32", "int32", "uint16", "uint8", "bfloat8_b", "bfloat4_b")
TORCH = ("float32", "bfloat16", "float16", "int64", "int32", "int16", "uint8", "bool")
SIZES = (1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 96, 100, 160)


def random_shape(rng: Random, least: int = 0) -> list[int]:
    rank = rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 4, 5))
    return [rng.choice((1, 1, 2, 3)) if axis > 1 else rng.choice(SIZES) for axis in range(max(rank, least))][
        ::-1
    ]


def random_layout(rng: Random) -> str:
    return rng.choice(("TILE", "ROW_MAJOR"))


def _order(layout: str) -> Value:
    return attribute(f"{layout}_LAYOUT")


def _shard(rng: Random, shape: list[int], layout: str) -> Value:
    """Return a sharded place that often fits a tensor of `shape`."""
    unit = 32 if layout == "TILE" else 1

    def up(size: int) -> int:
        return -(-size // unit) * unit

    rows = math.prod(shape[:-2]) * up(shape[-2]) if len(shape) > 1 else unit
    width = up(shape[-1]) if shape else unit
    kind = rng.choice(("HEIGHT", "WIDTH", "BLOCK"))
    order, buffer = (
        rng.choice(("ROW_MAJOR", "ROW_MAJOR", "COL_MAJOR")),
        rng.choice(("L1", "L1", "L1", "DRAM")),
    )
    x, y = rng.randint(1, GRID[0] + (rng.random() < 0.05)), rng.randint(1, GRID[1])
    if buffer == "DRAM":
        x, y = rng.randint(1, 13), 1 if rng.random() < 0.9 else 2
    across, down = (x, y) if order == "ROW_MAJOR" else (y, x)
    parts = {"HEIGHT": (x * y, 1), "WIDTH": (1, x * y), "BLOCK": (down, across)}[kind]
    shard = [max(up(-(-size // n)), 1) for size, n in zip((rows, width), parts, strict=True)]
    axis = rng.randrange(2)
    shard[axis] = max(1, shard[axis] + rng.choice((0,) * 6 + (-unit, unit, 1, 7)))
    grid = rectangle(x, y) if kind == "BLOCK" or rng.random() < 0.5 else cores(min(x * y, GRID[0] * GRID[1]))
    return sharded(kind, shard, grid, order, buffer)


def random_place(rng: Random, shape: list[int], layout: str) -> Value:
    return rng.choice((DRAM, L1, None)) if rng.random() < 0.5 else _shard(rng, shape, layout)


def _spec(rng: Random) -> Case:
    shape, layout = random_shape(rng), random_layout(rng)
    args: list[Value] = [shape, attribute(rng.choice(DTYPES)), _order(layout)]
    if rng.random() < 0.6:
        config = _shard(rng, shape, layout)["args"]
        return Case("TensorSpec", [*args, config[0], config[2], config[1]])
    return Case("TensorSpec", args, {"buffer_type": attribute(f"BufferType.{rng.choice(('DRAM', 'L1'))}")})


def _allocate(rng: Random) -> Case:
    shape, layout = random_shape(rng), random_layout(rng)
    if rng.random() < 0.2:
        spec = made("TensorSpec", shape, attribute(rng.choice(DTYPES)), _order(layout))
        return Case("allocate_tensor_on_device", [spec, MESH])
    args = [shape, attribute(rng.choice(DTYPES)), _order(layout), MESH, random_place(rng, shape, layout)]
    return Case("allocate_tensor_on_device", args, mesh=rng.choice(MESHES))


def _made(rng: Random, shape: list[int], least: int = 0) -> dict[str, Any]:
    """Return some of dtype, layout, device and memory_config."""
    layout = random_layout(rng)
    named = {
        "dtype": attribute(rng.choice(DTYPES)),
        "layout": _order(layout),
        "device": MESH,
        "memory_config": random_place(rng, shape, layout),
    }
    return {name: value for name, value in named.items() if rng.random() < 0.8}


def _filled(op: str, *more: Value) -> Any:
    def case(rng: Random) -> Case:
        shape = random_shape(rng)
        return Case(op, [shape, *more], _made(rng, shape))

    return case


def _empty(rng: Random) -> Case:
    shape = random_shape(rng)
    return Case("empty", [shape], _made(rng, shape) | {"device": MESH})


def _source(rng: Random, shape: list[int], on: str) -> Value:
    dtype, layout = rng.choice(DTYPES), random_layout(rng)
    if dtype.endswith("_b"):
        layout = "TILE"
    return tensor(shape, dtype, layout, rng.choice((DRAM, DRAM, L1)), on)


def _like(op: str, *more: Value) -> Any:
    def case(rng: Random) -> Case:
        shape = random_shape(rng, 1)
        named = _made(rng, shape)
        if rng.random() < 0.6:
            named.pop("memory_config", None)
        on = "device" if op == "empty_like" else rng.choice(("device", "device", "host"))
        return Case(op, [_source(rng, shape, on), *more], named)

    return case


def _arange(rng: Random) -> Case:
    bounds = [rng.randint(-5, 40) for _ in range(rng.choice((1, 2)))]
    step = [rng.choice((1, 2, 3, -1, -4, 0))] if len(bounds) == 2 else []
    named = _made(rng, [1]) | {"dtype": attribute(rng.choice(DTYPES[:5]))}
    named.pop("memory_config", None)
    return Case("arange", [*bounds, *step], named)


def random_mapper(rng: Random, mesh: tuple[int, int], rank: int) -> Value:
    def dim() -> int:
        return rng.randint(-rank, rank) if rng.random() < 0.15 else rng.randrange(max(rank, 1))

    def placement() -> Value:
        return made("PlacementReplicate") if rng.random() < 0.3 else made("PlacementShard", dim())

    kind = rng.randrange(5)
    if kind == 0:
        return made("ReplicateTensorToMesh", MESH)
    if kind == 1:
        return made("ShardTensorToMesh", MESH, dim())
    if kind == 2:
        dims = [dim() if rng.random() < 0.7 else None for _ in range(2)]
        return made("ShardTensor2dMesh", MESH, list(rng.choice((mesh, mesh, (1, 2), (4, 1)))), dims)
    if kind == 3:
        return made("create_mesh_mapper", MESH, made("MeshMapperConfig", [placement(), placement()]))
    chips = mesh[0] * mesh[1]
    config = made(
        "MeshMapperConfig", [placement()], made("MeshShape", [rng.choice((chips, chips, chips, 3))])
    )
    return made("create_mesh_mapper", MESH, config)


def _from_torch(rng: Random) -> Case:
    mesh = rng.choice(MESHES)
    even = rng.choice((1, 1, 1, mesh[0] * mesh[1]))
    shape = [size * even for size in random_shape(rng, 1)]
    named = _made(rng, shape)
    if rng.random() < 0.7:
        named.pop("memory_config", None)
    if rng.random() < 0.7:
        named |= {"device": MESH, "mesh_mapper": random_mapper(rng, mesh, len(shape))}
    return Case("from_torch", [torch_zeros(shape, rng.choice(TORCH))], named, mesh=mesh)


def _to_device(rng: Random) -> Case:
    shape, layout = random_shape(rng, 1), random_layout(rng)
    dtype = rng.choice(DTYPES[:6] if layout == "ROW_MAJOR" else DTYPES)
    host = tensor(shape, dtype, layout, DRAM, "host" if rng.random() < 0.9 else "device")
    return Case("to_device", [host, MESH], {"memory_config": random_place(rng, shape, layout)})


def _from_device(rng: Random) -> Case:
    shape = random_shape(rng, 1)
    on = rng.choice(("device", "device", "device", "host"))
    return Case("from_device", [_source(rng, shape, on)])


def _to_dtype(rng: Random) -> Case:
    source = _source(rng, random_shape(rng, 1), rng.choice(("host", "host", "host", "device")))
    return Case("to_dtype", [source, attribute(rng.choice(DTYPES))])


def _parts(rng: Random) -> Case:
    return Case("get_device_tensors", [_source(rng, random_shape(rng, 1), "device")], mesh=rng.choice(MESHES))


def _memory_config(rng: Random) -> Case:
    x, y = rng.randint(1, 8), rng.randint(1, 7)
    shape = [
        rng.choice((1, 2)),
        rng.choice(SIZES) * rng.choice((1, y, x * y)),
        rng.choice(SIZES) * rng.choice((1, x, y)),
    ]
    grid = made("CoreGrid", x=x, y=y) if rng.random() < 0.8 else rectangle(x, y)
    strategy = attribute(f"ShardStrategy.{rng.choice(('HEIGHT', 'WIDTH', 'BLOCK'))}")
    named: dict[str, Value] = {}
    if rng.random() < 0.5:
        named["orientation"] = attribute(f"ShardOrientation.{rng.choice(('ROW_MAJOR', 'COL_MAJOR'))}")
    if rng.random() < 0.4:
        named["use_height_and_width_as_shard_shape"] = True
    return Case("create_sharded_memory_config", [shape, grid, strategy], named)


def _submesh(rng: Random) -> Case:
    shape = made("MeshShape", rng.randint(0, 3), rng.randint(1, 3))
    place = [made("MeshCoordinate", rng.randint(0, 1), rng.randint(0, 2))] if rng.random() < 0.7 else []
    return Case("MeshDevice.create_submesh", [MESH, shape, *place], mesh=rng.choice(MESHES))


def _submeshes(rng: Random) -> Case:
    shape = made("MeshShape", rng.randint(1, 3), rng.randint(1, 3))
    return Case("MeshDevice.create_submeshes", [MESH, shape], mesh=rng.choice(MESHES))


GENERATORS = {
    "MeshDevice.create_submesh": _submesh,
    "MeshDevice.create_submeshes": _submeshes,
    "TensorSpec": _spec,
    "allocate_tensor_on_device": _allocate,
    "arange": _arange,
    "create_sharded_memory_config": _memory_config,
    "empty": _empty,
    "empty_like": _like("empty_like"),
    "from_device": _from_device,
    "from_torch": _from_torch,
    "full": _filled("full", 1.5),
    "full_like": _like("full_like", 3),
    "get_device_tensors": _parts,
    "ones": _filled("ones"),
    "ones_like": _like("ones_like"),
    "to_device": _to_device,
    "to_dtype": _to_dtype,
    "zeros": _filled("zeros"),
    "zeros_like": _like("zeros_like"),
}

KNOWN = [
    stricter(
        "from_torch|as_tensor|distribute_tensor",
        "tensors on part of a mesh",
        "A tensor on some of a mesh's chips only is not emulated",
    ),
    stricter(
        "from_torch|as_tensor",
        "shard|block|bank",
        "ttnn puts rows with a mapper in interleaved DRAM, without a word, when the shards asked for cannot be",
    ),
    looser(
        "from_torch|as_tensor",
        "Shard shape must be 1D for 1D tensor",
        "ttnn makes rows of a tensor of one axis on its way, whose shards would have to be one row high",
    ),
]
