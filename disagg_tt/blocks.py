"""Which cache block of one mesh holds what: a pool of blocks, found again by the tokens that they were computed from.

A block holds K and V of BLOCK tokens in every layer. They depend on those tokens and on all before them, so a full block
is named by a hash chain over the token ids themselves: an edited history shares exactly its unchanged prefix.

                 allocate                register                      release
    free ──────────────────► in use ──────────────────► in use, findable ──────► cached, findable
      ▲                        │                                 ▲                   │      │
      └──────── release ───────┘                                 └───── match ───────┘      │
      └──────────────────────────────── allocate, when none is free: evicted ◄──────────────┘

Only `register` makes a block findable, and its caller vouches that the block's K and V are complete in every layer. A
request that fails, is cancelled or loses its transfer halfway just releases: what it had not registered is free at once
and can never be matched, whatever was written there.

No tensor is touched here: the pool counts, the cache (cache.py) holds. It belongs to one thread.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 32  # tokens

_pack = struct.Struct(f"<{BLOCK}I").pack


def extend(hashes: list[bytes], tokens: Sequence[int]) -> None:
    """Append to `hashes`, the chain of the first blocks of `tokens`, those of the full blocks that it lacks."""
    for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashes[-1] if hashes else b""
        block = _pack(*tokens[start : start + BLOCK])
        hashes.append(hashlib.blake2b(parent + block, digest_size=16).digest())


def chain(tokens: Sequence[int]) -> list[bytes]:
    """Return 16 bytes for each full block of `tokens`, each over the one before and the block's 32 token ids.

    A cryptographic hash: the tokens come from users, who must not be able to make two prompts that collide.
    """
    hashes: list[bytes] = []
    extend(hashes, tokens)
    return hashes


class BlockPool:
    """The blocks 0 .. `blocks` - 1 of a mesh. ValueError for a call that breaks the rules above: a bug of the caller."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._free = list(reversed(range(blocks)))  # a stack
        self._holders = [0] * blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, held by none; the next to evict first

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that can be found and that nobody holds: kept for reuse alone."""
        return len(self._idle)

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `hashes`, without taking hold of them."""
        found: list[int] = []
        for digest in hashes:
            if (block := self._block_of.get(digest)) is None:
                break
            found.append(block)
        return found

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `hashes`, held once more; they are shared, never written."""
        found = self.lookup(hashes)
        for block in found:
            self._holders[block] += 1
            self._idle.pop(block, None)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` blocks for the caller alone, or None, with nothing changed, when fewer are available.

        Free ones first; then cached ones that nobody holds, the least recently released first, of those released
        together the deepest in the sequence first, so that prefixes outlive what continues them.
        """
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._holders[block] = 1
        return block

    def reserve(self, hashes: Sequence[bytes], total: int) -> tuple[list[int], int] | None:
        """Match a prefix of `hashes` and allocate the rest of `total` blocks; or None, with nothing changed.

        Returns the blocks in the sequence's order, and how many of them are matched ones.
        """
        if len(hashes) > total:
            raise ValueError(f"reserve: {len(hashes)} hashes for {total} blocks; at most one hash a block")
        found = self.lookup(hashes)
        if total - len(found) > self.available - sum(block in self._idle for block in found):
            return None
        matched = self.match(hashes)
        fresh = self.allocate(total - len(matched))
        assert fresh is not None
        return matched + fresh, len(matched)

    def register(self, block: int, digest: bytes) -> bool:
        """Make a held block findable, now that its K and V are complete and valid in every layer.

        Returns whether `digest` now finds it. False: another block has the same content already; this one stays private.
        """
        if not self._holders[block]:
            raise ValueError(f"register: nobody holds block {block}")
        if self._hash_of.get(block, digest) != digest:
            raise ValueError(f"register: block {block} is registered already, with other tokens")
        if self._block_of.setdefault(digest, block) != block:
            return False
        self._hash_of[block] = digest
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each of `blocks`, a sequence's in order.

        Once nobody holds it, a findable block stays cached until it is evicted, any other is free.
        """
        if len(set(blocks)) < len(blocks) or not all(self._holders[block] for block in blocks):
            raise ValueError(f"release: {list(blocks)}: a block twice, or one that nobody holds")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)
