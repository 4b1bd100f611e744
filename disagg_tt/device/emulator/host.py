"""What is done with tensors on the host only: another dtype, a part."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_tt.device.emulator.spec import make_spec
from disagg_tt.device.emulator.tensor import Tensor, Values, once
from disagg_tt.device.emulator.transfer import converted, read_parts
from disagg_tt.device.emulator.types import DataType, Layout
from disagg_tt.errors import DeviceError


def to_dtype(tensor: Tensor, dtype: DataType) -> Tensor:
    """Return a host tensor in another dtype, rounded as the host converts."""
    if tensor._mesh is not None:
        raise DeviceError(f"to_dtype: {tensor.spec!r} is on a device; use typecast there")
    layout = Layout.TILE if dtype.is_block_float else tensor.layout
    made = make_spec(tensor.shape, dtype, layout, tensor.memory_config())
    if made.padded_shape != tensor.padded_shape:
        raise DeviceError(
            f"to_dtype: {tensor.spec!r} to {dtype.value} needs padding; make it TILE layout first"
        )
    values = read_parts("to_dtype", tensor, as_held=True)
    return Tensor(made, None, Values(converted(once(values), dtype).expand(values.shape)))


def part(tensor: Tensor, spans: Sequence[tuple[int, int, int]], gone: Sequence[int]) -> Tensor:
    """Return a part of a host tensor: (start, stop, step) of each axis, then the axes of `gone` dropped."""
    if any(step != 1 for _, _, step in spans):
        raise DeviceError("a host tensor is cut with steps of 1 only; move it to the device for others")
    values = read_parts("slice", tensor, as_held=True)[
        tuple([slice(None)] + [slice(a, b) for a, b, _ in spans])
    ]
    shape = [size for axis, size in enumerate(values.shape[1:]) if axis not in gone]
    return Tensor(
        make_spec(shape, tensor.dtype, tensor.layout), None, Values(values.reshape(values.shape[0], *shape))
    )
