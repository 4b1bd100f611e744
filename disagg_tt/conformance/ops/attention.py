"""Cases of attention: prefill and decode, paged and plain, geometry, positions, dtypes, placement."""

from __future__ import annotations

from random import Random
from typing import Any

from disagg_tt.conformance.case import DRAM, L1, Case, Value, cores, integers, made, sharded
from disagg_tt.conformance.known import ARGUMENT, Known, stricter
from disagg_tt.conformance.ops.heads import FLOATS, INDICES, flat, kernel, operand, output, spoiled, up


def _config(rng: Random, often: float = 0.4) -> dict[str, Value]:
    if rng.random() > often:
        return {}
    grid = made("CoreCoord", 8, rng.choice((7, 7, 7, 7, 1, 8)))
    sizes = {
        name: rng.choice((32, 32, 32, 64, 64, 64, 64, 128, 128, 256, 0))
        for name in ("q_chunk_size", "k_chunk_size")
    }
    more = {"exp_approx_mode": rng.random() < 0.5} if rng.random() < 0.3 else {}
    return {"program_config": made("SDPAProgramConfig", compute_with_storage_grid_size=grid, **sizes, **more)}


def _scale(rng: Random) -> dict[str, Value]:
    return {"scale": rng.choice((0.125, 1.0, 1, 0.1))} if rng.random() < 0.3 else {}


def _sdpa(rng: Random) -> Case:
    heads = rng.choice((1, 2, 4, 8))
    kv_heads = rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    batch, dim, tokens = (
        rng.choice((1, 1, 1, 2, 3)),
        rng.choice((32, 64, 64, 128, 40)),
        rng.choice((1, 31, 32, 33, 64, 96, 128, 256)),
    )
    keys = tokens if rng.random() < 0.85 else rng.choice((32, 64, 128))
    q, kv = [batch, heads, tokens, dim], [batch, kv_heads, keys, dim]
    options: dict[str, Any] = {}
    causal = rng.random() < 0.65
    if not causal or rng.random() < 0.5:
        options["is_causal"] = causal
    if rng.random() < (0.05 if causal else 0.5):
        mask = [rng.choice((batch, 1)), rng.choice((heads, 1, 1, 1)), tokens, keys]
        dtype = rng.choice(("bfloat16", "bfloat16", "bfloat16", "bfloat8_b", "bfloat4_b", "float32"))
        options["attn_mask"] = operand(rng, spoiled(rng, mask, 0.08), dtype)
    options |= _scale(rng) | _config(rng) | kernel(rng) | output(rng, batch * heads * up(tokens), dim)
    if rng.random() < 0.08:
        options["output_concat_heads"] = rng.random() < 0.7
    if rng.random() < 0.04:
        options["sliding_window_size"] = rng.choice((32, 64, 5))
    args = []
    dtype = rng.choice(FLOATS)
    for shape in (q, kv, kv):
        place = flat(rng)
        if rng.random() < 0.01:
            place = sharded("HEIGHT", [up(shape[2]), up(dim)], cores(shape[0] * shape[1]))
        kind = dtype if rng.random() < 0.8 else rng.choice(FLOATS)
        args.append(operand(rng, spoiled(rng, shape, 0.04) if place in (DRAM, L1) else shape, kind, place))
    return Case("transformer.scaled_dot_product_attention", args, options)


def _chunked(rng: Random) -> Case:
    heads = rng.choice((1, 2, 4, 8))
    kv_heads = rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    batch, dim, tokens = (
        rng.choice((1, 1, 1, 2)),
        rng.choice((32, 64, 128)),
        rng.choice((32, 64, 64, 96, 128, 33)),
    )
    block, pages = rng.choice((32, 32, 64)), rng.choice((2, 4, 8))
    pool = [batch * pages, kv_heads, block, dim]
    table = [[u * pages + p for p in range(pages)] for u in range(batch)]
    start: Any = rng.choice((0, 0, 0, 0, 64, 128, 128, 32, 16, -32))
    args: list[Value] = [
        operand(rng, spoiled(rng, [batch, heads, tokens, dim], 0.05), rng.choice(FLOATS), flat(rng))
    ]
    dtype = rng.choice(FLOATS)
    args += [
        operand(rng, spoiled(rng, pool, 0.03), dtype if rng.random() < 0.95 else rng.choice(FLOATS))
        for _ in range(2)
    ]
    args.append(integers(table, rng.choice(INDICES)))
    options: dict[str, Any] = {}
    chance = rng.random()
    if chance < 0.8:
        args.append(start)
    elif chance < 0.95:
        options["chunk_start_idx_tensor"] = integers([max(start, 0)], rng.choice(INDICES))
    options |= _scale(rng) | _config(rng, 0.7) | kernel(rng) | output(rng, batch * heads * up(tokens), dim)
    return Case("transformer.chunked_scaled_dot_product_attention", args, options)


