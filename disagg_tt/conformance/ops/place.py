"""Cases of to_layout, tilize, untilize and their padded forms, and of moves between memory configs."""

from __future__ import annotations

from random import Random

from disagg_tt.conformance.case import DRAM, L1, Case, Value, attribute, made
from disagg_tt.conformance.known import FREED, SHARDED, Known, looser, stricter
from disagg_tt.conformance.ops.shape import (
    DTYPES,
    SHARDS,
    place_for,
    some_place,
    some_shape,
    some_tensor,
)


def _layout(rng: Random) -> Value:
    return attribute(rng.choice(["TILE_LAYOUT", "ROW_MAJOR_LAYOUT"]))


def _dtype(rng: Random, name: str = "dtype") -> dict[str, Value]:
    return {name: attribute(rng.choice(DTYPES))} if rng.random() < 0.25 else {}


def _input(rng: Random, layout: str | None = None, interleaved: bool = False) -> tuple[list[int], Value]:
    """Return (shape, tensor), mostly of `layout`."""
    shape = some_shape(rng)
    given = some_tensor(rng, shape, interleaved)
    what = given["$tensor"]
    if layout and what["layout"] != layout and rng.random() < 0.9:
        what["layout"] = layout
        if layout == "ROW_MAJOR" and what["dtype"].endswith("_b"):
            what["dtype"] = "bfloat16"
        if what["memory"] not in (DRAM, L1):
            what["memory"] = place_for(rng, shape, layout)
    return shape, given


def _to_layout(rng: Random) -> Case:
    shape, given = _input(rng)
    positional = [attribute(rng.choice(DTYPES))] if rng.random() < 0.1 else []
    kwargs = some_place(rng, shape) | ({} if positional else _dtype(rng))
    return Case("to_layout", [given, _layout(rng), *positional], kwargs)


