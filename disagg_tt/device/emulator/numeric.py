"""Rounding to ttnn's dtypes, and packing to the bytes that a device holds, which travel over sockets.

bfloat16 and the block floats are held as float32 tensors of exactly representable values (a CPU multiplies float32 about
three times faster than bfloat16). Ties differ by where the rounding happens (seen on a simulated Wormhole and on ttnn's
own host conversions): the host rounds ties to even, the device's packer away from zero.

A block-float tile is 64 blocks of 16 values along a row: one shared exponent byte a block, that of the largest
magnitude, then per value a sign and 7 (bfloat8_b) or 3 (bfloat4_b) magnitude bits.
"""

from __future__ import annotations

import torch

from disagg_tt.device.emulator.types import DataType

BLOCK = 16
_BITS = {DataType.BFLOAT8_B: 7, DataType.BFLOAT4_B: 3}
# Constants are tensors, since torch converts a Python number anew at every call: 2 us of a small op's 4.
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)
_HALF_BFLOAT16, _KEPT_BY_BFLOAT16 = torch.tensor([0x8000, -0x10000], dtype=torch.int32)
_HALF, _ZERO = torch.tensor([0.5, 0.0])


def round_on_host(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return float32 or int64 `values` as `dtype` can hold them, as from_torch converts: ties to even.

    NaNs become the one NaN 0x7FC00000, of which round_on_device's arithmetic on bits makes no number.
    """
    if dtype is DataType.BFLOAT16:
        return values.to(torch.bfloat16).to(torch.float32)
    if dtype.is_block_float:
        return _round_block(values.to(torch.float32), _BITS[dtype], away=False)
    values = values.to(dtype.storage)
    return values.where(values == values, float("nan")) if dtype is DataType.FLOAT32 else values


def round_on_device(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return float32 `values` as the device packs them into `dtype`: ties away from zero. May modify `values`."""
    if dtype is DataType.BFLOAT16:
        # Half of the last kept place is added to the magnitude's bits, then the dropped bits are cleared.
        values.view(torch.int32).add_(_HALF_BFLOAT16).bitwise_and_(_KEPT_BY_BFLOAT16)
        return values
    if dtype.is_block_float:
        return _round_block(values, _BITS[dtype], away=True)
    return values


def _round_block(values: torch.Tensor, bits: int, away: bool) -> torch.Tensor:
    """Round rows of 16 values to one shared exponent each; the last axis is padded with zeros to whole blocks.

    Zeros have no sign. A block whose largest magnitude is below 2^-120 becomes zero (ttnn's host keeps some of it).
    """
    width = values.shape[-1]
    if width % BLOCK:
        values = torch.nn.functional.pad(values, (0, BLOCK - width % BLOCK))
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # The step between two magnitudes of a block is 2^(exponent - bits + 1); its reciprocal is exact as well.
    exponent = largest.view(torch.int32).bitwise_and(_EXPONENT)
    step = (exponent - ((bits - 1) << 23)).clamp_(min=0).view(torch.float32)
    inverse = torch.where(step > _ZERO, step.reciprocal(), _ZERO)
    scaled = blocks * inverse
    limit = float(2**bits - 1)
    rounded = scaled.abs().add_(_HALF).floor_().copysign_(scaled) if away else scaled.round()
    result = rounded.clamp_(-limit, limit).mul_(step).add_(0.0).reshape(values.shape)
    return result[..., :width] if width != values.shape[-1] else result


def pack(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return the bytes (uint8, one axis) of `values`, whose last two axes are whole tiles for block floats.

    Block floats: all exponent bytes of the tensor, then one byte (or half) a value; the order inside a tile differs from
    the device's, the size, 1,088 bytes a bfloat8_b tile, does not.
    """
    if dtype is DataType.BFLOAT16:
        return values.contiguous().view(torch.int16).reshape(-1)[1::2].contiguous().view(torch.uint8)
    if not dtype.is_block_float:
        torch_dtype = {"float32": torch.float32, "uint32": torch.int64, "int32": torch.int32}.get(
            dtype.value, torch.int64
        )
        raw = values.contiguous().to(torch_dtype)
        if torch_dtype is torch.int64:
            size = dtype.bytes_of(1)
            return raw.view(torch.uint8).reshape(-1, 8)[:, :size].contiguous().reshape(-1)
        return raw.view(torch.uint8).reshape(-1)
    bits = _BITS[dtype]
    blocks = values.reshape(-1, BLOCK)
    exponent = blocks.abs().amax(dim=-1, keepdim=True).view(torch.int32).bitwise_and(_EXPONENT)
    step = (exponent - ((bits - 1) << 23)).clamp_(min=0).view(torch.float32)
    magnitude = (blocks * torch.where(step > 0, 1.0 / step, 0.0)).to(torch.int16)
    codes = (magnitude.abs() + (magnitude < 0) * (1 << bits)).to(torch.uint8).reshape(-1)
    if bits == 3:
        codes = codes[0::2] | (codes[1::2] << 4)
    return torch.cat([(exponent >> 23).to(torch.uint8).reshape(-1), codes])


def unpack(data: torch.Tensor, shape: tuple[int, ...], dtype: DataType) -> torch.Tensor:
    """Return the float32 or int64 values, of `shape`, of bytes made by `pack`."""
    if dtype is DataType.BFLOAT16:
        wide = data.view(torch.int16).to(torch.int32) << 16
        return wide.view(torch.float32).reshape(shape)
    if not dtype.is_block_float:
        if dtype is DataType.FLOAT32:
            return data.clone().view(torch.float32).reshape(shape)
        if dtype is DataType.INT32:
            return data.clone().view(torch.int32).to(torch.int64).reshape(shape)
        size = dtype.bytes_of(1)
        wide = torch.zeros(data.numel() // size, 8, dtype=torch.uint8)
        wide[:, :size] = data.reshape(-1, size)
        return wide.view(torch.int64).reshape(shape)
    bits = _BITS[dtype]
    count = 1
    for axis in shape:
        count *= axis
    exponents, codes = data[: count // BLOCK], data[count // BLOCK :]
    if bits == 3:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1)
    step = ((exponents.to(torch.int32) << 23) - ((bits - 1) << 23)).clamp_(min=0).view(torch.float32)
    magnitude = (codes & (2**bits - 1)).to(torch.float32).reshape(-1, BLOCK) * step[:, None]
    return torch.where((codes >> bits).reshape(-1, BLOCK) > 0, -magnitude, magnitude).reshape(shape)
