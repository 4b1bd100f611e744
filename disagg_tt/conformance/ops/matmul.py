"""Cases of matmul, linear and minimal_matmul: ranks and batches, transposes, bias, activations, dtypes, placement."""

from __future__ import annotations

from random import Random
from typing import Any

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
    torch_zeros,
)
from disagg_tt.conformance.known import SHARDED, Known, stricter

SIZES = (1, 7, 31, 32, 33, 64, 96, 100, 128, 256)
FLOATS = ("bfloat16", "bfloat16", "bfloat16", "bfloat8_b", "bfloat4_b", "float32")
OTHERS = ("uint32", "int32", "uint16")
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_approx", "sigmoid", "tanh", "relu6", "no_such_thing", "")


def _batch(rng: Random) -> tuple[list[int], list[int]]:
    """Return the leading axes of both operands: mostly those that ttnn documents, else any."""
    form = rng.random()
    shared = [rng.choice((1, 2, 3)) for _ in range(rng.randint(0, 3))]
    if form < 0.45:
        return shared, [1] * rng.choice((0, len(shared), len(shared), 2))
    if form < 0.7:
        return shared, list(shared)
    if form < 0.85:
        return [1] * len(shared), shared
    return shared, [rng.choice((1, 2, 3)) for _ in range(rng.randint(0, 3))]


def _operand(rng: Random, shape: list[int], memory: Value) -> Value:
    dtype = rng.choice(OTHERS) if rng.random() < 0.02 else rng.choice(FLOATS)
    layout = "ROW_MAJOR" if rng.random() < 0.02 and not dtype.endswith("_b") else "TILE"
    on = rng.choice(("host", "freed")) if rng.random() < 0.02 else "device"
    if rng.random() < 0.005:
        return torch_zeros(shape)
    return tensor(shape, dtype, layout, memory, on)


