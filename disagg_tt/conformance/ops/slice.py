"""Cases of slice, pad, concat, split, chunk, stack, repeat, repeat_interleave and expand: edges, steps, lists, layouts, dtypes."""

from __future__ import annotations

import re
from random import Random

from disagg_tt.conformance.case import DRAM, L1, Case, Value
from disagg_tt.conformance.known import SHARDED, Known, stricter
from disagg_tt.conformance.ops.shape import DTYPES, SHARDS, some_place, some_shape, some_tensor


def _slice(rng: Random) -> Case:
    shape = some_shape(rng)
    start, end = [], []
    for size in shape:
        tiles = size >= 32 and rng.random() < 0.6  # on tile edges
        low = rng.randrange(size) if not tiles else rng.randrange(-(-size // 32)) * 32
        low = 0 if rng.random() < 0.4 else low
        high = size if rng.random() < 0.4 else rng.randint(low + 1, size)
        start.append(low - size if rng.random() < 0.04 else low)
        end.append(high - size if rng.random() < 0.04 else high)
    if rng.random() < 0.06:
        axis = rng.randrange(len(shape))
        end[axis] = rng.choice([start[axis], shape[axis] + 1, start[axis] - 1])
    if rng.random() < 0.04:
        start, end = start[1:], end[rng.randint(0, 1) :]
    args: list[Value] = [some_tensor(rng, shape), start, end]
    if rng.random() < 0.25:
        args.append([rng.choice([1, 1, 1, 2, 3, 0 if rng.random() < 0.2 else 1]) for _ in start])
    return Case("slice", args, some_place(rng))


def _pad(rng: Random) -> Case:
    shape = some_shape(rng)
    given = some_tensor(rng, shape)
    tiled = given["$tensor"]["layout"] == "TILE" and rng.random() < 0.85
    value: Value = rng.choice([0.0, 0.0, 1.5, -1.0, 0])
    pairs = []
    for axis, size in enumerate(shape):
        front = rng.choice([0, 0, 1, 5]) if not tiled else 0
        back = (
            rng.choice([0, 0, 1, 2, 32]) if not tiled else rng.choice([0, 0, -size % 32, 32, -size % 32 + 32])
        )
        if axis < len(shape) - 2:
            front, back = rng.choice([0, 0, 0, 1]) if not tiled else 0, rng.choice([0, 0, 1, 3])
        pairs.append([front, back])
    kwargs = some_place(rng)
    if rng.random() < 0.25:
        new = [size + front + back for size, (front, back) in zip(shape, pairs, strict=True)]
        if rng.random() < 0.1:
            new[rng.randrange(len(new))] -= 2
        return Case("pad", [given, new, [front for front, _ in pairs], value], kwargs)
    if rng.random() < 0.2:
        pairs = pairs[rng.randint(0, len(pairs)) :]
    if rng.random() < 0.04:
        pairs = [[0, 0], *pairs]
    if rng.random() < 0.15:
        return Case("pad", [given], {"padding": pairs, "value": value, **kwargs})
    return Case("pad", [given, pairs, value], kwargs)


def _like(rng: Random, given: Value, axis: int, sizes: list[int]) -> Value:
    """Return a tensor as `given` but for one axis, and rarely but for something else."""
    what = dict(given["$tensor"], shape=list(given["$tensor"]["shape"]))
    what["shape"][axis] = rng.choice(sizes)
    other = rng.random()
    if other < 0.04:
        what["dtype"] = rng.choice(DTYPES)
    elif other < 0.08 and not what["dtype"].endswith("_b"):
        what["layout"] = rng.choice(["TILE", "ROW_MAJOR"])
    elif other < 0.12:
        what["memory"] = rng.choice([DRAM, L1])
    elif other < 0.15:
        what["shape"][rng.randrange(len(what["shape"]))] += 1
    elif other < 0.17:
        what["shape"] = [1, *what["shape"]]
    if what["dtype"].endswith("_b"):
        what["layout"] = "TILE"
    return {"$tensor": what}


def _concat(rng: Random) -> Case:
    shape = some_shape(rng)
    rank = len(shape)
    axis = rng.randrange(rank)
    given = some_tensor(rng, shape, interleaved=rng.random() < 0.6)
    sizes = (
        [shape[axis]]
        if given["$tensor"]["memory"] not in (DRAM, L1) or rng.random() < 0.4
        else [1, 2, 5, 32, 33, 64]
    )
    tensors = [given] + [_like(rng, given, axis, sizes) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    dim = rng.choice([axis, axis - rank]) if rng.random() < 0.95 else rng.choice([rank, -rank - 1])
    return Case("concat", [tensors, dim], some_place(rng))


def _split(rng: Random) -> Case:
    shape = some_shape(rng)
    axis = rng.randrange(len(shape))
    size = shape[axis]
    by: Value = rng.choice([1, 2, 16, 32, size, max(size // 2, 1), size + 1])
    if rng.random() < 0.35:
        first = rng.randint(1, size)
        by = [first, size - first] if first < size else [first]
        if rng.random() < 0.15:
            by[0] += rng.choice([-1, 1])
    dim = rng.choice([axis, axis, axis - len(shape)]) if rng.random() < 0.96 else len(shape)
    return Case("split", [some_tensor(rng, shape), by, dim], some_place(rng))


def _chunk(rng: Random) -> Case:
    shape = some_shape(rng)
    dim = rng.randint(-len(shape), len(shape) - 1) if rng.random() < 0.96 else len(shape)
    return Case("chunk", [some_tensor(rng, shape), rng.choice([1, 2, 2, 3, 4, 0]), dim])


def _stack(rng: Random) -> Case:
    shape = some_shape(rng, (1, 2, 3, 3, 4))
    given = some_tensor(rng, shape, interleaved=True)
    tensors = [given] + [_like(rng, given, 0, [shape[0]]) for _ in range(rng.choice([0, 1, 1, 2]))]
    return Case("stack", [tensors, rng.randint(-len(shape) - 2, len(shape) + 1)])


def _repeat(rng: Random) -> Case:
    shape = some_shape(rng)
    times = [rng.choice([1, 1, 1, 2, 3]) for _ in shape]
    if rng.random() < 0.15:
        times = times[1:] if rng.random() < 0.4 else [rng.choice([1, 2]), *times]
    if rng.random() < 0.03:
        times = [0, *times[1:]]
    return Case("repeat", [some_tensor(rng, shape), times], some_place(rng))


def _repeat_interleave(rng: Random) -> Case:
    shape = some_shape(rng)
    dim = rng.randint(-len(shape), len(shape) - 1) if rng.random() < 0.95 else len(shape)
    return Case(
        "repeat_interleave", [some_tensor(rng, shape), rng.choice([1, 2, 3, 4]), dim], some_place(rng)
    )


def _expand(rng: Random) -> Case:
    shape = some_shape(rng)
    for axis in range(len(shape)):
        shape[axis] = 1 if rng.random() < 0.4 else shape[axis]
    new = [rng.choice([2, 3, -1, 1]) if size == 1 else rng.choice([size, -1]) for size in shape]
    if rng.random() < 0.1:
        new[rng.randrange(len(new))] += 1
    if rng.random() < 0.2:
        new = [rng.choice([1, 2]), *new]
    return Case("expand", [some_tensor(rng, shape), new], some_place(rng))


GENERATORS = {
    "slice": _slice,
    "pad": _pad,
    "concat": _concat,
    "split": _split,
    "chunk": _chunk,
    "stack": _stack,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "expand": _expand,
}

KNOWN: list[Known] = [
    stricter("slice|split|chunk|pad|concat|stack|repeat|repeat_interleave|expand", SHARDS, SHARDED),
    stricter(
        "slice",
        r"slice: \[\d+:\d+\] on axis",
        "ttnn slices into the padding of TILE layout, which holds no values",
    ),
    stricter(
        "pad",
        "one that the dtype can hold",
        "ttnn fills an integer tensor with what is left of a value that does not fit",
    ),
    Known(
        re.compile("pad"),
        "Of a host tensor ttnn grows the padding and keeps the shape; the emulator grows the shape, as on a device",
        lambda case, real, ours: (
            case.args[0]["$tensor"]["on"] == "host" and real["outcome"] == ours["outcome"] == "accepted"
        ),
    ),
    stricter(
        "pad",
        "on the host is padded in ROW_MAJOR layout only|take a shape for a host tensor",
        "ttnn returns the host tensor with the shape that it had",
    ),
    stricter(
        "pad",
        "the emulator does not pad",
        "The pads of sharded and of 5-axis tensors have placement rules of their own",
    ),
    stricter(
        "concat|stack",
        "layouts must be the same|either all tensors or none|dtypes must be the same",
        "ttnn joins tiles and rows, or two dtypes, as if they were stored alike, which mixes up the values",
    ),
    stricter(
        "repeat|expand",
        "the emulator does not repeat (bfloat4_b|uint8)",
        "ttnn repeats these by whole tiles and of some ranks only",
    ),
    stricter("repeat_interleave", "the emulator does not repeat parts", SHARDED),
    stricter(
        "repeat_interleave", r"axis \d; it must be", "ttnn takes one axis more than there are of some tensors"
    ),
    stricter("repeat|expand", "is on the host", "ttnn makes an empty tensor without looking at the input"),
]
