"""Cases of the collectives, on meshes of 1x2 and 2x2: axes, dimensions, dtypes, layouts, placement."""

from __future__ import annotations

from random import Random

from disagg_tt.conformance.case import (
    DRAM,
    L1,
    Case,
    Value,
    attribute,
    cores,
    made,
    rectangle,
    sharded,
    tensor,
)
from disagg_tt.conformance.known import SHARDED, Known, stricter

DTYPES = (
    "bfloat16",
    "bfloat16",
    "bfloat16",
    "bfloat8_b",
    "bfloat4_b",
    "float32",
    "uint32",
    "int32",
    "uint16",
)
SIZES = (1, 2, 16, 31, 32, 33, 64, 96, 128, 256)


def _up(size: int) -> int:
    return -(-size // 32) * 32


def _shards(rng: Random, shape: list[int]) -> Value:
    """Return a sharded placement of `shape`, in tiles."""
    rows, columns = 1, _up(shape[-1])
    for axis in shape[:-2]:
        rows *= axis
    rows *= _up(shape[-2]) if len(shape) > 1 else 1
    kind, count = rng.choice(("HEIGHT", "WIDTH", "BLOCK")), rng.choice((1, 2, 4))
    if kind == "HEIGHT":
        return sharded(kind, [_up(-(-rows // count)), columns], cores(count))
    if kind == "WIDTH":
        return sharded(kind, [_up(rows), _up(-(-columns // count))], cores(count))
    return sharded(kind, [_up(-(-rows // 2)), _up(-(-columns // count))], rectangle(count, 2))


def _input(rng: Random, shape: list[int]) -> Value:
    dtype = rng.choice(DTYPES)
    layout = "ROW_MAJOR" if rng.random() < 0.2 and not dtype.endswith("_b") else "TILE"
    chance = rng.random()
    place = L1 if chance < 0.2 else _shards(rng, shape) if chance < 0.3 and shape else DRAM
    on = rng.choice(("host", "freed")) if rng.random() < 0.02 else "device"
    return tensor(shape, dtype, layout, place, on)


def _shape(rng: Random) -> list[int]:
    rank = rng.choice((4, 4, 4, 4, 3, 2, 1, 5))
    lead = [rng.choice((1, 1, 2, 3)) for _ in range(max(rank - 2, 0))]
    return lead + [rng.choice(SIZES) for _ in range(min(rank, 2))]


def _mesh(rng: Random) -> tuple[int, int]:
    return (2, 2) if rng.random() < 0.5 else (1, 2)


def _axis(rng: Random, mesh: tuple[int, int]) -> dict[str, Value]:
    """Return cluster_axis, mostly one along which the mesh has more than one chip, and what goes with it."""
    chance = rng.random()
    options: dict[str, Value] = {}
    if chance < 0.5:
        options["cluster_axis"] = 1
    elif chance < 0.75:
        options["cluster_axis"] = 0 if mesh == (2, 2) or chance > 0.7 else 1
    elif chance < 0.8:
        options["cluster_axis"] = rng.choice((2, -1))
    if rng.random() < 0.15:
        options["num_links"] = rng.choice((1, 1, 2))
    if rng.random() < 0.15:
        options["topology"] = attribute(f"Topology.{rng.choice(('Linear', 'Linear', 'Ring'))}")
    return options


def _memory(rng: Random, shape: list[int]) -> dict[str, Value]:
    chance = rng.random()
    if chance < 0.3:
        return {"memory_config": rng.choice((L1, DRAM))}
    if chance < 0.38 and shape:
        return {"memory_config": _shards(rng, shape)}
    return {}


def _dim(rng: Random, shape: list[int]) -> int:
    rank = len(shape)
    return rng.randint(-rank - 1, rank) if rng.random() < 0.2 else rng.randint(0, rank - 1)


def _all_gather(rng: Random) -> Case:
    mesh, shape = _mesh(rng), _shape(rng)
    dim = _dim(rng, shape)
    whole = list(shape)
    if -len(shape) <= dim < len(shape):
        whole[dim] *= 2
    options = _axis(rng, mesh) | _memory(rng, whole)
    return Case("all_gather", [_input(rng, shape), dim], options, mesh)


def _reduce_scatter(rng: Random) -> Case:
    mesh, shape = _mesh(rng), _shape(rng)
    dim = _dim(rng, shape)
    if rng.random() < 0.6:
        dim = rng.choice((len(shape) - 1, len(shape) - 1, max(len(shape) - 2, 0)))
        shape[dim] = rng.choice((64, 128, 256))
    part = list(shape)
    if -len(shape) <= dim < len(shape):
        part[dim] = max(part[dim] // 2, 1)
    options = _axis(rng, mesh) | _memory(rng, part)
    return Case("reduce_scatter", [_input(rng, shape), dim], options, mesh)


def _all_reduce(rng: Random) -> Case:
    mesh, shape = _mesh(rng), _shape(rng)
    return Case("all_reduce", [_input(rng, shape)], _axis(rng, mesh) | _memory(rng, shape), mesh)


def _all_broadcast(rng: Random) -> Case:
    mesh, shape = _mesh(rng), _shape(rng)
    return Case("all_broadcast", [_input(rng, shape)], _axis(rng, mesh) | _memory(rng, shape), mesh)


def _broadcast(rng: Random) -> Case:
    mesh, shape = _mesh(rng), _shape(rng)
    row = rng.randrange(mesh[0]) if rng.random() < 0.95 else 2
    sender = made("MeshCoordinate", row, rng.choice((0, 1)))
    return Case("broadcast", [_input(rng, shape), sender], _axis(rng, mesh) | _memory(rng, shape), mesh)


GENERATORS = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "all_broadcast": _all_broadcast,
    "broadcast": _broadcast,
}
KNOWN: list[Known] = [
    stricter(
        "all_gather|all_reduce|reduce_scatter",
        "does not (work on shards|choose the shards)",
        SHARDED,
    ),
    stricter(
        "all_gather",
        "does not (move rows|join axis)",
        "What ttnn gathers in another layout, inside tiles or in unaligned rows, it places by rules that the emulator does not have.",
    ),
    stricter(
        "all_reduce",
        "does not sum",
        "ttnn sums these dtypes for some shapes only, by the algorithm that it chooses.",
    ),
    stricter(
        "reduce_scatter",
        "it must be divisible",
        "ttnn accepts some axes that do not divide, and loses what is left over.",
    ),
    stricter(
        "broadcast",
        "along one line of several|sender",
        "Chips of other lines receive nothing, and a sender outside the mesh sends nothing: undefined values.",
    ),
]
