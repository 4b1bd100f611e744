"""Where each user's tokens lie in a K or V cache, paged or plain.

A paged cache is a pool [blocks, kv_heads, block, head_dim] a chip and a page table that lists each user's blocks; a plain
one is [users, kv_heads, length, head_dim], which is a pool whose user u has block u. Both are stored with the heads first
and seen in pages of 32 tokens, [chips, kv_heads, pages, 32, head_dim], so that the pages of a user that are neighbours are
one piece of memory, and attention reads them without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from disagg_tt.device.emulator.ops.plan import emulated
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, defined
from disagg_tt.errors import DeviceError

PAGE = 32  # tokens
_SPREAD = 2.0  # users are attended one by one when padding them to the longest would cost more than this


@dataclass
class Addresses:
    """Where the tokens of some users lie: their pages in order, their positions and the mask of what they may see.

    Attributes:
        length: tokens to read a user, whole pages, the longest user's.
        pages: int64 [users, length / 32]; regular: (first page, pages from user to user) when that describes them.
        writes: (users, page, offset) int64 [active] each: where this step's K and V go.
        mask: float32 [users, 1, length] of 0 and -inf, or None when every user sees all `length` tokens.
        spread: the users' lengths differ so much that they are better attended one by one.
    """

    length: int
    pages: torch.Tensor
    regular: tuple[int, int] | None
    writes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    spread: bool
    positions: list[int]
    users: dict[int, Addresses]

    def gather(self, pool: torch.Tensor) -> torch.Tensor:
        """Return [chips, kv_heads, users, length, head_dim] of a pool [chips, kv_heads, pages, 32, head_dim]."""
        chips, heads, _, page, dim = pool.shape
        users = self.pages.shape[0]
        if self.regular is not None:
            first, step = self.regular
            s = pool.stride()
            shape = (chips, heads, users, self.length, dim)
            return pool.as_strided(
                shape, (s[0], s[1], step * s[2], s[3], s[4]), pool.storage_offset() + first * s[2]
            )
        picked = pool[:, :, self.pages.reshape(-1)]
        return picked.view(chips, heads, users, self.length, dim)

    def user(self, index: int) -> Addresses:
        """Return the addresses of one user alone."""
        if index not in self.users:
            row = self.pages[index : index + 1]
            self.users[index] = locate(row, [self.positions[index]])
        return self.users[index]


def locate(pages: torch.Tensor, positions: list[int]) -> Addresses:
    """Build the addresses of users whose pages are `pages` [users, n] and whose last positions are given (-1: none)."""
    longest = max(max(positions), 0)
    count = longest // PAGE + 1
    length = count * PAGE
    read = pages[:, :count]
    active = [u for u, p in enumerate(positions) if p >= 0]
    where = torch.tensor([positions[u] for u in active], dtype=torch.int64)
    users = torch.tensor(active, dtype=torch.int64)
    writes = (users, pages[users, where // PAGE], where % PAGE)
    mask = None
    if any(p != length - 1 for p in positions):
        seen = torch.tensor(positions).clamp(min=0)
        mask = torch.zeros(len(positions), 1, length)
        mask.masked_fill_(torch.arange(length) > seen[:, None, None], float("-inf"))
    first = read[:, :1]
    regular = None
    if torch.equal(read, first + torch.arange(count)):
        steps = (first[1:] - first[:-1]).reshape(-1).tolist()
        if not steps or (steps[0] >= 0 and all(s == steps[0] for s in steps)):
            regular = (int(first[0, 0]), int(steps[0]) if steps else 0)
    spread = (
        len(positions) > 1
        and longest >= 64
        and _SPREAD * sum(max(p, 0) for p in positions) < longest * len(positions)
    )
    return Addresses(length, read, regular, writes, mask, spread, positions, {})


def addresses(positions: Tensor | Sequence[int], page_table: Tensor | None, cache: Spec) -> Addresses:
    """Return the addresses for this step, derived once for all layers; raises DeviceError for a page outside the cache.

    `positions` are an integer tensor [users], or given by value; without a page table user u has row u of the cache.
    """
    if not isinstance(positions, Tensor):
        return _addresses([int(p) for p in positions], page_table, cache)
    store = positions._values
    table = None if page_table is None else page_table._values.data
    if store.memo is None:
        store.memo = {}
    key = ("addresses", id(table), cache.shape[0], cache.shape[2])
    known = store.memo.get(key)
    if known is None:
        if store.data is None:
            raise DeviceError("positions were allocated but never written; write them before they are used")
        known = _addresses(store.data.reshape(store.data.shape[0], -1)[0].tolist(), page_table, cache)
        store.memo = {key: known, "keep": table}
    return known


def _addresses(where: list[int], page_table: Tensor | None, cache: Spec) -> Addresses:
    blocks, block = cache.shape[0], cache.shape[2]
    if page_table is None:
        rows = (
            torch.arange(len(where))[:, None] if blocks > 1 else torch.zeros(len(where), 1, dtype=torch.int64)
        )
    else:
        data = page_table._values.data
        if data is None:
            raise DeviceError("the page table was allocated but never written; write it before it is used")
        rows = data.reshape(data.shape[0], *page_table.shape)[0]
    limit = rows.shape[1] * block
    if max(where) >= limit:
        owner = "cache's" if page_table is None else "page table's"
        raise DeviceError(
            f"position {max(where)} is past the {owner} {limit} tokens a user; end the request earlier"
        )
    used = rows[:, : max(max(where), 0) // block + 1]
    if int(used.min()) < 0 or int(used.max()) >= blocks:
        raise DeviceError(
            f"page table points to block {int(used.max())} (or {int(used.min())}); the pool has blocks 0..{blocks - 1}"
        )
    return locate(in_pages(rows, block), where)


def in_pages(blocks: torch.Tensor, block: int) -> torch.Tensor:
    """Return the 32-token pages [users, n * block / 32] of blocks [users, n]."""
    each = block // PAGE
    if each == 1:
        return blocks
    return (blocks[:, :, None] * each + torch.arange(each)).flatten(1)


def need_pages(op: str, cache: Spec) -> None:
    """A cache must hold whole pages."""
    emulated(
        cache.shape[2] % PAGE == 0,
        op,
        f"hold a cache of {cache.shape[2]} tokens a block, {cache!r}; give it a multiple of {PAGE}",
    )


def as_pool(values: Values) -> torch.Tensor:
    """Return a cache as [chips, kv_heads, pages, 32, head_dim], stored in that order from the first use on."""
    data = values.data
    assert data is not None, "make_writable, or a test for undefined values, comes first"
    pool = data.transpose(1, 2)
    if not pool.is_contiguous():
        pool = pool.contiguous()
        values.data, values.private = pool.transpose(1, 2), True
    if pool.shape[3] == PAGE:
        return pool
    return pool.view(*pool.shape[:2], -1, PAGE, pool.shape[4])


def make_writable(tensor: Tensor, chips: int) -> None:
    """Give a cache values for at least `chips` chips, in memory that no other tensor shares."""
    values = tensor._values
    if not values.private or values.data.shape[0] < chips:  # type: ignore[union-attr]
        data = defined(values.data, tensor.spec)
        data = data.expand(max(chips, data.shape[0]), *data.shape[1:]).transpose(1, 2)
        values.data, values.private = data.clone(memory_format=torch.contiguous_format).transpose(1, 2), True
