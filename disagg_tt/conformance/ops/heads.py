"""Cases of heads and rotary embedding: geometry, dtypes, sharding, prefill and decode."""

from __future__ import annotations

from random import Random
from typing import Any

from disagg_tt.conformance.case import DRAM, L1, Case, Value, attribute, cores, made, sharded, tensor
from disagg_tt.conformance.known import SHARDED, Known, stricter

FLOATS = ("bfloat16",) * 6 + ("bfloat8_b",) * 3 + ("float32", "bfloat4_b")
OTHERS = ("uint32", "int32", "uint16")
INDICES = ("int32",) * 18 + ("uint32", "uint16")
WIDTHS = (32, 64, 64, 128, 96)


def operand(rng: Random, shape: list[int], dtype: str, memory: Value = DRAM) -> Value:
    """Return a tensor in TILE layout, rarely one that is wrong in some way."""
    layout, on = "TILE", "device"
    chance = rng.random()
    if chance < 0.01:
        dtype = rng.choice(OTHERS)
    elif chance < 0.02 and not dtype.endswith("_b"):
        layout = "ROW_MAJOR"
    elif chance < 0.03:
        on = rng.choice(("host", "freed"))
    return tensor(shape, dtype, layout, memory, on)


def up(size: int) -> int:
    return -(-size // 32) * 32


def flat(rng: Random) -> Value:
    return DRAM if rng.random() < 0.7 else L1


def spoiled(rng: Random, shape: list[int], often: float = 0.1) -> list[int]:
    """Return `shape`, or rarely one of another size along an axis or of another rank."""
    shape = list(shape)
    chance = rng.random()
    if chance < often * 0.7:
        shape[rng.randrange(len(shape))] = rng.choice((1, 2, 3, 31, 32, 33, 64, 128))
    elif chance < often * 0.85:
        del shape[0]
    elif chance < often:
        shape.insert(0, 1)
    return shape


def output(rng: Random, rows: int, width: int) -> dict[str, Value]:
    chance = rng.random()
    if chance < 0.25:
        return {"memory_config": rng.choice((L1, DRAM))}
    if chance < 0.3:
        count = rng.choice((1, 2, 4))
        shard = [up(-(-rows // count)), up(width)]
        return {"memory_config": sharded("HEIGHT", shard, cores(count))}
    if chance < 0.33:
        kind = rng.choice(("HEIGHT", "WIDTH"))
        return {"memory_config": attribute(f"L1_{kind}_SHARDED_MEMORY_CONFIG")}
    return {}


def kernel(rng: Random) -> dict[str, Value]:
    if rng.random() > 0.15:
        return {}
    fidelity = attribute(f"MathFidelity.{rng.choice(('LoFi', 'HiFi2', 'HiFi4'))}")
    accumulate = rng.random() < 0.5
    made_ = made("WormholeComputeKernelConfig", math_fidelity=fidelity, fp32_dest_acc_en=accumulate)
    return {"compute_kernel_config": made_}


# ---------------------------------------------------------------- heads


def _create(rng: Random) -> Case:
    heads, kv_heads, dim = rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 4)), rng.choice(WIDTHS)
    batch, tokens = rng.choice((1, 1, 1, 2)), rng.choice((1, 31, 32, 33, 64, 96, 128))
    shape = spoiled(rng, [batch, 1, tokens, (heads + 2 * kv_heads) * dim])
    options: dict[str, Any] = {"num_heads": heads}
    if kv_heads != heads or rng.random() < 0.5:
        options["num_kv_heads"] = kv_heads
    if rng.random() < 0.8:
        options["transpose_k_heads"] = rng.random() < 0.25
    if rng.random() < 0.03:
        options["num_heads"] = rng.choice((0, 3, -1))
    args = []
    place = flat(rng)
    if rng.random() < 0.1 and len(shape) == 4:
        place = sharded("HEIGHT", [up(shape[2]), up(shape[3])], cores(max(shape[0] * shape[1], 1)))
    if rng.random() < 0.08 and len(shape) == 4:
        shape[3] = heads * dim
        args = [operand(rng, [shape[0], 1, shape[2], 2 * kv_heads * dim], "bfloat16")]
    args.insert(0, operand(rng, shape, rng.choice(FLOATS), place))
    return Case(
        "experimental.nlp_create_qkv_heads", args, options | output(rng, batch * heads * up(tokens), dim)
    )


def _create_decode(rng: Random) -> Case:
    heads, kv_heads, dim = rng.choice((1, 2, 4, 8, 16, 33)), rng.choice((1, 2, 4)), rng.choice(WIDTHS)
    users = rng.choice((1, 2, 3, 8, 31, 32, 32, 33))
    width = (heads + 2 * kv_heads) * dim
    shape = spoiled(rng, [1, 1, users, width])
    options: dict[str, Any] = {"num_heads": heads}
    if kv_heads != heads or rng.random() < 0.5:
        options["num_kv_heads"] = kv_heads
    chance = rng.random()
    if chance < 0.7:
        options["memory_config"] = attribute("L1_HEIGHT_SHARDED_MEMORY_CONFIG")
    elif chance < 0.8:
        options["memory_config"] = sharded("HEIGHT", [32, dim], cores(users))
    elif chance < 0.85:
        options["memory_config"] = rng.choice((L1, DRAM, attribute("L1_WIDTH_SHARDED_MEMORY_CONFIG")))
    if rng.random() < 0.15:
        options["overlap_qk_coregrid"] = rng.random() < 0.5
    place = flat(rng)
    if rng.random() < 0.2 and len(shape) == 4:
        count = rng.choice([c for c in (1, 2, 3, 4, 8, 16) if shape[3] % (c * 32) == 0] or [1])
        place = sharded("WIDTH", [up(shape[2]) * shape[0] * shape[1], up(shape[3]) // count], cores(count))
    dtype = rng.choice(("bfloat16",) * 8 + ("float32",) * 2 + ("bfloat8_b",))
    return Case("experimental.nlp_create_qkv_heads_decode", [operand(rng, shape, dtype, place)], options)


def _concat(rng: Random) -> Case:
    batch, heads, dim = rng.choice((1, 1, 2)), rng.choice((1, 2, 4, 8)), rng.choice((*WIDTHS, 40))
    tokens = rng.choice((1, 31, 32, 33, 64, 96, 128))
    shape = spoiled(rng, [batch, heads, tokens, dim])
    place = flat(rng)
    if rng.random() < 0.12 and len(shape) == 4:
        rows = shape[0] * shape[1] * up(shape[2])
        count = rng.choice((1, 2, shape[0] * shape[1]))
        place = sharded("HEIGHT", [up(-(-rows // count)), up(shape[3])], cores(min(count, 56)))
    options = output(rng, batch * up(tokens), heads * dim)
    return Case("experimental.nlp_concat_heads", [operand(rng, shape, rng.choice(FLOATS), place)], options)


def _concat_decode(rng: Random) -> Case:
    users, heads, dim = (
        rng.choice((1, 2, 3, 8, 8, 9, 16, 31, 32)),
        rng.choice((1, 2, 4, 8, 16, 32)),
        rng.choice(WIDTHS),
    )
    shape = spoiled(rng, [1, users, heads, dim])
    height, width = up(shape[-2]), up(shape[-1])
    place = sharded("HEIGHT", [height, width], cores(users))
    chance = rng.random()
    if chance < 0.05:
        place = flat(rng)
    elif chance < 0.1:
        place = sharded("WIDTH", [users * height, width], cores(1))
    options: dict[str, Any] = {"num_heads": heads if rng.random() < 0.9 else rng.choice((1, 2, 32, 33, 0))}
    if rng.random() < 0.35:
        options["sub_core_grids"] = cores(rng.choice((users, users, heads, 32, 56)))
    if rng.random() < 0.06:
        options["memory_config"] = rng.choice((L1, DRAM, attribute("L1_WIDTH_SHARDED_MEMORY_CONFIG")))
    dtype = rng.choice(("bfloat16",) * 8 + ("float32",) * 2 + ("bfloat8_b",))
    return Case("experimental.nlp_concat_heads_decode", [operand(rng, shape, dtype, place)], options)


# ---------------------------------------------------------------- rotary embedding


def _rope(rng: Random, llama: bool) -> Case:
    decode = rng.random() < 0.45
    heads, dim = rng.choice((1, 2, 4, 8, 33)), rng.choice((*WIDTHS, 256))
    options: dict[str, Any] = {"is_decode_mode": decode} if decode or rng.random() < 0.7 else {}
    dtype = rng.choice(("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat8_b", "float32"))
    if decode:
        users = rng.choice((1, 2, 3, 8, 32))
        shapes = [[1, users, heads, dim], [1, users, 1, dim], [1, users, 1, dim]]
        places = [sharded("HEIGHT", [up(heads), dim], cores(users))] + [
            sharded("HEIGHT", [32, dim], cores(users))
        ] * 2
        mats, mat_place = [1, 1, 32 * users, 32], sharded("HEIGHT", [32, 32], cores(users))
    else:
        tokens = rng.choice((1, 31, 32, 33, 64, 128))
        positions = tokens if rng.random() < 0.6 else rng.choice((32, 64, 128, 256))
        cos_heads = 1 if rng.random() < 0.9 else heads
        shapes = [
            [rng.choice((1, 1, 1, 2)), heads, tokens, dim],
            [1, cos_heads, positions, dim],
            [1, cos_heads, positions, dim],
        ]
        places = [flat(rng)] * 3
        mats, mat_place = [1, 1, 32, 32], DRAM
    args = []
    for i, (shape, place) in enumerate(zip(shapes, places, strict=True)):
        changed = spoiled(rng, shape, 0.05)
        if rng.random() < 0.03:
            place = (
                flat(rng) if decode else sharded("HEIGHT", [up(shape[2]), dim], cores(shape[0] * shape[1]))
            )
        if "$call" in place and changed != shape:  # a shard that still fits
            changed = shape
        args.append(operand(rng, changed, dtype if i == 0 or rng.random() < 0.05 else "bfloat16", place))
    if llama:
        args.append(operand(rng, mats if rng.random() < 0.95 else [1, 1, 64, 64], "bfloat16", mat_place))
    name = "experimental.rotary_embedding_llama" if llama else "experimental.rotary_embedding_hf"
    rows = shapes[0][0] * shapes[0][1] * up(shapes[0][2])
    return Case(name, args, options | (output(rng, rows, dim) if rng.random() < 0.4 else {}) | kernel(rng))


def _rope_hf(rng: Random) -> Case:
    return _rope(rng, llama=False)


def _rope_llama(rng: Random) -> Case:
    return _rope(rng, llama=True)


GENERATORS = {
    "experimental.nlp_concat_heads": _concat,
    "experimental.nlp_concat_heads_decode": _concat_decode,
    "experimental.nlp_create_qkv_heads": _create,
    "experimental.nlp_create_qkv_heads_decode": _create_decode,
    "experimental.rotary_embedding_hf": _rope_hf,
    "experimental.rotary_embedding_llama": _rope_llama,
}
KNOWN: list[Known] = [
    stricter(
        "experimental.nlp_concat_heads|experimental.nlp_create_qkv_heads",
        "does not (split|join) a sharded",
        SHARDED,
    ),
    stricter(
        "experimental.nlp_concat_heads",
        "must be .batch, heads, tokens, head_dim",
        "Of a tensor with more axes ttnn joins the first four and drops the last.",
    ),
    stricter(
        "experimental.nlp_concat_heads_decode|experimental.nlp_create_qkv_heads",
        "num_heads .* for input|head_dim",
        "ttnn counts heads and head_dim in padded sizes; padding would be joined, or heads dropped.",
    ),
    stricter(
        "experimental.nlp_create_qkv_heads_decode",
        "does not place",
        "The emulator places decode's heads on the first cores, q and k on the same ones.",
    ),
    stricter(
        "experimental.rotary_embedding_.*",
        "cos (has|width)",
        "ttnn compares padded sizes; tokens or columns past those of cos would be rotated by undefined values.",
    ),
    stricter(
        "experimental.rotary_embedding_hf",
        "must have 4 axes|input is (u?int)",
        "The kernel reads four axes of floats; what ttnn does not check would be misread.",
    ),
    stricter(
        "experimental.rotary_embedding_.*",
        "does not choose the shards|output .* must be sharded as its input is",
        "Only an output placed as its input is holds each user's rows on its core.",
    ),
]
