"""Cases of the normalisations and softmax: shapes, dtypes, places and weights in every layout that models use."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from disagg_tt.conformance.case import (
    DRAM,
    L1,
    Case,
    Value,
    attribute,
    made,
    rectangle,
    sharded,
    tensor,
    torch_zeros,
)
from disagg_tt.conformance.known import ARGUMENT, stricter

FLOATS = ("bfloat16", "float32", "bfloat8_b")
OTHERS = ("bfloat4_b", "uint32", "int32", "uint16")
ROWS = (1, 5, 32, 33, 64, 96)
WIDTHS = (1, 16, 32, 40, 64, 96, 100, 128, 256, 1024)
MEMORIES: tuple[Value, ...] = (DRAM, L1, attribute("L1_WIDTH_SHARDED_MEMORY_CONFIG"))


def random_shape(rng: Random) -> list[int]:
    """Return 1 to 5 axes, mostly 2 to 4, the last two of sizes around whole tiles."""
    rank = rng.choice((1, 2, 2, 3, 4, 4, 4, 5))
    leading = [rng.choice((1, 1, 2, 3)) for _ in range(rank - 2)]
    return [*leading, rng.choice(ROWS), rng.choice(WIDTHS)][-rank:]


def random_dtype(rng: Random) -> str:
    """Return a float dtype, now and then another."""
    return rng.choice(FLOATS if rng.random() < 0.9 else OTHERS)


def random_place(
    rng: Random, shape: list[int], kinds: tuple[str, ...] = ("HEIGHT", "WIDTH", "BLOCK")
) -> Value:
    """Return a memory config that a TILE tensor of `shape` can have: interleaved, or sharded over up to 8x7 cores."""
    if rng.random() < 0.75 or len(shape) < 2:
        return rng.choice((DRAM, DRAM, L1))
    rows = shape[-2] + -shape[-2] % 32
    for axis in shape[:-2]:
        rows *= axis
    tall, wide = rows // 32, (shape[-1] + 31) // 32
    kind = rng.choice(kinds)
    down = 1 if kind == "WIDTH" else rng.choice([n for n in range(1, 8) if tall % n == 0])
    across = 1 if kind == "HEIGHT" else rng.choice([n for n in range(1, 9) if wide % n == 0])
    grid = rectangle(across, down) if kind == "BLOCK" else rectangle(max(across, 1), max(down, 1))
    return sharded(kind, (rows // down, wide * 32 // across), grid)


def random_input(rng: Random, shape: list[int], dtype: str = "", layout: str = "") -> Value:
    """Return a tensor of `shape`, mostly of a float in TILE layout on the device, now and then one that is freed or on the host."""
    dtype, layout = dtype or random_dtype(rng), layout or rng.choice(("TILE",) * 5 + ("ROW_MAJOR",))
    on = rng.choice(("host", "freed")) if rng.random() < 0.03 else "device"
    place = random_place(rng, shape) if layout == "TILE" else rng.choice((DRAM, DRAM, L1))
    return tensor(shape, dtype, layout, place, on)


def _weight(rng: Random, width: int) -> Value:
    """Return a gamma or beta for rows of `width`: folded rows, a tile row, or now and then something wrong."""
    dtype = rng.choice(("bfloat16",) * 12 + ("float32",) * 4 + ("bfloat8_b", "uint32"))
    folded = [1, 1, max(width // 32, 1), 32]
    layout, shape = rng.choice(
        [("ROW_MAJOR", folded)] * 8
        + [("ROW_MAJOR", folded[2:]), ("ROW_MAJOR", [1, 1, 1, width]), ("ROW_MAJOR", [width])]
        + [("TILE", [1, 1, 1, width])] * 8
        + [
            ("TILE", [width]),
            ("TILE", [1, width]),
            ("TILE", [1, 1, 1, width + 32]),
            ("TILE", [1, 1, 32, width]),
        ]
        + [("TILE", [1, 1, 40, width]), ("ROW_MAJOR", [1, 1, 7, 32])]
    )
    return tensor(shape, dtype, layout, rng.choice((DRAM, DRAM, DRAM, L1)))


def _program_config(rng: Random, memory: Value, shape: list[int]) -> Value:
    """Return a program config for an input placed by `memory`; for shards mostly the one that fits them."""
    sharded_config = "LayerNormShardedMultiCoreProgramConfig"
    if "$call" not in memory and rng.random() < 0.2:
        grid = made("CoreCoord", 8, 4)
        return made(
            sharded_config,
            compute_with_storage_grid_size=grid,
            subblock_w=1,
            block_h=1,
            block_w=1,
            inplace=False,
        )
    if "$call" not in memory or rng.random() < 0.1:
        return made("LayerNormDefaultProgramConfig", use_welford=rng.random() < 0.2)
    spec = memory["args"][2]
    end = spec["args"][0]["args"][0][0]["args"][1]["args"]
    tall, wide = (n // 32 for n in spec["args"][1])
    if rng.random() < 0.15:
        tall, wide = rng.choice(((tall + 1, wide), (tall, wide + 1), (tall * 2, wide)))
    return made(
        sharded_config,
        compute_with_storage_grid_size=made("CoreCoord", end[0] + 1, end[1] + 1),
        subblock_w=rng.choice([n for n in range(1, 5) if wide % n == 0] * 4 + [3]),
        block_h=tall,
        block_w=wide,
        inplace=rng.random() < 0.15,
    )


def _norm(op: str) -> Callable[[Random], Case]:
    def case(rng: Random) -> Case:
        shape = random_shape(rng)
        kwargs: dict[str, Value] = {}
        x = random_input(rng, shape)
        if rng.random() < 0.7:
            kwargs["weight"] = _weight(rng, shape[-1])
        if rng.random() < (0.35 if op == "layer_norm" else 0.1):
            kwargs["bias"] = _weight(rng, shape[-1])
        if rng.random() < 0.15:
            other = shape if rng.random() < 0.8 else random_shape(rng)
            dtype, place = x["$tensor"]["dtype"], x["$tensor"]["memory"]
            kwargs["residual_input_tensor"] = tensor(
                other,
                dtype if rng.random() < 0.7 else random_dtype(rng),
                x["$tensor"]["layout"] if rng.random() < 0.8 else "TILE",
                place if other == shape and rng.random() < 0.7 else DRAM,
            )
        if rng.random() < 0.5:
            kwargs["epsilon"] = rng.choice((1e-5, 1e-6, 0.0, 1))
        if rng.random() < 0.3:
            kwargs["program_config"] = _program_config(rng, x["$tensor"]["memory"], shape)
        if rng.random() < 0.2:
            kwargs["memory_config"] = rng.choice((random_place(rng, shape), *MEMORIES))
        if rng.random() < 0.03:
            kwargs[rng.choice(("epsilon", "weight", "memory_config"))] = rng.choice(
                ("1e-5", [1], torch_zeros(shape))
            )
        return Case(op, [x], kwargs)

    return case


def _softmax(rng: Random) -> Case:
    shape = random_shape(rng)
    args: list[Value] = [random_input(rng, shape)]
    kwargs: dict[str, Value] = {}
    if rng.random() < 0.7:
        dim = rng.choice((-1, -1, len(shape) - 1, rng.randint(-len(shape) - 1, len(shape))))
        if rng.random() < 0.5:
            args.append(dim)
        else:
            kwargs["dim"] = dim
    if rng.random() < 0.2:
        kwargs["numeric_stable"] = rng.random() < 0.5
    if rng.random() < 0.25:
        kwargs["memory_config"] = random_place(rng, shape)
    return Case("softmax", args, kwargs)


GENERATORS = {"layer_norm": _norm("layer_norm"), "rms_norm": _norm("rms_norm"), "softmax": _softmax}
KNOWN = [
    stricter(
        "(rms|layer)_norm",
        "(weight|bias) is u?int",
        "ttnn takes integer weights, whose bits its kernels read as floats",
    ),
    stricter("(rms|layer)_norm", "write into its input", ARGUMENT),
]
