"""Writing a plain K/V cache [users, kv_heads, length, head_dim] in place: fill_cache and update_cache."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch_in_place
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.pages import PAGE, make_writable
from disagg_tt.device.emulator.ops.plan import need, need_dtype, need_tile
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import DataType, WormholeComputeKernelConfig

BF16, FP32, BF8, BF4 = DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B, DataType.BFLOAT4_B


def need_caches(op: str, cache: Spec, values: Spec) -> None:
    """A cache and what is written into it must be in TILE layout and have 4 axes."""
    need_tile(op, cache=cache, input=values)
    need(
        len(cache.shape) == len(values.shape) == 4,
        op,
        f"cache {cache!r} and input {values!r} must have 4 axes",
    )


@lru_cache(maxsize=1024)
def _fill_check(op: str, cache: Spec, values: Spec, batch_idx: int, update_idx: int) -> None:
    need_caches(op, cache, values)
    need_dtype(op, "cache", cache, BF16, BF8, FP32)
    need(
        cache.dtype is values.dtype,
        op,
        f"input is {values.dtype.value}, the cache {cache.dtype.value}; typecast to the cache's dtype",
    )
    need(values.shape[0] == 1, op, f"input {list(values.shape)} must be [1, kv_heads, tokens, head_dim]")
    need(
        (values.shape[1], values.shape[3]) == (cache.shape[1], cache.shape[3]),
        op,
        f"input {list(values.shape)} for a cache {list(cache.shape)}",
    )
    need(
        0 <= batch_idx < cache.shape[0], op, f"user {batch_idx}; the cache has users 0..{cache.shape[0] - 1}"
    )
    need(
        update_idx >= 0 and update_idx % PAGE == 0,
        op,
        f"update_idx {update_idx}; it must be a multiple of {PAGE}",
    )
    need(
        update_idx + values.padded_shape[2] <= cache.padded_shape[2],
        op,
        f"{values.padded_shape[2]} tokens from {update_idx} on for a cache of {cache.padded_shape[2]}",
    )


def fill_cache(cache_tensor: Tensor, input_tensor: Tensor, batch_idx: int, *, update_idx: int = 0) -> Tensor:
    """Write input [1, kv_heads, S, D], padding rows included, from token `update_idx` of a user, in place.

    The cache is [users, kv_heads, length, D]. Returns it.
    """
    return _fill("fill_cache", cache_tensor, input_tensor, batch_idx, update_idx)


def fill_cache_for_user_(cache: Tensor, input: Tensor, batch_index: int, *, update_idx: int = 0) -> Tensor:
    """fill_cache under its older name, in ttnn.kv_cache."""
    return _fill("fill_cache_for_user_", cache, input, batch_index, update_idx)


def _fill(op: str, cache: Tensor, values: Tensor, batch_idx: int, update_idx: int) -> Tensor:
    on_device(op, cache, values)
    _fill_check(op, cache.spec, values.spec, batch_idx, update_idx)
    end = (
        update_idx + values.padded_shape[2]
    )  # the work must not hold `values`, whose memory may be freed before it runs

    def compute(data: torch.Tensor) -> torch.Tensor:
        make_writable(cache, data.shape[0])
        held = cache._values.data
        assert held is not None
        rows = held[:, batch_idx, :, update_idx:end]
        written = min(data.shape[3], rows.shape[2])  # the cache's padding is not held
        rows[:, :, written:] = 0
        rows[:, :, :written] = data[:, 0, :, :written]
        return held

    launch_in_place(op, cache, compute, values)
    return cache


@lru_cache(maxsize=1024)
def _update_check(op: str, cache: Spec, values: Spec, update_idx: int, batch_offset: int) -> None:
    need_caches(op, cache, values)
    need_dtype(op, "cache", cache, BF16, BF8, FP32)
    need_dtype(op, "input", values, BF16, BF8, FP32)
    users, rows = cache.shape[0], values.padded_shape[2]
    need(values.shape[0] == 1, op, f"input {list(values.shape)} must be [1, kv_heads, users, head_dim]")
    need(
        (values.shape[1], values.shape[3]) == (cache.shape[1], cache.shape[3]),
        op,
        f"input {list(values.shape)} for a cache {list(cache.shape)}",
    )
    need(
        0 <= update_idx < cache.shape[2],
        op,
        f"update_idx {update_idx}; the cache holds {cache.shape[2]} tokens",
    )
    need(rows == -(-users // PAGE) * PAGE, op, f"input {values!r} for a cache of {users} users")
    need(
        batch_offset == 0 or users < PAGE,
        op,
        f"batch_offset {batch_offset}; with a cache of {users} users it must be 0",
    )
    need(
        batch_offset >= 0 and batch_offset + users <= values.shape[2],
        op,
        f"rows {batch_offset}..{batch_offset + users - 1} of an input of {values.shape[2]}",
    )


def update_cache(
    cache: Tensor,
    input: Tensor,
    update_idx: int,
    *,
    batch_offset: int = 0,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Write rows batch_offset.. of input [1, kv_heads, users, D] at token `update_idx` of every user, in place."""
    return _update("update_cache", cache, input, update_idx, batch_offset)


def update_cache_for_token_(
    cache: Tensor,
    input: Tensor,
    update_index: int,
    batch_offset: int = 0,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """update_cache under its older name, in ttnn.kv_cache."""
    return _update("update_cache_for_token_", cache, input, update_index, batch_offset)


def _update(op: str, cache: Tensor, values: Tensor, update_idx: int, batch_offset: int) -> Tensor:
    on_device(op, cache, values)
    _update_check(op, cache.spec, values.spec, update_idx, batch_offset)
    users, dtype = cache.shape[0], cache.dtype

    def compute(data: torch.Tensor) -> torch.Tensor:
        make_writable(cache, data.shape[0])
        held = cache._values.data
        assert held is not None
        rows = data[:, 0, :, batch_offset : batch_offset + users].transpose(1, 2)
        held[:, :, :, update_idx] = round_on_device(rows.clone(), dtype)
        return held

    launch_in_place(op, cache, compute, values)
    return cache