def _up(size: int) -> int:
    return -(-size // 32) * 32


def _shards(rng: Random, rows: int, columns: int) -> Value:
    """Return a sharded L1 placement of a [rows, columns] matrix in tiles, mostly one that fits it."""
    high, wide = _up(rows) // 32, _up(columns) // 32
    kind, count = rng.choice(("HEIGHT", "WIDTH", "BLOCK")), rng.choice((1, 2, 3, 4))
    if rng.random() < 0.1:
        count = 7
    orientation = "COL_MAJOR" if rng.random() < 0.05 else "ROW_MAJOR"
    if kind == "HEIGHT":
        return sharded(kind, [-(-high // count) * 32, wide * 32], cores(count), orientation)
    if kind == "WIDTH":
        return sharded(kind, [high * 32, -(-wide // count) * 32], cores(count), orientation)
    down = rng.choice((1, 2))
    return sharded(kind, [-(-high // down) * 32, -(-wide // count) * 32], rectangle(count, down), orientation)


def _placed(rng: Random, rows: int, columns: int, often: float) -> Value:
    chance = rng.random()
    if chance < often:
        return _shards(rng, rows, columns)
    return L1 if chance < often + 0.2 else DRAM


def _options(rng: Random, rows: int, columns: int) -> dict[str, Value]:
    """Return keyword arguments that matmul and linear share."""
    options: dict[str, Value] = {}
    if rng.random() < 0.3:
        options["dtype"] = attribute(rng.choice(FLOATS + ("uint32",) if rng.random() < 0.1 else FLOATS))
    chance = rng.random()
    if chance < 0.2:
        options["memory_config"] = rng.choice((L1, DRAM))
    elif chance < 0.28:
        options["memory_config"] = _shards(rng, rows, columns)
    elif chance < 0.31:
        kind = rng.choice(("HEIGHT", "WIDTH", "BLOCK"))
        options["memory_config"] = attribute(f"L1_{kind}_SHARDED_MEMORY_CONFIG")
    if rng.random() < 0.12:
        options["activation"] = rng.choice(ACTIVATIONS)
    elif rng.random() < 0.04:
        options["activation"] = made(
            "UnaryWithParam", attribute(f"UnaryOpType.{rng.choice(('RELU', 'SILU'))}")
        )
    if rng.random() < 0.2:
        options["compute_kernel_config"] = made(
            "WormholeComputeKernelConfig",
            math_fidelity=attribute(f"MathFidelity.{rng.choice(('LoFi', 'HiFi2', 'HiFi4'))}"),
            fp32_dest_acc_en=rng.random() < 0.5,
        )
    if rng.random() < 0.12:
        options["core_grid"] = made("CoreGrid", x=rng.choice((1, 4, 8, 9)), y=rng.choice((1, 4, 7, 8)))
    if rng.random() < 0.01:
        options["no_such_argument"] = 1
    return options


def _program(rng: Random, m: int, k: int, n: int) -> Value:
    """Return a program config of one of the documented classes, mostly one that suits [m, k] times [k, n]."""
    high, deep, wide = (_up(size) // 32 for size in (m, k, n))
    down, across = rng.choice((1, 2, 4)), rng.choice((1, 2, 4))
    common: dict[str, Any] = {
        "compute_with_storage_grid_size": made("CoreCoord", 8, rng.choice((7, 7, 7, 8))),
        "in0_block_w": rng.choice((1, 1, 2, deep)),
        "out_subblock_h": 1,
        "out_subblock_w": rng.choice((1, 1, 1, 2)),
        "per_core_M": -(-high // down),
        "per_core_N": -(-wide // across),
    }
    form = rng.random()
    if form < 0.35:
        return made(
            "MatmulMultiCoreReuseMultiCastProgramConfig", **common, transpose_mcast=rng.random() < 0.1
        )
    if form < 0.75:
        along = rng.random() < 0.7
        common["per_core_M" if along else "per_core_N"] = high if along else wide
        return made(
            "MatmulMultiCoreReuseMultiCast1DProgramConfig",
            **common,
            fuse_batch=rng.random() < 0.8,
            mcast_in0=along,
        )
    return made("MatmulMultiCoreReuseProgramConfig", **{**common, "per_core_N": wide})


def _matmul(rng: Random, op: str = "matmul") -> Case:
    m, k, n = (rng.choice(SIZES) for _ in range(3))
    before_a, before_b = _batch(rng)
    a, b = [*before_a, m, k], [*before_b, k, n]
    if rng.random() < 0.05:
        a = [k]
    if rng.random() < 0.05:
        b = [k]
    if rng.random() < 0.05:
        b[-1 if len(b) == 1 else -2] = rng.choice(SIZES)
    options = _options(rng, _rows(a), n)
    for name, shape in (("transpose_a", a), ("transpose_b", b)):
        if rng.random() < 0.15 and len(shape) > 1:
            options[name] = True
            if rng.random() < 0.9:
                shape[-2:] = shape[:-3:-1]
    if rng.random() < 0.08:
        options["program_config"] = _program(rng, m, k, n)
    often = 0.1 if rng.random() < 0.5 else 0.0
    place_a, place_b = _placed(rng, _rows(a), a[-1], often), _placed(rng, _rows(b), b[-1], often / 2)
    args = [_operand(rng, a, place_a), _operand(rng, b, place_b)]
    if op == "linear" and rng.random() < 0.5:
        bias = rng.choice(([n], [1, n], [1, n], [1, 1, n], [1, 1, 1, n], [m, n], [2, n], [1, n + 1], [1, 1]))
        options["bias"] = _operand(rng, bias, rng.choice((DRAM, L1)))
    if rng.random() < 0.01:
        args.append(1)
    return Case(op, args, options)


def _rows(shape: list[int]) -> int:
    """Return the padded rows of all matrices of `shape` one below the other."""
    rows = _up(shape[-2]) if len(shape) > 1 else 1
    for axis in shape[:-2]:
        rows *= axis
    return rows


def _linear(rng: Random) -> Case:
    return _matmul(rng, "linear")


def _minimal(rng: Random) -> Case:
    m, k, n = (rng.choice((*SIZES, 512, 1024)) for _ in range(3))
    lead = [rng.choice((1, 1, 2)) for _ in range(rng.choice((0, 1, 2, 2, 2)))]
    a = [*lead, m, k]
    b = [*([1] * rng.choice((0, 1, 2, 2))), k, n]
    if rng.random() < 0.05:
        b[-2] = rng.choice(SIZES)
    if rng.random() < 0.05:
        b = [2, k, n]
    if rng.random() < 0.02:
        a = [k]
    options = {name: v for name, v in _options(rng, _rows(a), n).items() if name != "core_grid"}
    if isinstance(options.get("activation"), dict):
        options["fused_activation"] = options["activation"]
    options.pop("activation", None)
    args = [
        _operand(rng, a, _placed(rng, _rows(a), k, 0.04)),
        _operand(rng, b, _placed(rng, _rows(b), n, 0.04)),
    ]
    if rng.random() < 0.7:  # most pairs of dtypes are rejected
        dtype = rng.choice(FLOATS)
        for operand in args:
            if "$tensor" in operand and operand["$tensor"]["layout"] == "TILE":
                operand["$tensor"]["dtype"] = dtype
    if rng.random() < 0.25:
        shape = rng.choice(([n], [1, n], [1, 1, n], [1, 1, 1, n], [2, n], [1, n + 32]))
        options["bias_tensor"] = _operand(rng, shape, rng.choice((DRAM, L1)))
    return Case("experimental.minimal_matmul", args, options)


GENERATORS = {"matmul": _matmul, "linear": _linear, "experimental.minimal_matmul": _minimal}
KNOWN: list[Known] = [
    stricter(
        ".*matmul|linear",
        "does not (multiply|shard a product|place a product)",
        SHARDED,
    ),
    stricter(
        "linear",
        "bias .* for a product",
        "A bias that is wider than the product is ttnn's broadcast of the product, or read past its end.",
    ),
    stricter(
        ".*matmul|linear",
        "dtype .* of a product of floats|bias is",
        "A product of floats has no meaning as packed integers, nor a sum of floats with them.",
    ),
]
