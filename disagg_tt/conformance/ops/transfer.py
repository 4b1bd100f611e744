"""Cases of what goes between host and device: copies, parts of a mesh joined and cut, host tensors, reading."""

from __future__ import annotations

from random import Random
from typing import Any

from disagg_tt.conformance.case import MESH, MESHES, Case, Value, attribute, made, tensor, torch_zeros
from disagg_tt.conformance.known import Known, looser, stricter
from disagg_tt.conformance.ops.tensors import DTYPES, random_layout, random_mapper, random_place, random_shape


def _spec(rng: Random, on: str) -> Value:
    dtype, layout = rng.choice(DTYPES), random_layout(rng)
    return tensor(random_shape(rng, 1), dtype, "TILE" if dtype.endswith("_b") else layout, on=on)


def _other(rng: Random, value: Value, on: str) -> Value:
    """Return a tensor with the spec of `value`, mostly."""
    spec = {**value["$tensor"], "on": on if rng.random() < 0.95 else value["$tensor"]["on"]}
    chance = rng.random()
    if chance < 0.05:
        spec["dtype"] = rng.choice(DTYPES)
    elif chance < 0.1:
        spec["layout"] = random_layout(rng)
    elif chance < 0.2:
        spec["shape"] = random_shape(rng, 1)
    if spec["dtype"].endswith("_b"):
        spec["layout"] = "TILE"
    return {"$tensor": spec}


def _to_device(rng: Random) -> Case:
    host = _spec(rng, "host")
    return Case("copy_host_to_device_tensor", [host, _other(rng, host, "device")], mesh=rng.choice(MESHES))


def _to_host(rng: Random) -> Case:
    device = _spec(rng, "device")
    if rng.random() < 0.3:
        spec = device["$tensor"]
        order = attribute(f"{spec['layout']}_LAYOUT")
        host = made("allocate_tensor_on_host", spec["shape"], attribute(spec["dtype"]), order, MESH)
    else:
        host = _other(rng, device, "host")
    return Case("copy_device_to_host_tensor", [device, host], mesh=rng.choice(MESHES))


def _allocate(rng: Random) -> Case:
    shape, layout = random_shape(rng), random_layout(rng)
    args = [shape, attribute(rng.choice(DTYPES)), attribute(f"{layout}_LAYOUT"), MESH]
    more = [random_place(rng, shape, layout)] if rng.random() < 0.5 else []
    return Case("allocate_tensor_on_host", [*args, *more], mesh=rng.choice(MESHES))


def _composer(rng: Random, rank: int) -> Value:
    def dim() -> int:
        return rng.randint(-rank - 1, rank) if rng.random() < 0.2 else rng.randrange(rank)

    kind = rng.randrange(3)
    if kind == 0:
        return made("concat_mesh_to_tensor_composer", MESH, dim())
    return made("create_mesh_composer", MESH, made("MeshComposerConfig", [dim() for _ in range(kind)]))


def _aggregate(rng: Random) -> Case:
    value = _spec(rng, rng.choice(("device", "device", "host")))
    composer = _composer(rng, len(value["$tensor"]["shape"]))
    return Case("aggregate_tensor", [value, composer], mesh=rng.choice(MESHES))


def _distribute(rng: Random) -> Case:
    mesh = rng.choice(MESHES)
    even = rng.choice((1, 1, mesh[0] * mesh[1]))
    value = _spec(rng, "host" if rng.random() < 0.9 else "device")
    value["$tensor"]["shape"] = [size * even for size in value["$tensor"]["shape"]]
    mapper = random_mapper(rng, mesh, len(value["$tensor"]["shape"]))
    return Case("distribute_tensor", [value, mapper, *rng.choice(([], [MESH]))], mesh=mesh)


def _combine(rng: Random) -> Case:
    parts = made("get_device_tensors", _spec(rng, "device"))
    if rng.random() < 0.1:
        parts = [_spec(rng, "device")]
    return Case("combine_device_tensors", [], {"tensors": parts}, rng.choice(MESHES))


def _from_host_shards(rng: Random) -> Case:
    first = _spec(rng, "host")
    mesh = rng.choice(MESHES)
    count = mesh[0] * mesh[1] if rng.random() < 0.8 else rng.randint(0, 4)
    shards = [first if rng.random() < 0.9 else _other(rng, first, "host") for _ in range(count)]
    return Case("from_host_shards", [shards, made("MeshShape", *mesh)], mesh=mesh)


def _as_tensor(rng: Random) -> Case:
    mesh, shape, layout = rng.choice(MESHES), random_shape(rng, 1), random_layout(rng)
    named: dict[str, Any] = {"layout": attribute(f"{layout}_LAYOUT")}
    if rng.random() < 0.8:
        named |= {"device": MESH, "mesh_mapper": random_mapper(rng, mesh, len(shape))}
    if rng.random() < 0.5:
        named["memory_config"] = random_place(rng, shape, layout)
    return Case("as_tensor", [torch_zeros(shape), attribute(rng.choice(DTYPES))], named, mesh)


def _to_torch(rng: Random) -> Case:
    value = _spec(rng, rng.choice(("device", "device", "host")))
    rank = len(value["$tensor"]["shape"])
    named: dict[str, Any] = {}
    if rng.random() < 0.7:
        named["mesh_composer"] = _composer(rng, rank)
    if rng.random() < 0.15:
        named["torch_rank"] = rng.randint(0, rank + 1)
    return Case("to_torch", [value], named, rng.choice(MESHES))


GENERATORS = {
    "aggregate_tensor": _aggregate,
    "allocate_tensor_on_host": _allocate,
    "as_tensor": _as_tensor,
    "combine_device_tensors": _combine,
    "copy_device_to_host_tensor": _to_host,
    "copy_host_to_device_tensor": _to_device,
    "distribute_tensor": _distribute,
    "from_host_shards": _from_host_shards,
    "to_torch": _to_torch,
}

KNOWN: list[Known] = [
    looser(
        "distribute_tensor",
        "ReplicateTensorToMeshWrapper",
        "ttnn's ReplicateTensorToMesh is a Python class that distribute_tensor does not take; the emulator's is the same mapper "
        "as replicate_tensor_to_mesh_mapper",
    ),
    stricter(
        "combine_device_tensors",
        "takes the parts that",
        "ttnn returns a single tensor as it is, though it is no part of one",
    ),
]
