"""Rounding to ttnn's dtypes, and packing to the bytes that a device holds, which travel over sockets.

bfloat16 and the block floats are computed with as float32 tensors of exactly representable values (a CPU multiplies float32
about three times faster than bfloat16, where it has no instructions for it). Ties differ by where the rounding happens (seen on a simulated Wormhole and on ttnn's
own host conversions): the host rounds ties to even, the device's packer away from zero.

A block-float tile is 64 blocks of 16 values along a row: one shared exponent byte a block, that of the largest
magnitude, then per value a sign and 7 (bfloat8_b) or 3 (bfloat4_b) magnitude bits. Zeros have no sign.
"""

from __future__ import annotations

import math

import torch

from disagg_tt.device.emulator.types import DataType

BLOCK = 16
_BITS = {DataType.BFLOAT8_B: 7, DataType.BFLOAT4_B: 3}
_PLACES = 23  # bits after a float32's leading one; its exponent field is above them, so `<< _PLACES` makes a power of 2
_SPECIAL = 255  # the exponent field of infinities and NaNs
# Constants are tensors, since torch converts a Python number anew at every call: 2 us of a small op's 4.
_EXPONENT, _MAGNITUDE, _ODD = torch.tensor([0x7F800000, 0x7FFFFFFF, 1], dtype=torch.int32)
_HALF_BFLOAT16, _KEPT_BY_BFLOAT16 = torch.tensor([0x8000, -0x10000], dtype=torch.int32)
_SMALLEST, _RECIPROCAL = torch.tensor([1 << _PLACES, 254 << _PLACES], dtype=torch.int32)
_NO_PLACES = {2**n: torch.tensor(1.5 * 2.0 ** (_PLACES + n)) for n in range(24)}  # see _to_multiples

_NATIVE = {
    DataType.UINT32: torch.uint32,
    DataType.INT32: torch.int32,
    DataType.UINT16: torch.uint16,
    DataType.UINT8: torch.uint8,
}

# What ttnn packs into block floats itself; it converts the rest to bfloat16 before.
_DIRECT = {torch.float32, torch.bfloat16, *_NATIVE.values()}


