"""Cases of elementwise ops: shapes that broadcast or do not, every dtype, both layouts, shards, numbers, fused functions."""

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
from disagg_tt.conformance.known import Known, stricter

DTYPES = ("bfloat16",) * 5 + (
    "float32",
    "float32",
    "bfloat8_b",
    "bfloat8_b",
    "bfloat4_b",
    "int32",
    "uint32",
    "uint16",
    "uint8",
)
SIZES = (1, 3, 17, 31, 32, 33, 40, 64, 96)
BINARY = ("add", "sub", "subtract", "mul", "multiply")
COMPARISONS = ("eq", "ne", "lt", "gt", "le", "ge")
IN_PLACE = tuple(f"{op}_" for op in (*BINARY, *COMPARISONS, "div", "divide", "rsub"))
PLAIN = ("relu", "silu", "reciprocal", "neg", "abs", "square", "identity")
WITH_MODES = ("exp", "sqrt", "rsqrt", "tanh", "log")
FUSED = (
    "RELU",
    "GELU",
    "SILU",
    "EXP",
    "SQRT",
    "RSQRT",
    "RECIP",
    "NEG",
    "ABS",
    "SIGMOID",
    "TANH",
    "LOG",
    "SQUARE",
)


def some_shape(rng: Random) -> list[int]:
    """Return 1 to 5 axes (now and then more), the last two of sizes around whole tiles."""
    rank = rng.choice((1, 2, 2, 3, 3, 4, 4, 4, 5)) if rng.random() < 0.97 else 7
    return ([rng.choice((1, 1, 2, 3)) for _ in range(rank - 2)] + [rng.choice(SIZES), rng.choice(SIZES)])[
        -rank:
    ]


def beside(rng: Random, shape: list[int]) -> list[int]:
    """Return a shape for the other operand: the same, one that broadcasts, or one that does not."""
    other = list(shape)
    if rng.random() < 0.5:
        return other
    for axis in range(len(other)):
        if rng.random() < 0.3:
            other[axis] = 1
    if rng.random() < 0.3:
        other = other[rng.randrange(len(other)) :]
    if rng.random() < 0.2:
        other = [rng.choice((1, 2))] + other
    if rng.random() < 0.08:
        other[rng.randrange(len(other))] += rng.choice((1, 32))
    return other