def _queries(rng: Random, users: int, heads: int, dim: int) -> Value:
    place = flat(rng)
    if rng.random() < 0.5:
        place = sharded("HEIGHT", [up(heads), dim], cores(users))
    dtype = rng.choice(("bfloat16",) * 8 + ("bfloat8_b", "float32", "bfloat4_b"))
    shape = [1, users, heads, dim]
    return operand(rng, spoiled(rng, shape, 0.05) if place in (DRAM, L1) else shape, dtype, place)


def _decode_options(rng: Random, users: int, heads: int, dim: int) -> dict[str, Value]:
    options = _scale(rng) | _config(rng, 0.3) | kernel(rng)
    if rng.random() < 0.3:
        options |= output(rng, users * up(heads), dim)
    if rng.random() < 0.03:
        options["sliding_window_size"] = rng.choice((32, 64))
    if rng.random() < 0.5:
        options["is_causal"] = rng.random() < 0.9
    return options


def _paged_decode(rng: Random) -> Case:
    heads = rng.choice((1, 2, 4, 8, 16))
    kv_heads = rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0]) if rng.random() < 0.95 else 3
    users, dim = rng.choice((1, 2, 3, 8, 32)), rng.choice((32, 64, 64, 128))
    block, pages = rng.choice((32, 32, 32, 64, 128, 16)), rng.choice((1, 2, 4, 8))
    pool = [users * pages + rng.choice((0, 1)), kv_heads, block, dim]
    dtype = rng.choice(FLOATS)
    pools = [
        operand(rng, spoiled(rng, pool, 0.04), dtype if rng.random() < 0.95 else rng.choice(FLOATS))
        for _ in range(2)
    ]
    rows = users if rng.random() < 0.95 else users + 1
    table = integers([[u * pages + p for p in range(pages)] for u in range(rows)], rng.choice(INDICES))
    options = _decode_options(rng, users, heads, dim)
    if rng.random() < 0.96:
        count = users if rng.random() < 0.95 else users + 1
        positions = [rng.choice((-1, 0, rng.randrange(pages * block))) for _ in range(count)]
        options["cur_pos_tensor"] = integers(
            positions if rng.random() < 0.95 else [positions], rng.choice(INDICES)
        )
    args = [_queries(rng, users, heads, dim), *pools, table]
    return Case("transformer.paged_scaled_dot_product_attention_decode", args, options)


def _decode(rng: Random) -> Case:
    heads = rng.choice((1, 2, 4, 8, 16))
    kv_heads = rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0]) if rng.random() < 0.95 else 3
    users, dim = rng.choice((1, 2, 3, 8, 32)), rng.choice((32, 64, 64, 128))
    length = rng.choice((32, 64, 96, 128, 160, 256, 100))
    cache = [users, kv_heads, length, dim]
    dtype = rng.choice(FLOATS)
    caches = [
        operand(rng, spoiled(rng, cache, 0.04), dtype if rng.random() < 0.95 else rng.choice(FLOATS))
        for _ in range(2)
    ]
    options = _decode_options(rng, users, heads, dim)
    count = users if rng.random() < 0.95 else users + 1
    positions = [rng.choice((-1, 0, rng.randrange(length))) for _ in range(count)]
    chance = rng.random()
    if chance < 0.7:
        options["cur_pos_tensor"] = integers(
            positions if rng.random() < 0.95 else [positions], rng.choice(INDICES)
        )
    elif chance < 0.95:
        options["cur_pos"] = positions
    return Case(
        "transformer.scaled_dot_product_attention_decode",
        [_queries(rng, users, heads, dim), *caches],
        options,
    )


GENERATORS = {
    "transformer.chunked_scaled_dot_product_attention": _chunked,
    "transformer.paged_scaled_dot_product_attention_decode": _paged_decode,
    "transformer.scaled_dot_product_attention": _sdpa,
    "transformer.scaled_dot_product_attention_decode": _decode,
}
KNOWN: list[Known] = [
    stricter(
        "transformer.*",
        "the emulator does not (shard its output|attend without is_causal|take (sliding_window_size|attn_mask|share_cache))",
        ARGUMENT,
    ),
    stricter(
        "transformer.*",
        "does not hold a cache of",
        "A block of other than a multiple of 32 tokens has rows of padding that ttnn counts as tokens.",
    ),
    stricter(
        "transformer.chunked.*",
        r"k \[.*\] and v \[.*\] differ",
        "ttnn does not compare the caches of k and v; blocks that one of them lacks would be read past its end.",
    ),
    stricter(
        "transformer.*decode",
        "must be .1, users|cur_pos is uint16|cur_pos .*; it must be|position .* of a cache|positions for|for a page table of|k as v|over a cache",
        "ttnn does not compare the number and kind of the positions, or the caches, with q in this form; the kernel would misread.",
    ),
]