def round_on_host(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return `values`, of any real torch dtype, as `dtype` can hold them, as from_torch converts: float32 or int64.

    Floats: ties to even. Integers: see _integers. A NaN stays one, but which, only block floats keep: in float32 it becomes
    0x7FC00000, of which round_on_device's arithmetic on bits makes no number.
    """
    if dtype is DataType.BFLOAT16:
        return values.to(torch.bfloat16).to(torch.float32)
    if dtype.is_block_float:
        if values.dtype not in _DIRECT:
            values = values.to(torch.bfloat16)
        return _round_blocks(values.to(torch.float32), _BITS[dtype], away=False)
    if not dtype.is_float:
        return _integers(values, dtype)
    values = values.to(torch.float32)
    return values.where(values == values, float("nan"))


def round_on_device(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return float32 `values` as the device packs them into `dtype`: ties away from zero. May modify `values`."""
    if dtype is DataType.BFLOAT16:
        # Half of the last kept place is added to the magnitude's bits, then the dropped bits are cleared.
        values.view(torch.int32).add_(_HALF_BFLOAT16).bitwise_and_(_KEPT_BY_BFLOAT16)
        return values
    if dtype.is_block_float:
        return _round_blocks(values, _BITS[dtype], away=True)
    return values


def _integers(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return `values` as int64 within the range of `dtype`: fractions are cut off and integers wrap around.

    float32 and bfloat16 saturate in UINT16 and UINT8. What does not fit in 32 bits, NaN too, becomes 2^31 (INT32: -2^31;
    UINT16, UINT8: 0), as in whole vectors on ttnn's host; it has other values in the rest of a row, undefined by C++.
    """
    if values.dtype is _NATIVE[dtype]:
        return values.to(torch.int64)
    bits = 8 * dtype.bytes_of(1)
    if values.is_floating_point():
        fits = (values >= -(2.0**31)) & (values < (2.0**32 if dtype is DataType.UINT32 else 2.0**31))
        whole = values.where(fits, 0.0).to(torch.int64)
        if bits < 32 and values.dtype in (torch.float32, torch.bfloat16):
            whole = whole.clamp_(0, 2**bits - 1)
        values = whole.where(fits, 2**31)
    lowest = -(2**31) if dtype is DataType.INT32 else 0
    return (values.to(torch.int64) - lowest).bitwise_and_(2**bits - 1).add_(lowest)


def _round_blocks(values: torch.Tensor, bits: int, away: bool) -> torch.Tensor:
    """Round rows of 16 values to one shared exponent each; the last axis is padded with zeros to whole blocks.

    The host first cuts off what is below the last place of the block's largest value, so that a value just above a tie
    counts as one, and takes denormals for zeros. The device is not known to: it rounds what it has, once. Its step is
    at least 2^-126, the smallest normal number.
    """
    width = values.shape[-1]
    if width % BLOCK:
        values = torch.nn.functional.pad(values, (0, -width % BLOCK))
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)
    exponents = _exponents(blocks)
    if away:
        step, inverse = _steps(exponents, bits - 1)
        scaled = (blocks * inverse).clamp_(0.75 - 2**bits, 2**bits - 0.75)
        scaled.view(torch.int32).bitwise_or_(_ODD)  # a tie is a tie no longer, and all else stays on its side
        result = _to_multiples(scaled, 1).mul_(step)
    else:
        step, inverse = _steps(exponents, _PLACES)
        unit = 2 ** (_PLACES + 1 - bits)  # of the last place of the block's largest value
        scaled = (blocks * inverse).to(torch.int32).to(torch.float32)
        limit = float((2**bits - 1) * unit)
        result = _to_multiples(scaled, unit).clamp_(-limit, limit).mul_(step)
        rare = _rare(exponents, _PLACES + 1)
        if rare is not None:
            codes = _codes_bitwise(blocks[rare], exponents[rare], bits)
            result[rare] = _values_bitwise(codes, exponents[rare], bits)
    result = result.reshape(values.shape)
    return result[..., :width] if width != values.shape[-1] else result


def _exponents(blocks: torch.Tensor) -> torch.Tensor:
    """Return the exponent field of each block's largest magnitude, in its place: [..., 1] int32."""
    # As integers: torch's float maximum is three times slower, for its care about NaNs, which here are the largest.
    return blocks.view(torch.int32).bitwise_and(_MAGNITUDE).amax(-1, keepdim=True).bitwise_and_(_EXPONENT)


def _steps(exponents: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 2^(exponent - places), at least the smallest normal number, and its reciprocal: float32."""
    step = torch.maximum(exponents - (places << _PLACES), _SMALLEST)
    return step.view(torch.float32), (_RECIPROCAL - step).view(torch.float32)


def _rare(exponents: torch.Tensor, least: int) -> torch.Tensor | None:
    """Return which blocks, [...] bool, float32 arithmetic is not exact for, if any: their exponent field is below
    `least`, or they have an infinity or a NaN."""
    low, high = torch.aminmax(exponents)
    if int(low) >= least << _PLACES and int(high) < _SPECIAL << _PLACES:
        return None
    rare = ((exponents > 0) & (exponents < least << _PLACES)) | (exponents == _EXPONENT)
    return rare.squeeze(-1) if rare.any() else None


def _to_multiples(values: torch.Tensor, unit: int) -> torch.Tensor:
    """Round `values` in place to multiples of the power of two `unit`, ties to even, without negative zeros.

    Beside this large number float32 has no places below `unit`.
    """
    large = _NO_PLACES[unit]
    return values.add_(large).sub_(large)


def _codes_bitwise(blocks: torch.Tensor, exponents: torch.Tensor, bits: int) -> torch.Tensor:
    """Return sign and magnitude of each value as ttnn's host code makes them: int64. For all values, NaNs too; slow."""
    raw = blocks.view(torch.int32).to(torch.int64)
    exponent = (raw & 0x7F800000) >> _PLACES
    mantissa = torch.where(exponent > 0, raw & 0x7FFFFF | 0x800000, 0)
    mantissa >>= ((exponents >> _PLACES) - exponent).clamp(max=31)
    dropped = _PLACES + 1 - bits
    magnitude = mantissa >> dropped
    # The last kept place makes the sum carry above a tie, and at a tie if it is odd.
    magnitude = (mantissa + (1 << dropped - 1) - 1 + (magnitude & 1)) >> dropped
    magnitude = magnitude.clamp_(max=2**bits - 1)
    return magnitude + (((raw < 0) & (magnitude > 0)).to(torch.int64) << bits)


def _values_bitwise(codes: torch.Tensor, exponents: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the float32 values of signs and magnitudes; also of blocks with infinities, NaNs or the least exponents."""
    magnitude = codes & (2**bits - 1)
    raw = magnitude.to(torch.float32).view(torch.int32) + (exponents - (127 + bits - 1 << _PLACES))
    raw = torch.where(magnitude > 0, raw, 0)
    return torch.where(codes >> bits > 0, raw | -(2**31), raw).view(torch.float32)


def pack(values: torch.Tensor, dtype: DataType) -> torch.Tensor:
    """Return the bytes (uint8, one axis) of `values`, in either form, which for block floats are whole blocks.

    Block floats: all exponent bytes of the tensor, then one byte (or half) a value; the order inside a tile differs from
    the device's, the size, 1,088 bytes a bfloat8_b tile, does not.
    """
    if values.dtype is torch.bfloat16:
        if dtype is DataType.BFLOAT16:
            return values.contiguous().view(torch.uint8).reshape(-1)
        values = values.to(torch.float32)
    if dtype is DataType.BFLOAT16:
        upper = values.contiguous().view(torch.int16).reshape(-1)[1::2]
        return upper.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if dtype is DataType.FLOAT32:
        return values.contiguous().view(torch.uint8).reshape(-1)
    if not dtype.is_block_float:
        return values.contiguous().view(torch.uint8).reshape(-1, 8)[:, : dtype.bytes_of(1)].reshape(-1)
    bits = _BITS[dtype]
    blocks = values.reshape(-1, BLOCK)
    exponents = _exponents(blocks)
    signed = (blocks * _steps(exponents, bits - 1)[1]).to(torch.int8)
    codes = (
        signed.view(torch.uint8)
        .bitwise_and(128)
        .bitwise_right_shift_(7 - bits)
        .bitwise_or_(signed.abs().view(torch.uint8))
    )
    rare = _rare(exponents, bits)
    if rare is not None:
        codes[rare] = _codes_bitwise(blocks[rare], exponents[rare], bits).to(torch.uint8)
    if bits == 3:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat([(exponents >> _PLACES).to(torch.uint8).reshape(-1), codes.reshape(-1)])


def unpack(data: torch.Tensor, shape: tuple[int, ...], dtype: DataType) -> torch.Tensor:
    """Return the float32 or int64 values, of `shape`, of bytes made by `pack`."""
    if dtype is DataType.BFLOAT16:
        wide = data.view(torch.int16).to(torch.int32) << 16
        return wide.view(torch.float32).reshape(shape)
    if dtype is DataType.FLOAT32:
        return data.clone().view(torch.float32).reshape(shape)
    if not dtype.is_block_float:
        return data.clone().view(_NATIVE[dtype]).to(torch.int64).reshape(shape)
    bits = _BITS[dtype]
    count = math.prod(shape) // BLOCK
    exponents, codes = data[:count, None].to(torch.int32) << _PLACES, data[count:]
    magnitudes = _MAGNITUDES[bits].index_select(0, codes.to(torch.int32)).view(-1, BLOCK)
    values = magnitudes.mul_(_steps(exponents, bits - 1)[0])
    rare = _rare(exponents, bits)
    if rare is not None:
        if bits == 3:
            codes = torch.stack([codes & 15, codes >> 4], dim=1)
        values[rare] = _values_bitwise(codes.reshape(-1, BLOCK)[rare].to(torch.int32), exponents[rare], bits)
    return values.reshape(shape)


def _magnitudes(bits: int) -> torch.Tensor:
    """Return the signed magnitudes in each byte: [256, 1], or the two of bfloat4_b, [256, 2]."""
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits + 1)
    magnitude = (codes & (2**bits - 1)).to(torch.float32)
    return torch.where(codes >> bits & 1 > 0, -magnitude, magnitude)


_MAGNITUDES = {bits: _magnitudes(bits) for bits in _BITS.values()}
