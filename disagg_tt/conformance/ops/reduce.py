"""Cases of reductions, argmax and topk: every axis, several axes, kept or not, each dtype, layout and place."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from disagg_tt.conformance.case import DRAM, L1, Case, Value, attribute, made, rectangle, tensor
from disagg_tt.conformance.known import ARGUMENT, SHARDED, looser, stricter
from disagg_tt.conformance.ops.norm import random_input, random_place, random_shape

INTEGERS = ("int32", "uint32", "uint16")


def _axis(rng: Random, rank: int) -> int:
    return rng.randint(-rank - 1, rank) if rng.random() < 0.1 else rng.randint(-rank, rank - 1)


def _axes(rng: Random, rank: int) -> Value:
    """Return an axis, several (now and then the same twice, or none), or None for all."""
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.65:
        return rng.choice((-1, -1, -2, _axis(rng, rank)))
    if kind < 0.9 and rank > 1:
        return rng.sample(range(-rank, 0), rng.randint(1, rank))
    return rng.choice(([], [_axis(rng, rank)], [_axis(rng, rank), _axis(rng, rank)], list(range(rank))))


def _source(rng: Random, shape: list[int], integers: float) -> Value:
    dtype = rng.choice(INTEGERS) if rng.random() < integers else ""
    return random_input(rng, shape, dtype, rng.choice(("TILE", "TILE", "TILE", "ROW_MAJOR")))


def _reduce(op: str) -> Callable[[Random], Case]:
    def case(rng: Random) -> Case:
        shape = random_shape(rng)
        args: list[Value] = [_source(rng, shape, 0.1)]
        kwargs: dict[str, Value] = {}
        if rng.random() < 0.9:
            kwargs["dim"] = _axes(rng, len(shape))
        if rng.random() < 0.6:
            kwargs["keepdim"] = rng.random() < 0.6
        if rng.random() < 0.2 and "dim" in kwargs:
            args += [kwargs.pop("dim"), *([kwargs.pop("keepdim")] if "keepdim" in kwargs else [])]
        if rng.random() < 0.15:
            kwargs["memory_config"] = rng.choice((DRAM, L1, random_place(rng, shape)))
        if rng.random() < 0.1:
            kwargs["scalar"] = rng.choice((0.5, 2.0, 1))
        if rng.random() < 0.05:
            kwargs["compute_kernel_config"] = made(
                "WormholeComputeKernelConfig",
                fp32_dest_acc_en=True,
                math_fidelity=attribute("MathFidelity.HiFi4"),
            )
        if op in ("sum", "mean") and rng.random() < 0.08:
            kwargs["output_layout"] = attribute(rng.choice(("TILE_LAYOUT", "ROW_MAJOR_LAYOUT")))
        if op in ("std", "var") and rng.random() < 0.3:
            kwargs["correction"] = rng.random() < 0.5
        if rng.random() < 0.02:
            kwargs[rng.choice(("dim", "scalar", "memory_config"))] = rng.choice(("x", 0.5, [0.5]))
        return Case(op, args, kwargs)

    return case


def _argmax(rng: Random) -> Case:
    shape = random_shape(rng)
    kwargs: dict[str, Value] = {}
    source = random_input(
        rng, shape, rng.choice(INTEGERS) if rng.random() < 0.15 else "", rng.choice(("TILE", "ROW_MAJOR"))
    )
    if rng.random() < 0.9:
        kwargs["dim"] = rng.choice((-1, -1, len(shape) - 1, None, _axis(rng, len(shape))))
    if rng.random() < 0.5:
        kwargs["keepdim"] = rng.random() < 0.7
    if rng.random() < 0.1:
        kwargs["memory_config"] = rng.choice((DRAM, L1, random_place(rng, shape)))
    if rng.random() < 0.1:
        kwargs["sub_core_grids"] = rectangle(rng.randint(1, 8), rng.randint(1, 7))
    if rng.random() < 0.1:
        out = [*shape[:-1], 1] if kwargs.get("keepdim") else shape[:-1]
        kwargs["output_tensor"] = tensor(
            out if rng.random() < 0.8 else shape,
            rng.choice(("uint32", "uint32", "int32")),
            rng.choice(("ROW_MAJOR", "ROW_MAJOR", "TILE")),
        )
    if rng.random() < 0.02:
        kwargs[rng.choice(("dim", "keepdim", "memory_config"))] = rng.choice(("1", 1.5, [1]))
    return Case("argmax", [source], kwargs)


def _topk(rng: Random) -> Case:
    shape = random_shape(rng)
    if rng.random() < 0.1:
        shape = [*shape[:-1], rng.choice((8192, 40000, 70000))]
    kwargs: dict[str, Value] = {}
    source = random_input(rng, shape, rng.choice(("bfloat16", "bfloat16", "bfloat8_b", "float32", "")))
    k = rng.choice((1, 2, 5, 8, 16, 32, 32, 33, 50, 64, 100))
    if shape[-1] < k and rng.random() < 0.7:
        k = rng.randint(1, shape[-1])
    args: list[Value] = [source, k] if rng.random() < 0.8 else [source]
    if len(args) == 1 and rng.random() < 0.8:
        kwargs["k"] = k
    if rng.random() < 0.6:
        kwargs["dim"] = rng.choice((-1, -1, len(shape) - 1, _axis(rng, len(shape))))
    for name in ("largest", "sorted", "stable"):
        if rng.random() < 0.2:
            kwargs[name] = rng.random() < 0.5
    if rng.random() < 0.15:
        kwargs["memory_config"] = rng.choice((DRAM, L1, random_place(rng, shape)))
    if rng.random() < 0.1:
        labelled = shape if rng.random() < 0.9 else [*shape[:-1], shape[-1] + 32]
        layout = "TILE" if rng.random() < 0.9 else "ROW_MAJOR"
        kwargs["indices_tensor"] = tensor(
            labelled, rng.choice(("uint16", "uint32", "int32", "bfloat16")), layout
        )
    if rng.random() < 0.02:
        kwargs[rng.choice(("k", "dim", "memory_config"))] = rng.choice(("1", 1.5, [1]))
    return Case("topk", args, kwargs)


GENERATORS = {
    **{op: _reduce(op) for op in ("sum", "mean", "max", "min", "std", "var")},
    "argmax": _argmax,
    "topk": _topk,
}
KNOWN = [
    stricter("sum|mean|max|min|std|var", "from or into shards", SHARDED),
    looser(
        "topk",
        "Out of Memory",
        "ttnn's own padded copy of the input does not fit; the emulator allocates none",
    ),
    stricter("topk", "take or make shards", SHARDED),
    stricter(
        "min",
        "take uint32 over",
        "ttnn takes the least uint32 of outer axes for some sizes only, by how many cores it would use",
    ),
    stricter("sum|max|min", "scale integers", ARGUMENT),
    stricter(
        "std|var",
        "deallocated|on the host|input is",
        "Where every group has one value ttnn does not look at the input, be it freed, on the host or of a dtype that it rejects else",
    ),
]
