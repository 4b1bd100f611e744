"""Conversions between dtypes on the device, and integers that wrap.

What they do with values that the other dtype lacks is what the device's typecast kernels do.
"""

from __future__ import annotations

import torch

from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.types import DataType

_BITS = {DataType.UINT32: 32, DataType.INT32: 32, DataType.UINT16: 16, DataType.UINT8: 8}


def wrap(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return int64 `values` modulo 2^bits of the integer `dtype`."""
    bits = _BITS[dtype]
    if dtype is DataType.INT32:
        half = 1 << (bits - 1)
        return ((values + half) & ((1 << bits) - 1)) - half
    return values & ((1 << bits) - 1)


def round_to_even(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return float32 `values` as `dtype` holds them, bfloat16 with ties to even: what kernels of the SFPU round to it.

    May modify `values`; the packer's rounding, for the other dtypes, is round_on_device's.
    """
    if dtype is DataType.BFLOAT16:
        return values.to(torch.bfloat16).to(torch.float32)
    return round_on_device(values, dtype)


def convert(values: torch.Tensor, source: DataType, dtype: DataType) -> torch.Tensor:
    """Return `values` of dtype `source` in `dtype`, in memory of their own.

    Floats to INT32 and UINT32 are cut towards zero and end at the range's ends (NaN as infinity of its sign); to UINT16
    they are rounded, ties away from zero, and end at its ends; to UINT8 they are cut and wrap. Integers to UINT16 end at
    its ends; to the others they wrap.
    """
    if source is dtype:
        return values.clone()
    if source.is_float:
        if not dtype.is_float:
            return _integers(values, dtype)
        if source is DataType.FLOAT32:
            return round_to_even(values.clone(), dtype)
        return round_on_device(values.clone(), dtype)
    if dtype.is_float:
        return round_on_device(values.to(torch.float32), dtype)
    return values.clamp(0, 0xFFFF) if dtype is DataType.UINT16 else wrap(values, dtype)


def _integers(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    exact = values.to(torch.float64)
    exact = torch.where(exact.isnan(), torch.copysign(torch.full_like(exact, torch.inf), exact), exact)
    if dtype is DataType.UINT16:
        return exact.clamp(0, 0xFFFF).add_(0.5).floor_().clamp_(max=0xFFFF).to(torch.int64)
    if dtype is DataType.UINT32:
        return exact.clamp(0, 2.0**32 - 1).trunc_().to(torch.int64)
    whole = exact.clamp(-(2.0**31), 2.0**31 - 1).trunc_().to(torch.int64)
    if dtype is DataType.INT32:
        return whole
    return wrap(torch.where(exact.abs() < 2.0**31, whole, 0), dtype)
