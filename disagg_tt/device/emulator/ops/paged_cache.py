"""Writing a paged K/V cache in place, prefill's tokens of a user or decode's one token a user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch_in_place
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.cache import BF4, BF8, BF16, FP32, need_caches
from disagg_tt.device.emulator.ops.pages import PAGE, addresses, as_pool, in_pages, make_writable, need_pages
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import DataType, Layout, TensorMemoryLayout, WormholeComputeKernelConfig
from disagg_tt.errors import DeviceError

INT32 = DataType.INT32


def _need_index(op: str, name: str, spec: Spec) -> None:
    need_dtype(op, name, spec, INT32)
    need(spec.layout is Layout.ROW_MAJOR, op, f"{name} {spec!r} must be ROW_MAJOR")


@lru_cache(maxsize=1024)
def _paged_fill_check(cache: Spec, values: Spec, pages: Spec, users: Spec | None) -> None:
    op = "paged_fill_cache"
    need_caches(op, cache, values)
    need(
        cache.dtype is values.dtype,
        op,
        f"input is {values.dtype.value}, the cache {cache.dtype.value}; typecast to the cache's dtype",
    )
    need_dtype(op, "cache", cache, BF16, BF8, BF4, FP32)
    need(not values.memory_config.is_sharded(), op, f"input {values!r} must be interleaved")
    _need_index(op, "page table", pages)
    need(len(pages.shape) == 2, op, f"page table {list(pages.shape)} must be [users, blocks a user]")
    if users is None:
        need(
            values.shape[0] == 1,
            op,
            f"input {list(values.shape)} of {values.shape[0]} users; without batch_idx_tensor it must be of one",
        )
    else:
        need_dtype(op, "batch_idx_tensor", users, INT32, DataType.UINT32)
        need(users.layout is Layout.ROW_MAJOR, op, f"batch_idx_tensor {users!r} must be ROW_MAJOR")
        need(
            users.shape.rank == 1 and users.shape[0] == values.shape[0],
            op,
            f"batch_idx_tensor {list(users.shape)} for an input of {values.shape[0]} users",
        )
    same = cache.shape[1] * cache.padded_shape[3] == values.shape[1] * values.padded_shape[3]
    need(same, op, f"input {list(values.shape)} for a cache {list(cache.shape)}; a block must keep its size")
    emulated(
        (values.shape[1], values.shape[3]) == (cache.shape[1], cache.shape[3]),
        op,
        f"see a cache {list(cache.shape)} as one of other heads, as for input {list(values.shape)}",
    )
    need_pages(op, cache)
    room = pages.shape[1] * cache.shape[2]
    need(
        values.padded_shape[2] <= room,
        op,
        f"{values.padded_shape[2]} tokens for a page table of {room} tokens a user",
    )


def paged_fill_cache(
    cache_tensor: Tensor,
    input_tensor: Tensor,
    page_table: Tensor,
    *,
    batch_idx_tensor: Tensor | None = None,
    batch_idx: int = 0,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    mesh_coords: object = None,
    block_size: int | None = None,
    cache_position_modulo: int | None = None,
    valid_seq_len_tensor: Tensor | None = None,
) -> Tensor:
    """Write input [1, kv_heads, S, D] from token 0 of user `batch_idx`, padding rows included, in place.

    With `batch_idx_tensor` [n], an input of n users is written to the users that it lists.
    """
    op = "paged_fill_cache"
    leave_out(
        op,
        mesh_coords=mesh_coords,
        block_size=block_size,
        cache_position_modulo=cache_position_modulo,
        valid_seq_len_tensor=valid_seq_len_tensor,
    )
    indices = (page_table,) if batch_idx_tensor is None else (page_table, batch_idx_tensor)
    on_device(op, cache_tensor, input_tensor, *indices)
    cache, table = cache_tensor.spec, page_table.spec
    _paged_fill_check(
        cache, input_tensor.spec, table, None if batch_idx_tensor is None else batch_idx_tensor.spec
    )
    if batch_idx_tensor is None and not 0 <= batch_idx < table.shape[0]:
        raise DeviceError(f"{op}: batch_idx {batch_idx}; the page table has users 0..{table.shape[0] - 1}")

    def compute(values: torch.Tensor, blocks: torch.Tensor, *listed: torch.Tensor) -> torch.Tensor:
        make_writable(cache_tensor, values.shape[0])
        pool, pages = as_pool(cache_tensor._values), in_pages(blocks.reshape(table.shape), cache.shape[2])
        tokens = values.shape[3]
        users = listed[0].reshape(listed[0].shape[0], -1)[0].tolist() if listed else [batch_idx]
        if tokens % PAGE:
            values = torch.nn.functional.pad(values, (0, 0, 0, PAGE - tokens % PAGE))
        for row, user in enumerate(users):
            if not 0 <= user < pages.shape[0]:
                raise DeviceError(f"{op}: user {user}; the page table has users 0..{pages.shape[0] - 1}")
            used = pages[user, : -(-tokens // PAGE)]
            if int(used.min()) < 0 or int(used.max()) >= pool.shape[2]:
                each = cache.shape[2] // PAGE
                raise DeviceError(
                    f"{op}: page {int(used.max()) // each} (or {int(used.min()) // each}) is outside the pool's "
                    f"{cache.shape[0]} blocks"
                )
            rows = values[:, row].to(pool.dtype)
            pool[:, :, used] = rows.reshape(rows.shape[0], rows.shape[1], -1, PAGE, rows.shape[3])
        data = cache_tensor._values.data
        assert data is not None
        return data

    launch_in_place(op, cache_tensor, compute, input_tensor, *indices, as_held=True)
    return cache_tensor


@lru_cache(maxsize=1024)
def _paged_update_check(
    cache: Spec, values: Spec, positions: Spec | None, pages: Spec | None, share_cache: bool
) -> None:
    op = "paged_update_cache"
    need_caches(op, cache, values)
    need_dtype(op, "input", values, BF16, FP32)
    need_dtype(op, "cache", cache, BF16, BF8, BF4, FP32)
    need(values.shape[0] == 1, op, f"input {list(values.shape)} must be [1, users, kv_heads, head_dim]")
    shard = values.memory_config.shard_spec
    need(
        shard is not None and values.memory_config.memory_layout is not TensorMemoryLayout.WIDTH_SHARDED,
        op,
        f"input {values!r} must be sharded by height, one user a core",
    )
    assert shard is not None
    users = values.shape[1]
    need(
        shard.grid.num_cores() == users and users * values.padded_shape[2] % shard.shape[0] == 0,
        op,
        f"input {values!r} must lie on {users} cores, one user a core",
    )
    if positions is not None:
        need_dtype(op, "update_idxs", positions, INT32)
        need(positions.layout is Layout.ROW_MAJOR, op, f"update_idxs {positions!r} must be ROW_MAJOR")
        alone = positions.shape[0] == math.prod(positions.shape) == users
        need(alone, op, f"update_idxs {list(positions.shape)}; it must be [{users}]")
    if pages is None:
        held = 1 if share_cache else users
        need(cache.shape[0] == held, op, f"cache of {cache.shape[0]} users for an input of {users}")
    else:
        need(positions is not None, op, "update_idxs by value; a page table needs update_idxs_tensor")
        need(not share_cache, op, "share_cache with a page table; leave one out")
        need_dtype(op, "page table", pages, INT32)
        need(pages.layout is Layout.ROW_MAJOR, op, f"page table {pages!r} must be ROW_MAJOR")
        need(pages.shape[0] == users, op, f"page table for {pages.shape[0]} users, input for {users}")
        need(
            pages.shape[1] <= cache.shape[0],
            op,
            f"page table of {pages.shape[1]} blocks a user for a pool of {cache.shape[0]}",
        )
    need(
        values.shape[2:] == (cache.shape[1], cache.shape[3]),
        op,
        f"input {list(values.shape)} for a cache {list(cache.shape)}; heads and head_dim must be the same",
    )
    need_pages(op, cache)


def paged_update_cache(
    cache_tensor: Tensor,
    input_tensor: Tensor,
    *,
    update_idxs: Sequence[int] = (),
    update_idxs_tensor: Tensor | None = None,
    share_cache: bool | None = None,
    page_table: Tensor | None = None,
    batch_offset: int = 0,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    mesh_coords: object = None,
    block_size: int | None = None,
    num_kv_heads: int | None = None,
    cache_position_modulo: int | None = None,
) -> Tensor:
    """Write each user's one token [1, users, kv_heads, D] at its position (-1 skips), repacked to the cache's dtype.

    The cache is a pool with a page table, or without one [users, kv_heads, length, D]. Returns the cache.
    """
    op = "paged_update_cache"
    leave_out(
        op,
        mesh_coords=mesh_coords,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        cache_position_modulo=cache_position_modulo,
    )
    given = [t for t in (update_idxs_tensor, page_table) if t is not None]
    on_device(op, cache_tensor, input_tensor, *given)
    need(batch_offset == 0, op, f"batch_offset {batch_offset}; it must be 0")
    need(
        (update_idxs_tensor is None) == bool(update_idxs),
        op,
        "pass update_idxs or update_idxs_tensor, one of them",
    )
    cache, dtype = cache_tensor.spec, cache_tensor.dtype
    positions = None if update_idxs_tensor is None else update_idxs_tensor.spec
    pages = None if page_table is None else page_table.spec
    _paged_update_check(cache, input_tensor.spec, positions, pages, bool(share_cache))
    if positions is None:
        users, longest = input_tensor.shape[1], max(update_idxs)
        need(len(update_idxs) == users, op, f"{len(update_idxs)} update_idxs for {users} users")
        need(
            longest < cache.shape[2],
            op,
            f"update_idxs reach {longest}; the cache holds {cache.shape[2]} tokens",
        )
    where = update_idxs if update_idxs_tensor is None else update_idxs_tensor

    def compute(values: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        make_writable(cache_tensor, values.shape[0])
        pool = as_pool(cache_tensor._values)
        users, page, offset = addresses(where, page_table, cache).writes
        values = values[:, 0] if len(users) == values.shape[2] else values[:, 0, users]
        if dtype is not BF16:
            values = round_on_device(values, dtype)
        pool[:, :, page, offset] = values.transpose(1, 2)
        data = cache_tensor._values.data
        assert data is not None
        return data

    launch_in_place(op, cache_tensor, compute, input_tensor, *given)
    return cache_tensor