def _tilize(rng: Random) -> Case:
    shape, given = _input(rng, "ROW_MAJOR")
    if rng.random() < 0.7:
        for axis in range(max(len(shape) - 2, 0), len(shape)):
            shape[axis] = -(-shape[axis] // 32) * 32
        given["$tensor"]["shape"] = shape
        if given["$tensor"]["memory"] not in (DRAM, L1):
            given["$tensor"]["memory"] = place_for(rng, shape, rng.choice(["TILE", "ROW_MAJOR"]))
    return Case("tilize", [given], some_place(rng, shape) | _dtype(rng))


def _tilize_with_zero_padding(rng: Random) -> Case:
    shape, given = _input(rng, "ROW_MAJOR")
    return Case("tilize_with_zero_padding", [given], some_place(rng, shape) | _dtype(rng, "output_dtype"))


def _tilize_with_val_padding(rng: Random) -> Case:
    shape, given = _input(rng, "ROW_MAJOR")
    padded = [-(-d // 32) * 32 if axis >= len(shape) - 2 else d for axis, d in enumerate(shape)]
    if rng.random() < 0.2:
        padded[rng.randrange(len(shape))] += rng.choice([1, 32])
    args = [given, made("Shape", padded), rng.choice([0.0, 1.5, 0, 3])]
    return Case("tilize_with_val_padding", args, some_place(rng, shape) | _dtype(rng))


def _untilize(rng: Random) -> Case:
    shape, given = _input(rng, "TILE")
    return Case("untilize", [given], some_place(rng, shape))


def _untilize_with_unpadding(rng: Random) -> Case:
    shape, given = _input(rng, "TILE")
    end = [d - 1 for d in shape]
    if rng.random() < 0.3:
        axis = rng.randrange(len(end))
        end[axis] = rng.randint(0, shape[axis] + 1)
    if rng.random() < 0.04:
        end = end[1:]
    return Case("untilize_with_unpadding", [given, made("Shape", end)], some_place(rng, shape))


def _destination(rng: Random, shape: list[int], layout: str) -> Value:
    if rng.random() < 0.04:
        return attribute(rng.choice(["L1_HEIGHT_SHARDED_MEMORY_CONFIG", "L1_WIDTH_SHARDED_MEMORY_CONFIG"]))
    other = rng.choice(["TILE", "ROW_MAJOR"]) if rng.random() < 0.1 else layout
    return place_for(rng, shape, other) if rng.random() < 0.6 else rng.choice([DRAM, L1])


def _moved(rng: Random, sharded_input: float) -> tuple[Value, Value]:
    """Return (a tensor, sharded with this probability, and a memory config for it)."""
    shape, given = _input(rng, interleaved=True)
    what = given["$tensor"]
    if rng.random() < sharded_input:
        what["memory"] = place_for(rng, shape, what["layout"])
    return given, _destination(rng, shape, what["layout"])


def _to_memory_config(rng: Random) -> Case:
    given, place = _moved(rng, 0.4)
    if rng.random() < 0.2:
        return Case("to_memory_config", [given], {"memory_config": place} | _dtype(rng))
    return Case("to_memory_config", [given, place], _dtype(rng))


def _interleaved_to_sharded(rng: Random) -> Case:
    given, place = _moved(rng, 0.05)
    if rng.random() < 0.6:
        place = place_for(rng, given["$tensor"]["shape"], given["$tensor"]["layout"])
    return Case("interleaved_to_sharded", [given, place], _dtype(rng, "output_dtype"))


def _sharded_to_interleaved(rng: Random) -> Case:
    given, place = _moved(rng, 0.95)
    places = rng.choice([[], [DRAM], [L1], [DRAM], [L1], [place]])
    return Case("sharded_to_interleaved", [given, *places], _dtype(rng, "output_dtype"))


def _reshard(rng: Random) -> Case:
    given, place = _moved(rng, 0.95)
    if rng.random() < 0.6:
        place = place_for(rng, given["$tensor"]["shape"], given["$tensor"]["layout"])
    return Case("reshard", [given, place])


def _move(rng: Random) -> Case:
    given, place = _moved(rng, 0.2)
    return Case("move", [given], {"memory_config": place} if rng.random() < 0.5 else {})


def _reallocate(rng: Random) -> Case:
    given, place = _moved(rng, 0.2)
    return Case("reallocate", [given], {"memory_config": place} if rng.random() < 0.5 else {})


GENERATORS = {
    "to_layout": _to_layout,
    "tilize": _tilize,
    "tilize_with_zero_padding": _tilize_with_zero_padding,
    "tilize_with_val_padding": _tilize_with_val_padding,
    "untilize": _untilize,
    "untilize_with_unpadding": _untilize_with_unpadding,
    "to_memory_config": _to_memory_config,
    "interleaved_to_sharded": _interleaved_to_sharded,
    "sharded_to_interleaved": _sharded_to_interleaved,
    "reshard": _reshard,
    "move": _move,
    "reallocate": _reallocate,
}

KNOWN: list[Known] = [
    stricter(
        "to_layout|tilize_with_zero_padding|tilize_with_val_padding|sharded_to_interleaved",
        "was deallocated",
        FREED,
    ),
    stricter("to_layout|tilize.*|untilize.*", SHARDS, SHARDED),
    stricter(
        "to_layout|tilize.*|to_memory_config|interleaved_to_sharded|sharded_to_interleaved",
        "the emulator does not convert",
        "Between floats and integers only typecast converts in the emulator",
    ),
    looser(
        "move|reallocate|reshard",
        "Total circular buffer size|num_entries = 0",
        "What a kernel's own buffers can hold of shards with very short rows is not emulated",
    ),
    stricter(
        "move|reallocate",
        "out of (L1|DRAM)",
        "ttnn can move a tensor over itself where memory does not hold it twice; the emulator needs room for both",
    ),
    stricter("untilize_with_unpadding", "is past", "ttnn gives rows of the padding, which holds no values"),
]