def some_place(rng: Random, shape: list[int], layout: str, chance: float = 0.3) -> Value:
    """Return where a tensor of `shape` can lie: interleaved, or with `chance` sharded over some cores."""
    if rng.random() >= chance or len(shape) < 2:
        return rng.choice((DRAM, DRAM, L1))
    tile = 32 if layout == "TILE" else 1
    rows, columns = -(-shape[-2] // tile) * tile, -(-shape[-1] // tile) * tile
    for axis in shape[:-2]:
        rows *= axis
    kind = rng.choice(("HEIGHT", "HEIGHT", "WIDTH", "BLOCK"))
    down = 1 if kind == "WIDTH" else rng.choice([n for n in range(1, 8) if rows % (n * tile) == 0])
    across = 1 if kind == "HEIGHT" else rng.choice([n for n in range(1, 9) if columns % (n * tile) == 0])
    return sharded(
        kind,
        (rows // down, columns // across),
        rectangle(across, down),
        buffer=rng.choice(("L1",) * 9 + ("DRAM",)),
    )


def some_tensor(rng: Random, shape: list[int], dtype: str = "", layout: str = "") -> Value:
    """Return a tensor of `shape`: mostly on the device, in TILE layout and interleaved."""
    dtype, layout = dtype or rng.choice(DTYPES), layout or rng.choice(("TILE",) * 3 + ("ROW_MAJOR",))
    if "bfloat8" in dtype or "bfloat4" in dtype:
        layout = "TILE"
    on = "device" if rng.random() < 0.995 else "freed"  # ttnn may crash at it
    return tensor(shape, dtype, layout, some_place(rng, shape, layout), on)


def other_dtype(rng: Random, dtype: str) -> str:
    return dtype if rng.random() < 0.75 else rng.choice(DTYPES)


def some_number(rng: Random) -> Value:
    return rng.choice(
        (2, 2, -1, 0, True, 2.0, 0.5, -3.25, 1e-3, 70000, 2**31, 2**32 - 1, 2**33, -(2**31), 1e12, "2", None)
    )


def operands(rng: Random, op: str, number_first: float = 0.1) -> list[Value]:
    """Return two operands: two tensors, or one and a number; now and then something else."""
    shape = some_shape(rng)
    a = some_tensor(rng, shape)
    if rng.random() < 0.3:
        number = some_number(rng)
        return [number, a] if rng.random() < number_first else [a, number]
    if rng.random() < 0.02:
        return [a, torch_zeros(shape)]
    other = beside(rng, shape)
    spec = a["$tensor"]
    b = some_tensor(rng, other, other_dtype(rng, spec["dtype"]), spec["layout"] if rng.random() < 0.8 else "")
    if other == shape and b["$tensor"]["layout"] == spec["layout"] and rng.random() < 0.6:
        b["$tensor"]["memory"] = spec["memory"]
    return [a, b] if rng.random() < 0.7 else [b, a]


def broadcast(values: list[Value]) -> tuple[list[int], str, str]:
    """Return the shape, dtype and layout that the result of `values` may have."""
    specs = [v["$tensor"] for v in values if isinstance(v, dict) and "$tensor" in v]
    rank = max(len(s["shape"]) for s in specs)
    padded = [[1] * (rank - len(s["shape"])) + s["shape"] for s in specs]
    rows = all(s["layout"] == "ROW_MAJOR" for s in specs)
    return [max(d) for d in zip(*padded, strict=True)], specs[0]["dtype"], "ROW_MAJOR" if rows else "TILE"


def activations(rng: Random) -> Value:
    """Return a list of functions to fuse."""
    one = attribute(f"UnaryOpType.{rng.choice(FUSED)}")
    return rng.choice(
        ([one], [one], [made("UnaryWithParam", one)], [one, attribute("UnaryOpType.RELU")], ["relu"], [])
    )


def placing(
    rng: Random, shape: list[int], dtype: str, layout: str, with_dtype: bool = False
) -> dict[str, Value]:
    """Return where the result is asked to be: memory_config, an output tensor, a dtype, or nothing."""
    kwargs: dict[str, Value] = {}
    if with_dtype and rng.random() < 0.2:
        kwargs["dtype"] = attribute(rng.choice(DTYPES))
    if rng.random() < 0.25:
        kwargs["memory_config"] = some_place(rng, shape, layout, 0.4)
        if rng.random() < 0.1:
            kwargs["memory_config"] = attribute("L1_HEIGHT_SHARDED_MEMORY_CONFIG")
    if rng.random() < 0.15:
        wrong = shape if rng.random() < 0.9 else shape[:-1] + [shape[-1] + 32]
        kwargs["output_tensor"] = some_tensor(
            rng, wrong, other_dtype(rng, dtype), layout if rng.random() < 0.85 else ""
        )
    if rng.random() < 0.03:
        kwargs["queue_id"] = rng.choice((0, None, 1))
    return kwargs


def _binary(op: str, *, modes: bool = False, number_first: float = 0.02) -> Callable[[Random], Case]:
    def case(rng: Random) -> Case:
        values = operands(rng, op, number_first)
        kwargs = placing(rng, *broadcast(values), with_dtype=True)
        if rng.random() < 0.12:
            kwargs[
                rng.choice(("activations", "input_tensor_a_activations", "input_tensor_b_activations"))
            ] = activations(rng)
        if modes and rng.random() < 0.1:
            kwargs["fast_and_approximate_mode"] = rng.random() < 0.5
        return Case(op, values, kwargs, rng.choice(((1, 2), (1, 2), (1, 2), (2, 2))))

    return case


def _in_place(op: str) -> Callable[[Random], Case]:
    def case(rng: Random) -> Case:
        values = operands(rng, op, 0.01)
        kwargs = {"activations": activations(rng)} if rng.random() < 0.1 else {}
        return Case(op, values, kwargs)

    return case


def _unary(op: str, modes: bool = False) -> Callable[[Random], Case]:
    def case(rng: Random) -> Case:
        shape = some_shape(rng)
        value = some_tensor(rng, shape)
        spec = value["$tensor"]
        kwargs = placing(rng, shape, spec["dtype"], spec["layout"])
        if modes and rng.random() < 0.2:
            kwargs["fast_and_approximate_mode"] = rng.random() < 0.5
        if op == "gelu" and rng.random() < 0.3:
            kwargs["variant"] = attribute(f"GeluVariant.{rng.choice(('Accurate', 'FastLut', 'Tanh'))}")
        if rng.random() < 0.02:
            value = rng.choice((3.0, torch_zeros(shape)))
        return Case(op, [value], kwargs)

    return case


def _clamp(rng: Random) -> Case:
    shape = some_shape(rng)
    value = some_tensor(rng, shape)
    spec = value["$tensor"]
    bounds = [rng.choice((None, 0, -1, 0.5, -2.5, -1.0)), rng.choice((None, 1, 2, 7.5, 2.0))]
    return Case("clamp", [value, *bounds], placing(rng, shape, spec["dtype"], spec["layout"]))


def _typecast(rng: Random) -> Case:
    shape = some_shape(rng)
    value = some_tensor(rng, shape)
    dtype, layout = rng.choice(DTYPES), value["$tensor"]["layout"]
    kwargs = placing(rng, shape, dtype, layout)
    arguments = [value, attribute(dtype)]
    if rng.random() < 0.1:
        arguments.insert(1, attribute(other_dtype(rng, value["$tensor"]["dtype"])))
    return Case("typecast", arguments, kwargs)


def _clone(rng: Random) -> Case:
    shape = some_shape(rng)
    value = some_tensor(rng, shape)
    kwargs: dict[str, Value] = {}
    if rng.random() < 0.4:
        kwargs["dtype"] = attribute(rng.choice(DTYPES))
    if rng.random() < 0.4:
        kwargs["memory_config"] = some_place(rng, shape, value["$tensor"]["layout"], 0.3)
    return Case("clone", [value], kwargs)


def _copy(rng: Random) -> Case:
    shape = some_shape(rng)
    a = some_tensor(rng, shape)
    spec = a["$tensor"]
    layout = spec["layout"] if rng.random() < 0.85 else ""
    b = some_tensor(
        rng, beside(rng, shape) if rng.random() < 0.1 else shape, other_dtype(rng, spec["dtype"]), layout
    )
    if rng.random() < 0.4 and b["$tensor"]["shape"] == shape and b["$tensor"]["layout"] == spec["layout"]:
        b["$tensor"]["memory"] = spec["memory"]
    return Case("copy", [a, b])


def _plus_one(rng: Random) -> Case:
    shape = some_shape(rng)
    dtype, layout = (
        rng.choice(("int32", "uint32") * 4 + DTYPES),
        "ROW_MAJOR" if rng.random() < 0.9 else "TILE",
    )
    kwargs = {"skip_negative_entries": rng.random() < 0.5} if rng.random() < 0.6 else {}
    return Case("plus_one", [some_tensor(rng, shape, dtype, layout)], kwargs)


GENERATORS: dict[str, Callable[[Random], Case]] = {
    **{op: _binary(op, modes=True, number_first=0.3) for op in (*BINARY, "div", "divide")},
    **{op: _binary(op) for op in (*COMPARISONS, "maximum", "minimum", "rsub")},
    **{op: _in_place(op) for op in IN_PLACE},
    **{op: _unary(op) for op in PLAIN},
    **{op: _unary(op, modes=True) for op in WITH_MODES},
    "gelu": _unary("gelu", modes=True),
    "sigmoid": _unary("sigmoid"),
    "clamp": _clamp,
    "typecast": _typecast,
    "clone": _clone,
    "copy": _copy,
    "plus_one": _plus_one,
}

_NUMBERS = r"(add|sub|subtract|mul|multiply|div|divide|rsub|maximum|minimum|eq|ne|lt|gt|le|ge|clamp)_?"
KNOWN: list[Known] = [
    stricter(
        _NUMBERS,
        "which cannot represent",
        "ttnn takes a number beside integers that cannot hold it (2.5 or 70000 beside uint16) and computes with another one",
    ),
    stricter(
        _NUMBERS,
        "TensorSpec.* and .*torch.Tensor|torch.Tensor.* and .*TensorSpec",
        "ttnn takes a torch tensor of one element as a number",
    ),
    stricter(
        _NUMBERS,
        r"does not (convert its \w+ result to|fuse activations with integers)",
        "A binary op of integers that also fuses functions or writes floats (or the other way) is left to typecast",
    ),
    stricter(
        ".*",
        "does not choose shards",
        "ttnn chooses shards over all cores when a sharded memory config names none and no input is sharded alike",
    ),
]
