"""The paged K/V cache ops, and where each user's tokens lie in the pools.

A pool is [blocks, kv_heads, 32, head_dim] a chip. The emulator stores it with the heads before the blocks, so that the
pages of a user that are neighbours are one piece of memory, and attention reads them without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch_in_place
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, defined
from disagg_tt.device.emulator.types import DataType, Layout
from disagg_tt.errors import DeviceError

_SPREAD = 2.0  # users are attended one by one when padding them to the longest would cost more than this


@dataclass
class Addresses:
    """Where the tokens of some users lie: their pages in order, their positions and the mask of what they may see.

    Attributes:
        length: tokens to read a user, whole blocks, the longest user's.
        blocks: int64 [users, length / 32]; regular: (first block, blocks from user to user) when that describes them.
        writes: (users, block, offset) int64 [active] each: where this step's K and V go.
        mask: float32 [users, 1, length] of 0 and -inf, or None when every user sees all `length` tokens.
        spread: the users' lengths differ so much that they are better attended one by one.
    """

    length: int
    blocks: torch.Tensor
    regular: tuple[int, int] | None
    writes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    spread: bool
    positions: list[int]
    users: dict[int, Addresses]

    def gather(self, pool: torch.Tensor) -> torch.Tensor:
        """Return [chips, kv_heads, users, length, head_dim] of a pool [chips, kv_heads, blocks, 32, head_dim]."""
        chips, heads, _, block, dim = pool.shape
        users = self.blocks.shape[0]
        if self.regular is not None:
            first, step = self.regular
            s = pool.stride()
            shape = (chips, heads, users, self.length, dim)
            return pool.as_strided(
                shape, (s[0], s[1], step * s[2], s[3], s[4]), pool.storage_offset() + first * s[2]
            )
        picked = pool[:, :, self.blocks.reshape(-1)]
        return picked.view(chips, heads, users, self.length, dim)

    def user(self, index: int) -> Addresses:
        """Return the addresses of one user alone."""
        if index not in self.users:
            row = self.blocks[index : index + 1]
            self.users[index] = _locate(row, [self.positions[index]])
        return self.users[index]


def _locate(pages: torch.Tensor, positions: list[int]) -> Addresses:
    """Build the addresses of users whose page table rows are `pages` [users, n] and whose positions are given."""
    longest = max(max(positions), 0)
    count = longest // 32 + 1
    length = count * 32
    blocks = pages[:, :count]
    active = [u for u, p in enumerate(positions) if p >= 0]
    where = torch.tensor([positions[u] for u in active], dtype=torch.int64)
    users = torch.tensor(active, dtype=torch.int64)
    writes = (users, pages[users, where // 32], where % 32)
    mask = None
    if any(p != length - 1 for p in positions):
        seen = torch.tensor(positions).clamp(min=0)
        mask = torch.zeros(len(positions), 1, length)
        mask.masked_fill_(torch.arange(length) > seen[:, None, None], float("-inf"))
    first = blocks[:, :1]
    regular = None
    if torch.equal(blocks, first + torch.arange(count)):
        steps = (first[1:] - first[:-1]).reshape(-1).tolist()
        if not steps or (steps[0] >= 0 and all(s == steps[0] for s in steps)):
            regular = (int(first[0, 0]), int(steps[0]) if steps else 0)
    spread = (
        len(positions) > 1
        and longest >= 64
        and _SPREAD * sum(max(p, 0) for p in positions) < longest * len(positions)
    )
    return Addresses(length, blocks, regular, writes, mask, spread, positions, {})


def addresses(positions: Tensor, page_table: Tensor, blocks: int) -> Addresses:
    """Return the addresses for this step, derived once for all layers; raises DeviceError for a page outside the pool."""
    store, table = positions._values, page_table._values
    if store.memo is None:
        store.memo = {}
    key = ("addresses", id(table.data), blocks)
    known = store.memo.get(key)
    if known is None:
        if store.data is None or table.data is None:
            raise DeviceError(
                "positions or page table were allocated but never written; write them before they are used"
            )
        where = store.data.reshape(store.data.shape[0], -1)[0].tolist()
        pages = table.data.reshape(table.data.shape[0], *page_table.shape)[0]
        limit = pages.shape[1] * 32
        if max(where) >= limit:
            raise DeviceError(
                f"position {max(where)} is past the page table's {limit} tokens a user; end the request earlier"
            )
        known = _locate(pages, where)
        used = known.blocks
        if int(used.min()) < 0 or int(used.max()) >= blocks:
            raise DeviceError(
                f"page table points to block {int(used.max())} (or {int(used.min())}); the pool has blocks 0..{blocks - 1}"
            )
        store.memo = {key: known, "keep": table.data}
    return known


def as_pool(values: Values) -> torch.Tensor:
    """Return the pool as [chips, kv_heads, blocks, 32, head_dim], stored in that order from the first use on."""
    pool = values.data.transpose(1, 2)  # type: ignore[union-attr]
    if not pool.is_contiguous():
        pool = pool.contiguous()
        values.data, values.private = pool.transpose(1, 2), True
    return pool


def _writable_pool(tensor: Tensor, chips: int) -> torch.Tensor:
    """Return the pool as `as_pool` does, of at least `chips` chips, and in memory that no other tensor shares."""
    values = tensor._values
    if not values.private or values.data.shape[0] < chips:  # type: ignore[union-attr]
        data = defined(values.data, tensor.spec)
        data = data.expand(max(chips, data.shape[0]), *data.shape[1:]).transpose(1, 2)
        values.data, values.private = data.clone(memory_format=torch.contiguous_format).transpose(1, 2), True
    return as_pool(values)


@lru_cache(maxsize=1024)
def _fill_check(cache: Spec, values: Spec, pages: Spec) -> None:
    op = "paged_fill_cache"
    need_tile(op, cache=cache, input=values)
    need(
        cache.dtype is values.dtype,
        op,
        f"input is {values.dtype.value}, the cache {cache.dtype.value}; typecast to the cache's dtype",
    )
    need_dtype(op, "page table", pages, DataType.INT32)
    need(pages.layout is Layout.ROW_MAJOR, op, "the page table must be ROW_MAJOR")
    same = values.shape[0] == 1 and values.shape[1] == cache.shape[1] and values.shape[3] == cache.shape[3]
    need(same, op, f"input {list(values.shape)} for a cache {list(cache.shape)}")
    room = pages.shape[1] * cache.shape[2]
    need(
        values.padded_shape[2] <= room,
        op,
        f"{values.padded_shape[2]} tokens for a page table of {room} tokens a user",
    )


def paged_fill_cache(
    cache_tensor: Tensor, input_tensor: Tensor, page_table_tensor: Tensor, *, batch_idx: int
) -> Tensor:
    """Write input [1, kv_heads, S, D] from token 0 of user `batch_idx`, padding rows included, in place."""
    _fill_check(cache_tensor.spec, input_tensor.spec, page_table_tensor.spec)
    need(0 <= batch_idx < page_table_tensor.shape[0], "paged_fill_cache",
         f"batch_idx {batch_idx}; the page table has users 0..{page_table_tensor.shape[0] - 1}")  # fmt: skip

    def compute(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        pool = _writable_pool(cache_tensor, values.shape[0])
        tokens = values.shape[3]
        blocks = table.reshape(-1, table.shape[-1])[batch_idx, : -(-tokens // 32)]
        if int(blocks.min()) < 0 or int(blocks.max()) >= pool.shape[2]:
            raise DeviceError(
                f"paged_fill_cache: page {int(blocks.max())} (or {int(blocks.min())}) is outside the pool's "
                f"{pool.shape[2]} blocks"
            )
        if tokens % 32:
            values = torch.nn.functional.pad(values, (0, 0, 0, 32 - tokens % 32))
        pool[:, :, blocks] = values.reshape(values.shape[0], values.shape[2], -1, 32, values.shape[4])
        return pool.transpose(1, 2)

    launch_in_place("paged_fill_cache", cache_tensor, compute, input_tensor, page_table_tensor)
    return cache_tensor


@lru_cache(maxsize=1024)
def _update_check(cache: Spec, values: Spec, positions: Spec, pages: Spec) -> None:
    op = "paged_update_cache"
    need_tile(op, cache=cache, input=values)
    need_dtype(op, "input", values, DataType.BFLOAT16, DataType.FLOAT32)
    need(values.memory_config.is_sharded(), op, f"input {values!r} must be sharded, one user a core")
    need_dtype(op, "update_idxs", positions, DataType.INT32)
    users = values.shape[1]
    need(positions.shape == (users,), op, f"update_idxs {list(positions.shape)}; it must be [{users}]")
    need_dtype(op, "page table", pages, DataType.INT32)
    need(pages.shape[0] == users, op, f"page table for {pages.shape[0]} users, input for {users}")
    need(
        pages.shape[1] <= cache.shape[0],
        op,
        f"page table of {pages.shape[1]} blocks a user for a pool of {cache.shape[0]}",
    )
    need(
        values.shape[2:] == (cache.shape[1], cache.shape[3]),
        op,
        f"input {list(values.shape)} for a cache {list(cache.shape)}",
    )


def paged_update_cache(
    cache_tensor: Tensor, input_tensor: Tensor, *, update_idxs_tensor: Tensor, page_table: Tensor
) -> Tensor:
    """Write each user's one token [1, users, kv_heads, D] at its position (-1 skips), repacked to the cache's dtype."""
    _update_check(cache_tensor.spec, input_tensor.spec, update_idxs_tensor.spec, page_table.spec)
    dtype = cache_tensor.dtype

    def compute(values: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        pool = _writable_pool(cache_tensor, values.shape[0])
        users, block, offset = addresses(update_idxs_tensor, page_table, pool.shape[2]).writes
        values = values[:, 0] if len(users) == values.shape[2] else values[:, 0, users]
        if dtype is not DataType.BFLOAT16:
            values = round_on_device(values, dtype)
        pool[:, :, block, offset] = values.transpose(1, 2)
        return pool.transpose(1, 2)

    launch_in_place("paged_update_cache", cache_tensor, compute, input_tensor, update_idxs_tensor, page_table)
    return cache_tensor
