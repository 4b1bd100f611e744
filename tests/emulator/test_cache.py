"""The paged K/V cache: filling, updating and attending, whatever the page table, positions and number of users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import ROW_MAJOR, assert_rounded, bfloat16, chips, generator, height_sharded, put

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.channel import REPLICATED
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.pages import addresses
from disagg_tt.device.emulator.send_recv import _rooms
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError

BLOCK, DIM, KV, GROUP = 32, 32, 2, 2  # per chip: 2 kv heads, 4 q heads
DTYPES = [ttnn.bfloat16, ttnn.bfloat8_b]
TABLES = ["in order", "reversed", "random"]


def page_table(kind: str, users: int, pages: int, g: torch.Generator) -> torch.Tensor:
    blocks = torch.arange(users * pages)
    if kind == "reversed":
        blocks = blocks.flip(0)
    if kind == "random":
        blocks = torch.randperm(users * pages, generator=g)
    return blocks.view(users, pages).to(torch.int32)


class Case:
    """A cache on a 1x2 mesh with its reference: history[chip] is [users, kv_heads, tokens, dim] for K and for V."""

    def __init__(self, mesh: Any, table: str, positions: list[int], dtype: Any, seed: int):
        self.mesh, self.positions, self.dtype = mesh, positions, dtype
        self.g = generator(seed)
        self.users = len(positions)
        pages = max(max(positions), 0) // BLOCK + 2
        self.pages = page_table(table, self.users, pages, self.g)
        self.shape = (2, self.users, KV, pages * BLOCK, DIM)
        self.history = [self._held(torch.randn(self.shape, generator=self.g)) for _ in range(2)]
        self.table = put(mesh, self.pages, ttnn.int32, ROW_MAJOR)
        self.where = put(mesh, torch.tensor(positions, dtype=torch.int32), ttnn.int32, ROW_MAJOR)
        self.pools = [put(mesh, self._pool(h), dtype, cut=1) for h in self.history]

    def _held(self, values: torch.Tensor) -> torch.Tensor:
        return round_on_device(
            values, DataType.BFLOAT16 if self.dtype is ttnn.bfloat16 else DataType.BFLOAT8_B
        )

    def _pool(self, history: torch.Tensor) -> torch.Tensor:
        """Return [blocks, both chips' kv_heads, 32, dim] in which each user's blocks hold its history."""
        pool = torch.zeros(self.pages.numel(), 2 * KV, BLOCK, DIM)
        blocks = history.view(2, self.users, KV, -1, BLOCK, DIM).permute(1, 3, 0, 2, 4, 5)
        pool[self.pages.reshape(-1).long()] = blocks.reshape(self.pages.numel(), 2 * KV, BLOCK, DIM)
        return pool

    def sharded(self, values: torch.Tensor) -> Any:
        """Return [chips, users, heads, dim] as decode's tensor [1, users, heads, dim], one user a core."""
        place = height_sharded(self.mesh, self.users, 32, DIM)
        both = torch.cat(list(values), dim=1)[None]
        return ttnn.to_memory_config(put(self.mesh, both, cut=2), place)

    def update(self) -> None:
        """Write one token a user at its position, on the device and into the reference."""
        for pool, history in zip(self.pools, self.history, strict=True):
            new = bfloat16(torch.randn(2, self.users, KV, DIM, generator=self.g))
            ttnn.experimental.paged_update_cache(
                pool, self.sharded(new), update_idxs_tensor=self.where, page_table=self.table
            )
            for user, position in enumerate(self.positions):
                if position >= 0:
                    history[:, user, :, position] = self._held(new[:, user].clone())

    def check_pools(self) -> None:
        for pool, history in zip(self.pools, self.history, strict=True):
            expected = self._pool(history).chunk(2, dim=1)
            for got, want in zip(chips(pool), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)

    def attend(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return what each chip computes for a random query, and the reference [chips, 1, users, heads, dim]."""
        q = bfloat16(torch.randn(2, self.users, KV * GROUP, DIM, generator=self.g))
        result = ttnn.transformer.paged_scaled_dot_product_attention_decode(
            self.sharded(q), *self.pools, page_table_tensor=self.table, cur_pos_tensor=self.where, scale=0.3
        )
        expected = torch.zeros(2, 1, self.users, KV * GROUP, DIM)
        for user, position in enumerate(self.positions):
            keys, values = (
                h[:, user, :, : position + 1].repeat_interleave(GROUP, dim=1) for h in self.history
            )
            scores = torch.einsum("chd,chtd->cht", q[:, user], keys) * 0.3
            expected[:, 0, user] = torch.einsum("cht,chtd->chd", scores.softmax(-1), values)
        return chips(result), expected


POSITIONS = {
    "one user at 0": [0],
    "block edges": [31, 32, 63],
    "free slots": [5, -1, 40, -1],
    "all free": [-1, -1],
    "very different lengths": [3, 700, 0, 12, -1],
    "32 users": [(7 * i) % 90 for i in range(32)],
    "equal, block full": [63, 63],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("lengths", POSITIONS)
def test_update_writes_one_row_a_user_and_attention_sees_it(
    mesh: Any, table: str, lengths: str, dtype: Any
) -> None:
    case = Case(mesh, table, POSITIONS[lengths], dtype, seed=11)
    case.update()
    case.check_pools()
    got, expected = case.attend()
    used = [u for u, p in enumerate(case.positions) if p >= 0]
    for chip in range(2):
        assert_rounded(got[chip][:, used], expected[chip][:, used])


@pytest.mark.parametrize("seed", range(6))
def test_update_and_attention_with_random_users_and_positions(mesh: Any, seed: int) -> None:
    g = generator(seed)
    users = int(torch.randint(1, 33, (1,), generator=g))
    longest = int(torch.randint(1, 300, (1,), generator=g))
    positions = torch.randint(-1, longest, (users,), generator=g).tolist()
    case = Case(mesh, TABLES[seed % 3], positions, DTYPES[seed % 2], seed)
    for _ in range(2):  # the second time over rows that were written
        case.update()
        case.check_pools()
    got, expected = case.attend()
    used = [u for u, p in enumerate(positions) if p >= 0]
    for chip in range(2):
        assert_rounded(got[chip][:, used], expected[chip][:, used])


def test_very_different_lengths_take_the_path_of_one_user_at_a_time(mesh: Any) -> None:
    for lengths, spread in (("very different lengths", True), ("block edges", False)):
        case = Case(mesh, "random", POSITIONS[lengths], ttnn.bfloat16, seed=1)
        assert addresses(case.where, case.table, case.pools[0].spec).spread is spread


def test_positions_that_advance_and_a_new_page_table_are_seen(mesh: Any) -> None:
    case = Case(mesh, "random", [30, 64], ttnn.bfloat16, seed=12)
    for _ in range(3):
        case.update()
        ttnn.plus_one(case.where, skip_negative_entries=True)
        case.positions = [p + 1 for p in case.positions]
    case.check_pools()
    swapped = case.pages.flip(0)
    ttnn.copy_host_to_device_tensor(ttnn.from_torch(swapped, dtype=ttnn.int32), case.table)
    case.history = [h.flip(1) for h in case.history]
    case.pages = swapped
    case.check_pools()
    case.update()
    case.check_pools()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_fill_writes_the_tokens_of_one_user_and_its_padding(
    mesh: Any, tokens: int, table: str, dtype: Any
) -> None:
    case = Case(mesh, table, [120, 120, 120], dtype, seed=13)
    values = case._held(torch.randn(1, 2 * KV, tokens, DIM, generator=case.g))
    result = ttnn.experimental.paged_fill_cache(
        case.pools[0], put(mesh, values, dtype, cut=1), case.table, batch_idx=1
    )
    assert result is case.pools[0]
    padded = -(-tokens // 32) * 32
    history = case.history[0]
    history[:, 1, :, :padded] = 0
    history[:, 1, :, :tokens] = torch.stack(values[0].chunk(2))
    case.check_pools()


def test_writing_a_pool_leaves_what_it_was_made_from_alone(mesh: Any) -> None:
    host = ttnn.from_torch(
        torch.ones(4, KV, BLOCK, DIM), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, mesh_mapper=ttnn.ReplicateTensorToMesh(mesh)
    )  # fmt: skip
    pool = put(mesh, torch.zeros(4, KV, BLOCK, DIM))
    ttnn.copy_host_to_device_tensor(host, pool)
    copy = ttnn.to_memory_config(pool, ttnn.L1_MEMORY_CONFIG)
    table = put(mesh, torch.tensor([[3, 1]], dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    values = put(mesh, torch.full((1, 2 * KV, 40, DIM), 5.0), cut=1)
    for _ in range(2):
        ttnn.experimental.paged_fill_cache(pool, values, table, batch_idx=0)
        everywhere = ttnn.ConcatMeshToTensor(mesh, dim=0)
        assert ttnn.to_torch(host, mesh_composer=everywhere).unique().tolist() == [1]
        assert chips(copy)[0].unique().tolist() == [1]
        later = ttnn.to_memory_config(pool, ttnn.L1_MEMORY_CONFIG)
        ttnn.experimental.paged_fill_cache(pool, ttnn.zeros_like(values), table, batch_idx=0)
        assert chips(later)[0][[3, 1]].unique().tolist() == [0, 5], "a copy changed with the pool"
    for chip in chips(pool):
        assert chip[[3, 1]].unique().tolist() == [0]
        assert chip[[0, 2]].unique().tolist() == [1]


def test_a_replicated_pool_holds_different_values_a_chip_once_they_are_written(mesh: Any) -> None:
    pool = put(mesh, torch.zeros(2, 1, BLOCK, DIM))
    table = put(mesh, torch.tensor([[1]], dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    values = torch.arange(2).view(1, 2, 1, 1).expand(1, 2, 32, DIM).float() + 1
    ttnn.experimental.paged_fill_cache(pool, put(mesh, values, cut=1), table, batch_idx=0)
    assert [chip[1].unique().tolist() for chip in chips(pool)] == [[1], [2]]


def test_writing_through_a_view_is_rejected(mesh: Any) -> None:
    ids = put(mesh, torch.zeros(1, 32, dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    view = ttnn.reshape(ids, [1, 1, 1, 32])
    with pytest.raises(DeviceError, match="plus_one into .* of which a view is alive"):
        ttnn.plus_one(ids)
    del view
    ttnn.plus_one(ids)
    assert chips(ids)[0].unique().tolist() == [1]


@pytest.mark.parametrize("op", ["update", "attend"])
def test_positions_and_pages_out_of_range_are_rejected(mesh: Any, op: str) -> None:
    case = Case(mesh, "in order", [40, 40], ttnn.bfloat16, seed=14)

    def set_(target: Any, values: torch.Tensor) -> None:
        ttnn.copy_host_to_device_tensor(ttnn.from_torch(values.to(torch.int32), dtype=ttnn.int32), target)

    set_(case.where, torch.tensor([3, 96]))
    with pytest.raises(DeviceError, match="position 96 is past the page table's 96 tokens a user"):
        getattr(case, op)()
    set_(case.where, torch.tensor([3, 40]))
    set_(case.table, torch.tensor([[0, 1, 2], [3, 6, 5]]))
    with pytest.raises(DeviceError, match=r"page table points to block 6 .*; the pool has blocks 0\.\.5"):
        getattr(case, op)()


def test_fill_through_a_page_outside_the_pool_is_rejected(mesh: Any) -> None:
    pool = put(mesh, torch.zeros(4, KV, BLOCK, DIM))
    table = put(mesh, torch.tensor([[3, 4]], dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    with pytest.raises(DeviceError, match="page 4 .* is outside the pool's 4 blocks"):
        ttnn.experimental.paged_fill_cache(pool, put(mesh, torch.ones(1, KV, 64, DIM)), table, batch_idx=0)


def test_a_page_table_that_is_received_anew_is_looked_up_anew(mesh: Any) -> None:
    """Integers are received into the memory that they have."""
    like = {"layout": ROW_MAJOR, "device": mesh}
    table = ttnn.from_torch(torch.zeros(1, 2, dtype=torch.int32), dtype=ttnn.int32, **like)
    where = ttnn.from_torch(torch.tensor([40], dtype=torch.int32), dtype=ttnn.int32, **like)
    cache = ttnn.zeros([4, 1, 32, 32], layout=ttnn.TILE_LAYOUT, device=mesh).spec
    for blocks in ([0, 1], [3, 2], [1, 3]):
        for room in _rooms(table._values, table.spec, [0, 1], 2, REPLICATED):
            room.copy_(torch.tensor(blocks))
        found = addresses(where, table, cache)
        assert found.pages.tolist() == [blocks] and [int(at) for at in found.writes] == [0, blocks[1], 8]
