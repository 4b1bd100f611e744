"""Cases of the K/V cache ops, paged and plain: geometry, positions, page tables, dtypes, sharding."""

from __future__ import annotations

from random import Random
from typing import Any

from disagg_tt.conformance.case import DRAM, L1, Case, Value, cores, integers, sharded, tensor
from disagg_tt.conformance.known import Known, stricter

CACHES = ("bfloat16", "bfloat16", "bfloat8_b", "bfloat8_b", "bfloat4_b", "float32")
OTHERS = ("uint32", "int32", "uint16")
INDICES = ("int32",) * 18 + ("uint32", "uint16")


def _operand(rng: Random, shape: list[int], dtype: str, memory: Value = DRAM) -> Value:
    """Return a tensor in TILE layout, rarely one that is wrong in some way."""
    layout, on = "TILE", "device"
    chance = rng.random()
    if chance < 0.015:
        dtype = rng.choice(OTHERS)
    elif chance < 0.03 and not dtype.endswith("_b"):
        layout = "ROW_MAJOR"
    elif chance < 0.045:
        on = rng.choice(("host", "freed"))
    return tensor(shape, dtype, layout, memory, on)


def _heads_sharded(rng: Random, users: int, width: int, height: int = 32) -> Value:
    """Return one user a core, as nlp_create_qkv_heads_decode places its outputs; rarely something else."""
    chance = rng.random()
    if chance < 0.05:
        return rng.choice((DRAM, L1))
    if chance < 0.08:
        return sharded("WIDTH", [users * height, 32], cores(max(width // 32, 1)))
    if chance < 0.11:
        return sharded("HEIGHT", [height * 2, width], cores(-(-users // 2)))
    return sharded("HEIGHT", [height, width], cores(users))


def _table(rng: Random, users: int, pages: int, blocks: int) -> Value:
    """Return a page table [users, pages]; undefined values are zeros or garbage on the mock, so written ones."""
    values = [[(u * pages + p) % blocks for p in range(pages)] for u in range(users)]
    return integers(values, rng.choice(INDICES))


def _paged_update(rng: Random) -> Case:
    users, heads = rng.choice((1, 2, 3, 8, 32)), rng.choice((1, 2, 4, 8))
    width, block = rng.choice((32, 64, 64, 128)), rng.choice((32, 32, 32, 64, 16))
    pages = rng.choice((1, 2, 4))
    paged = rng.random() < 0.75
    blocks = rng.choice((users * pages, users * pages, users * pages + 3, 2)) if paged else users
    cache = [blocks, heads, block if paged else rng.choice((32, 64, 128)), width]
    values = [1, users, rng.choice((heads, heads, heads, heads, 1)), width]
    chance = rng.random()
    if chance < 0.03:
        values[-1] = rng.choice((32, 64, 96))
    elif chance < 0.06:
        values = rng.choice(
            ([1, 1, users, width], [users, heads, 1, width], [2, users, heads, width], values[1:])
        )
    elif chance < 0.08:
        cache = rng.choice((cache[1:], [1, *cache]))
    room = pages * block if paged else cache[2]
    options: dict[str, Any] = {}
    count = users if rng.random() < 0.93 else rng.choice((1, users + 1))
    positions = [rng.choice((-1, 0, rng.randrange(max(room, 1)))) for _ in range(count)]
    if rng.random() < 0.85:
        nested: Any = positions if rng.random() < 0.95 else [positions]
        options["update_idxs_tensor"] = integers(nested, rng.choice(INDICES))
    elif rng.random() < 0.8:
        options["update_idxs"] = [max(p, 0) for p in positions]
    if paged:
        options["page_table"] = _table(
            rng, users if rng.random() < 0.95 else users + 1, pages, max(blocks, 1)
        )
    if rng.random() < 0.06:
        options["batch_offset"] = rng.choice((0, 0, 1))
    if rng.random() < 0.04:
        options["share_cache"] = rng.random() < 0.3
    place = _heads_sharded(rng, users, values[-1])
    dtype = rng.choice(("bfloat16",) * 8 + ("float32",) * 2 + ("bfloat8_b",))
    args = [_operand(rng, cache, rng.choice(CACHES)), _operand(rng, values, dtype, place)]
    return Case("experimental.paged_update_cache", args, options)


def _paged_fill(rng: Random) -> Case:
    users, heads = rng.choice((1, 2, 4, 32)), rng.choice((1, 2, 4))
    width, block, pages = (
        rng.choice((32, 64, 128)),
        rng.choice((32, 32, 32, 64, 128, 16)),
        rng.choice((1, 2, 4)),
    )
    tokens = rng.choice((1, 31, 32, 33, 64, 96, 128, 256))
    dtype = rng.choice(CACHES)
    cache, values = [users * pages + rng.choice((0, 3)), heads, block, width], [1, heads, tokens, width]
    chance = rng.random()
    if chance < 0.1:
        values[rng.randrange(4)] = rng.choice((1, 2, 3, 32, 64))
    elif chance < 0.13:
        values = values[1:]
    elif chance < 0.15:
        cache = cache[1:]
    other = dtype if rng.random() < 0.9 else rng.choice(CACHES)
    place = DRAM if rng.random() < 0.8 else L1
    if rng.random() < 0.06 and len(values) == 4:
        place = sharded("HEIGHT", [-(-values[2] // 32) * 32, values[3]], cores(values[0] * values[1]))
    args = [
        _operand(rng, cache, dtype),
        _operand(rng, values, other, place),
        _table(rng, users, pages, users * pages),
    ]
    options: dict[str, Any] = {}
    if rng.random() < 0.8:
        options["batch_idx"] = rng.randrange(users) if rng.random() < 0.9 else rng.choice((users, -1))
    elif rng.random() < 0.7:
        options["batch_idx_tensor"] = integers([rng.randrange(users)], rng.choice(INDICES))
    return Case("experimental.paged_fill_cache", args, options)


def _fill(rng: Random, op: str = "fill_cache") -> Case:
    users, heads, length = rng.choice((1, 2, 32)), rng.choice((1, 2, 4)), rng.choice((32, 64, 128, 100))
    width, tokens = rng.choice((32, 64, 100, 128)), rng.choice((1, 31, 32, 33, 64, 128, 160))
    dtype = rng.choice(CACHES)
    cache, values = [users, heads, length, width], [1, heads, tokens, width]
    chance = rng.random()
    if chance < 0.1:
        values[rng.randrange(4)] = rng.choice((1, 2, 3, 32, 64))
    elif chance < 0.13:
        values = values[1:]
    elif chance < 0.15:
        cache = cache[1:]
    other = dtype if rng.random() < 0.85 else rng.choice(CACHES)
    place = DRAM if rng.random() < 0.8 else L1
    if rng.random() < 0.1 and len(values) == 4:
        rows = values[0] * values[1] * -(-values[2] // 32) * 32
        place = sharded("HEIGHT", [32, -(-values[3] // 32) * 32], cores(min(rows // 32, 56)))
    args = [_operand(rng, cache, dtype), _operand(rng, values, other, place)]
    index: Any = rng.randrange(users) if rng.random() < 0.9 else rng.choice((users, users + 5, -1))
    options = {}
    if rng.random() < 0.3:
        options["update_idx"] = rng.choice((0, 32, 32, 64, 96, 16, 1, 128))
    return Case(op, [*args, index], options)


def _fill_for_user(rng: Random) -> Case:
    return _fill(rng, "kv_cache.fill_cache_for_user_")


def _update(rng: Random, op: str = "update_cache") -> Case:
    users, heads, length = rng.choice((1, 2, 8, 32)), rng.choice((1, 2, 4)), rng.choice((32, 64, 128))
    width, dtype = rng.choice((32, 64, 128)), rng.choice(CACHES)
    cache, values = [users, heads, length, width], [1, heads, rng.choice((users, 32)), width]
    chance = rng.random()
    if chance < 0.1:
        values[2] = rng.choice((1, 32, 33, 8))
    elif chance < 0.2:
        values[rng.randrange(4)] = rng.choice((1, 2, 3, 32, 64))
    elif chance < 0.23:
        values = values[1:]
    elif chance < 0.25:
        cache = cache[1:]
    place = DRAM if rng.random() < 0.7 else L1
    if rng.random() < 0.2 and len(values) == 4:
        place = sharded("HEIGHT", [32, values[3]], cores(values[1]))
    other = rng.choice(("bfloat16", "bfloat16", "bfloat16", "float32", dtype))
    args = [_operand(rng, cache, dtype), _operand(rng, values, other, place)]
    index: Any = rng.randrange(length) if rng.random() < 0.9 else rng.choice((length, length + 32, -1))
    options: dict[str, Any] = {}
    if op == "update_cache":
        if rng.random() < 0.3:
            options["batch_offset"] = rng.choice((0, 0, 1, 8, 32))
        return Case(op, [*args, index], options)
    return Case(op, [*args, index, rng.choice((0, 0, 0, 1, 8))], options)


def _update_for_token(rng: Random) -> Case:
    return _update(rng, "kv_cache.update_cache_for_token_")


GENERATORS = {
    "experimental.paged_fill_cache": _paged_fill,
    "experimental.paged_update_cache": _paged_update,
    "fill_cache": _fill,
    "kv_cache.fill_cache_for_user_": _fill_for_user,
    "kv_cache.update_cache_for_token_": _update_for_token,
    "update_cache": _update,
}
KNOWN: list[Known] = [
    stricter(
        "experimental.paged_fill_cache|experimental.paged_update_cache",
        "does not hold a cache of",
        "A block of other than a multiple of 32 tokens has rows of padding that ttnn counts as tokens.",
    ),
    stricter(
        "experimental.paged_fill_cache",
        "does not see a cache",
        "ttnn lets a call see the cache's blocks with other heads and head_dim of the same size; the emulator has one view.",
    ),
    stricter(
        "experimental.paged_fill_cache",
        "must be in TILE layout",
        "The kernel copies tiles; a ROW_MAJOR tensor, which ttnn does not reject, would be scrambled.",
    ),
    stricter(
        "experimental.paged_update_cache",
        "heads and head_dim must be the same|must have 4 axes",
        "ttnn compares tiles, not heads: heads that the cache lacks are dropped, missing ones or axes are misread.",
    ),
    stricter(
        "experimental.paged_update_cache",
        "update_idxs reach|update_idxs .* must be ROW_MAJOR",
        "ttnn does not check the position; past the cache's length it writes into another user's tokens.",
    ),
    stricter(
        "update_cache|kv_cache.update_cache_for_token_",
        "rows .* of an input of",
        "ttnn lets batch_offset reach into the input's padding, whose values are undefined.",
    ),
    stricter(
        "update_cache|kv_cache.update_cache_for_token_",
        "update_idx .*; the cache holds",
        "ttnn does not check the position; past the cache's length it writes into another user's tokens.",
    ),
    stricter(
        "fill_cache|update_cache|kv_cache.*",
        "input .* for a cache",
        "ttnn compares padded sizes; where the logical head_dim differs, padding would be stored as values.",
    ),
]
