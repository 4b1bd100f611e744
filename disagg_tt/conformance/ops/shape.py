"""Cases of reshape, view, squeeze, unsqueeze, permute and transpose: shapes, orders, layouts, dtypes, placements.

`some_tensor` and `place_for` also serve slice.py and place.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from disagg_tt.conformance.case import (
    DRAM,
    L1,
    Case,
    Value,
    cores,
    made,
    rectangle,
    sharded,
    tensor,
)
from disagg_tt.conformance.known import FREED, SHARDED, Known, stricter

DTYPES = ["bfloat16"] * 6 + [
    "float32",
    "bfloat8_b",
    "bfloat8_b",
    "bfloat4_b",
    "uint32",
    "int32",
    "uint16",
    "uint8",
]
SIZES = [1, 1, 2, 3, 4, 7, 16, 31, 32, 33, 64, 96]


def some_shape(rng: Random, ranks: Sequence[int] = (1, 2, 3, 3, 4, 4, 4, 4, 5)) -> list[int]:
    """Return a shape whose axes before the last two are small."""
    rank = rng.choice(ranks)
    return [rng.choice(SIZES[:6] if axis < rank - 2 else SIZES) for axis in range(rank)]


def some_tensor(rng: Random, shape: Sequence[int], interleaved: bool = False) -> Value:
    """Return a tensor of `shape`: mostly interleaved on the device, some sharded, on the host, or freed."""
    dtype, layout = rng.choice(DTYPES), rng.choice(["TILE", "TILE", "ROW_MAJOR"])
    if dtype.endswith("_b"):
        layout = "TILE"
    on = rng.choices(["device", "host", "freed"], [95, 4, 1])[0]
    place = (
        place_for(rng, shape, layout)
        if not interleaved and rng.random() < 0.1
        else rng.choice([DRAM, DRAM, L1])
    )
    return tensor(shape, dtype, layout, place, on)


def place_for(rng: Random, shape: Sequence[int], layout: str) -> Value:
    """Return a sharded memory config into which a tensor of `shape` can be cut."""
    step = 32 if layout == "TILE" else 1
    padded = [-(-d // step) * step if axis >= len(shape) - 2 else d for axis, d in enumerate(shape)]
    rows, width = math.prod(padded[:-1]), padded[-1]
    orientation = rng.choice(["ROW_MAJOR", "ROW_MAJOR", "COL_MAJOR"])
    if rng.random() < 0.6:
        height = -(-rows // rng.choice([1, 2, 4]) // step) * step
        return sharded(
            "HEIGHT",
            (height, width),
            cores(-(-rows // height)) if -(-rows // height) <= 56 else cores(56),
            orientation,
        )
    if rng.random() < 0.5:
        part = -(-width // rng.choice([1, 2, 4]) // step) * step
        return sharded("WIDTH", (rows, part), cores(min(-(-width // part), 56)), orientation)
    height, part = -(-rows // 2 // step) * step, -(-width // 2 // step) * step
    columns, lines = -(-width // part), -(-rows // height)
    if orientation == "COL_MAJOR":
        columns, lines = lines, columns
    return sharded("BLOCK", (height, part), rectangle(columns, lines), orientation)


def some_place(rng: Random, shape: Sequence[int] = (), layout: str = "TILE") -> dict[str, Value]:
    """Return the memory_config argument, mostly none."""
    if shape and rng.random() < 0.05:
        return {"memory_config": place_for(rng, shape, layout)}
    return {"memory_config": rng.choice([DRAM, L1])} if rng.random() < 0.3 else {}


def _split(rng: Random, count: int) -> list[int]:
    """Return axes whose product is `count`."""
    axes, rank = [], rng.choice([1, 2, 3, 4, 4, 5])
    for _ in range(rank - 1):
        factors = [d for d in range(1, min(count, 128) + 1) if count % d == 0]
        axes.append(rng.choice(factors))
        count //= axes[-1]
    axes.append(count)
    if rng.random() < 0.5:
        rng.shuffle(axes)
    return axes


def _new_shape(rng: Random, shape: list[int]) -> list[int]:
    """Return a shape to reshape `shape` to, mostly one of as many elements."""
    kind = rng.random()
    if kind < 0.15:
        new = [1] * rng.randint(0, 2) + shape
    elif kind < 0.3:
        new = [math.prod(shape[:-1]), shape[-1]]
    elif kind < 0.4:
        new = [d for d in shape if d > 1] or [1]
    elif kind < 0.9:
        new = _split(rng, math.prod(shape))
    else:
        new = some_shape(rng)
    if rng.random() < 0.2:
        new[rng.randrange(len(new))] = -1
    return new


def _as_shape(rng: Random, shape: list[int]) -> Value:
    return made("Shape", shape) if rng.random() < 0.4 and -1 not in shape else shape


def _reshape(rng: Random) -> Case:
    shape = some_shape(rng)
    given, new = some_tensor(rng, shape), _new_shape(rng, shape)
    args = [given, _as_shape(rng, new)]
    if rng.random() < 0.12:  # rows between the logical part and the padding
        rows = rng.choice([1, 3, 8, 31, 32, 33])
        width = rng.choice([32, 64, 96])
        args = [
            tensor([1, 1, 32, width], rng.choice(DTYPES[:6])),
            made("Shape", [1, 1, rows, width]),
            made("Shape", [1, 1, rng.choice([32, 32, 64]), width]),
        ]
    kwargs = some_place(rng, new if -1 not in new else ())
    if rng.random() < 0.03:
        kwargs["pad_value"] = rng.choice([0, 1.5])
    return Case("reshape", args, kwargs)


def _view(rng: Random) -> Case:
    shape = some_shape(rng)
    if rng.random() < 0.5:
        shape[-2:-1] = [rng.choice([32, 64])] * len(shape[-2:-1])
    new = _new_shape(rng, shape)
    if rng.random() < 0.7:
        new = [*_split(rng, math.prod(shape[:-1])), shape[-1]]
    return Case("view", [some_tensor(rng, shape), _as_shape(rng, new)])


def _squeeze(rng: Random) -> Case:
    shape = some_shape(rng)
    shape[rng.randrange(len(shape))] = 1

    def axis() -> int:
        return rng.randint(-len(shape) - 1, len(shape))

    dim = rng.choice([None, axis(), axis(), axis(), [axis()], [axis(), axis()], []])
    return Case("squeeze", [some_tensor(rng, shape)] + ([] if dim is None else [dim]))


def _unsqueeze(rng: Random) -> Case:
    shape = some_shape(rng)
    return Case("unsqueeze", [some_tensor(rng, shape), rng.randint(-len(shape) - 2, len(shape) + 1)])


def _unsqueeze_to_4d(rng: Random) -> Case:
    return Case("unsqueeze_to_4D", [some_tensor(rng, some_shape(rng))])


def _permute(rng: Random) -> Case:
    shape = some_shape(rng)
    order = list(range(len(shape)))
    rng.shuffle(order)
    order = [d - len(shape) if rng.random() < 0.2 else d for d in order]
    if rng.random() < 0.08:
        order[0] = rng.randint(-6, 6)
    if rng.random() < 0.04:
        order = order[1:]
    new = [shape[d % len(shape)] for d in order]
    given = some_tensor(rng, shape)
    kwargs = some_place(rng, new, given["$tensor"]["layout"])
    if rng.random() < 0.05:
        kwargs["pad_value"] = rng.choice([0.0, 1.5])
    return Case("permute", [given, order], kwargs)


def _transpose(rng: Random) -> Case:
    shape = some_shape(rng)
    rank = len(shape)
    given, axes = some_tensor(rng, shape), [rng.randrange(-rank, rank) for _ in range(2)]
    if rng.random() < 0.08:
        axes[0] = rng.randint(-6, 6)
    new = list(shape)
    if all(-rank <= a < rank for a in axes):
        new[axes[0]], new[axes[1]] = new[axes[1]], new[axes[0]]
    kwargs = some_place(rng, new, given["$tensor"]["layout"])
    if rng.random() < 0.05:
        kwargs["pad_value"] = rng.choice([0.0, 1.5])
    return Case("transpose", [given, *axes], kwargs)


GENERATORS = {
    "reshape": _reshape,
    "view": _view,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "unsqueeze_to_4D": _unsqueeze_to_4d,
    "permute": _permute,
    "transpose": _transpose,
}

SHARDS = "the emulator does not (write|read) shards"

KNOWN: list[Known] = [
    stricter(
        "reshape|view|squeeze|unsqueeze|unsqueeze_to_4D|transpose",
        "was deallocated",
        FREED,
    ),
    stricter(
        "reshape|squeeze|unsqueeze",
        "on the host, where no tile is rearranged|the element counts differ",
        "ttnn renames the shape of a host tensor in TILE layout without rearranging its tiles, which then hold other values",
    ),
    stricter("reshape|squeeze|unsqueeze|unsqueeze_to_4D|permute|transpose", SHARDS, SHARDED),
    stricter(
        "reshape",
        "padded counts or widths differ",
        "ttnn drops the padding that is asked for where it cannot be a view",
    ),
    stricter(
        "permute",
        "names an axis twice",
        "ttnn takes an axis twice and drops another; the result is no permutation",
    ),
]
