"""Cache blocks are found by their tokens, shared, evicted and given back without one ever being two things at once."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from disagg_tt.blocks import BLOCK, BlockPool, chain, extend

STATEFUL = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # a loaded machine
)


def tokens_of(text: str) -> list[int]:
    """A full block of tokens for each letter."""
    return [ord(letter) for letter in text for _ in range(BLOCK)]


def filled(pool: BlockPool, text: str, more: int = 0) -> list[int]:
    """The blocks of a request over `text` and `more` private blocks, all of the text registered."""
    hashes = chain(tokens_of(text))
    reserved = pool.reserve(hashes, len(hashes) + more)
    assert reserved is not None
    for block, digest in zip(reserved[0], hashes, strict=False):
        pool.register(block, digest)
    return reserved[0]


def test_only_full_blocks_have_a_hash():
    assert [len(chain([7] * count)) for count in (0, 1, 31, 32, 33, 64)] == [0, 0, 0, 1, 1, 2]


def test_a_hash_stands_for_every_token_before_it():
    base = chain(tokens_of("abcd"))
    assert chain(tokens_of("abcd"))[:2] == chain(tokens_of("abxy"))[:2]
    for at in range(4 * BLOCK):
        tokens = tokens_of("abcd")
        tokens[at] ^= 1
        same = at // BLOCK
        assert chain(tokens)[:same] == base[:same]
        assert not set(chain(tokens)[same:]) & set(base)


def test_token_ids_are_hashed_at_a_fixed_width():
    assert chain([1, 11] * 16) != chain([11, 1] * 16)
    assert chain([0x0100] + [0] * 31) != chain([0, 1] + [0] * 30)
    assert len({chain([token] * BLOCK)[0] for token in (0, 1, 255, 256, 2**16, 2**32 - 1)}) == 6


@pytest.mark.parametrize("step", [1, 5, 32, 40])
def test_a_chain_grows_with_its_tokens(step):
    tokens = list(range(200))
    hashes: list[bytes] = []
    for end in range(0, 201, step):
        extend(hashes, tokens[:end])
    extend(hashes, tokens)
    assert hashes == chain(tokens)


def test_the_longest_prefix_is_shared_and_an_edit_ends_it():
    pool = BlockPool(8)
    first = filled(pool, "abc")
    blocks, matched = pool.reserve(chain(tokens_of("abx")), 4)
    assert (blocks[:2], matched) == (first[:2], 2)
    assert not set(blocks[2:]) & set(first)


def test_what_was_not_registered_is_never_found():
    pool = BlockPool(4)
    hashes = chain(tokens_of("abc"))
    blocks, _ = pool.reserve(hashes, 3)
    pool.register(blocks[0], hashes[0])
    pool.release(blocks)  # the transfer failed after the first block
    assert pool.lookup(hashes) == blocks[:1]
    assert pool.cached == 1 and pool.available == 4


def test_what_is_held_is_not_counted_as_kept_for_reuse_alone():
    pool = BlockPool(8)
    held = filled(pool, "ab", more=1)
    assert (pool.in_use, pool.cached) == (3, 0)
    pool.release(held)
    assert (pool.in_use, pool.cached) == (0, 2)


def test_a_later_block_without_its_prefix_is_not_found():
    pool = BlockPool(4)
    hashes = chain(tokens_of("ab"))
    blocks, _ = pool.reserve(hashes, 2)
    pool.register(blocks[1], hashes[1])
    assert pool.lookup(hashes) == []


def test_the_first_of_equal_blocks_is_kept_and_the_second_stays_private():
    pool = BlockPool(4)
    hashes = chain(tokens_of("a"))
    (one,), (two,) = pool.allocate(1), pool.allocate(1)
    assert pool.register(one, hashes[0]) and not pool.register(two, hashes[0])
    pool.release([two])
    pool.release([one])
    assert pool.lookup(hashes) == [one] and pool.cached == 1 and pool.available == 4


def test_the_least_recently_released_goes_first_and_the_deepest_of_a_sequence():
    pool = BlockPool(6)
    for text in ("abc", "xyz"):
        pool.release(filled(pool, text))
    pool.release(pool.match(chain(tokens_of("abc"))))  # used again: now xyz is the older

    def kept() -> tuple[int, int]:
        return len(pool.lookup(chain(tokens_of("abc")))), len(pool.lookup(chain(tokens_of("xyz"))))

    seen = []
    for _ in range(6):
        pool.allocate(1)
        seen.append(kept())
    assert seen == [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]


def test_a_held_block_is_not_evicted_for_anyone():
    pool = BlockPool(4)
    held = filled(pool, "ab", more=1)
    assert pool.allocate(2) is None and pool.available == 1
    assert pool.reserve(chain(tokens_of("ab")), 4) is None
    assert pool.lookup(chain(tokens_of("ab"))) == held[:2]


def test_a_reservation_that_does_not_fit_changes_nothing():
    pool = BlockPool(4)
    pool.release(filled(pool, "abc"))
    before = pool.available, pool.cached
    assert (
        pool.reserve(chain(tokens_of("ab")), 5) is None
    )  # 2 cached ones, and 2 that could be had for the 3 others
    assert (pool.available, pool.cached) == before
    assert pool.reserve(chain(tokens_of("ab")), 4) is not None


def test_calls_that_break_the_rules_are_refused():
    pool = BlockPool(4)
    one, two = chain(tokens_of("a"))[0], chain(tokens_of("b"))[0]
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match="a block twice"):
        pool.release([block, block])
    pool.register(block, one)
    with pytest.raises(ValueError, match="other tokens"):
        pool.register(block, two)
    with pytest.raises(ValueError, match="2 hashes for 1 blocks"):
        pool.reserve([one, two], 1)
    pool.release([block])
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release([block])
    with pytest.raises(ValueError, match="nobody holds"):
        pool.register(block, one)
    assert pool.available == 4


class Pool(RuleBasedStateMachine):
    """A BlockPool beside a model that remembers what was really written to each block."""

    @initialize(blocks=st.integers(1, 8))
    def start(self, blocks):
        self.pool = BlockPool(blocks)
        self.content: dict[int, str | None] = {}  # block: the text up to and with it; None: half written
        self.findable: dict[str, int] = {}
        self.idle: list[int] = []  # findable, held by none, the next to evict first
        self.requests: list[tuple[str, list[int], int]] = []  # text, blocks, how many of them are complete

    def holders(self, block):
        return sum(block in blocks for _, blocks, _ in self.requests)

    def prefix(self, text):
        lengths = range(len(text) + 1)
        count = next(n for n in reversed(lengths) if all(text[: i + 1] in self.findable for i in range(n)))
        return [self.findable[text[: i + 1]] for i in range(count)]

    @rule(text=st.text("ab", max_size=5), more=st.integers(0, 6))
    def reserve(self, text, more):
        found, total = self.prefix(text), len(text) + more
        free = self.pool.blocks - len(self.idle) - len({b for _, blocks, _ in self.requests for b in blocks})
        idle = [block for block in self.idle if block not in found]
        reserved = self.pool.reserve(chain(tokens_of(text)), total)
        if total - len(found) > free + len(idle):
            assert reserved is None
            return
        blocks, matched = reserved
        assert len(blocks) == len(set(blocks)) == total
        assert blocks[:matched] == found
        assert [self.content[block] for block in found] == [text[: i + 1] for i in range(matched)]
        fresh, evicted = blocks[matched:], idle[: max(0, total - matched - free)]
        assert not any(self.holders(block) for block in fresh)
        assert [block for block in fresh if block in self.idle] == evicted
        self.findable = {name: block for name, block in self.findable.items() if block not in evicted}
        self.idle = [block for block in idle if block not in evicted]
        self.content.update(dict.fromkeys(fresh))
        self.requests.append((text, blocks, matched))

    @rule(data=st.data())
    def complete_a_block(self, data):
        unfinished = [i for i, (text, _, done) in enumerate(self.requests) if done < len(text)]
        if not unfinished:
            return
        i = data.draw(st.sampled_from(unfinished))
        text, blocks, done = self.requests[i]
        self.content[blocks[done]] = name = text[: done + 1]
        first = self.pool.register(blocks[done], chain(tokens_of(text))[done])
        assert first == (name not in self.findable)
        self.findable.setdefault(name, blocks[done])
        self.requests[i] = (text, blocks, done + 1)

    @rule(data=st.data())
    def end(self, data):
        """Finished, cancelled or failed: the same to the pool."""
        if not self.requests:
            return
        _, blocks, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pool.release(blocks)
        findable = set(self.findable.values())
        self.idle += [block for block in reversed(blocks) if block in findable and not self.holders(block)]

    @invariant()
    def agrees_with_the_model(self):
        held = {block for _, blocks, _ in self.requests for block in blocks}
        assert self.pool.in_use == len(held)
        assert self.pool.available == self.pool.blocks - len(held)
        assert self.pool.cached == len(set(self.findable.values()) - held)
        for name in self.findable:
            assert self.pool.lookup(chain(tokens_of(name))) == self.prefix(name)

    def teardown(self):
        for _, blocks, _ in getattr(self, "requests", []):
            self.pool.release(blocks)
        assert not hasattr(self, "pool") or self.pool.available == self.pool.blocks


TestPool = Pool.TestCase
TestPool.settings = STATEFUL
