"""The bytes of host tensors: `tensor.host_buffer()`, a writable uint8 view of every chip's part, packed as ttnn packs it.

    host = allocate_tensor_on_host(spec, mesh)
    view = torch.from_dlpack(host.host_buffer().get_shard(MeshCoordinate(0, 1)))      uint8 [bytes of the packed part]

In TILE layout the tiles follow one another, row by row of them, and each is four faces of 16 x 16 values; a block-float
tile begins with its 64 exponents. Padding is zeros. As long as nobody has asked for bytes a host tensor holds values, which
cost nothing to convert; from then on the bytes are what it holds, and its values are read from them each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from disagg_tt.device.emulator.coordinates import MeshCoordinate, MeshShape
from disagg_tt.device.emulator.numeric import pack, unpack
from disagg_tt.device.emulator.spec import TensorSpec
from disagg_tt.device.emulator.tensor import Tensor, Values, once, whole
from disagg_tt.device.emulator.types import TILE_SIZE, Layout
from disagg_tt.errors import DeviceError, NotEmulatedError

_FACE = 16
_ROWS_A_TILE = TILE_SIZE * TILE_SIZE // _FACE  # each has one exponent, in block floats


class HostValues(Values):
    """The values of a host tensor that may be seen as bytes: `data`, [parts, *shape], is made of them once they are."""

    __slots__ = ("_data", "bytes", "mesh_shape", "spec")

    def __init__(self, spec: TensorSpec, mesh_shape: MeshShape, data: torch.Tensor):
        self.spec, self.mesh_shape = spec, mesh_shape
        self.bytes: list[torch.Tensor] | None = None
        super().__init__(data)

    @property
    def data(self) -> torch.Tensor | None:
        if self.bytes is None:
            return self._data
        return torch.stack([unpacked(part, self.spec) for part in self.bytes])

    @data.setter
    def data(self, values: torch.Tensor | None) -> None:
        self.hold(values)

    def hold(self, values: torch.Tensor | None) -> None:
        if values is not None and values.dtype is torch.bfloat16:
            values = once(values).float().expand(values.shape)
        if self.bytes is None or values is None:
            self._data = values
            return
        for i, part in enumerate(self.bytes):
            if i == 0 or values.stride(0):
                packed_part = packed(values[i], self.spec)
            part.copy_(packed_part)

    def as_bytes(self) -> list[torch.Tensor]:
        """Return each part's bytes, from now on what the tensor holds."""
        if self.bytes is None:
            values = whole(self._data, self.spec)
            chips = self.mesh_shape.mesh_size()
            self.bytes = [packed(part, self.spec) for part in values.expand(chips, *values.shape[1:])]
            self._data = None
        return self.bytes


class HostBuffer:
    """One chip's bytes, for torch.from_dlpack and numpy.from_dlpack."""

    def __init__(self, data: torch.Tensor):
        self._data = data

    def __dlpack__(self, **options: Any) -> Any:
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._data.__dlpack_device__()

    def __len__(self) -> int:
        return self._data.numel()

    def __getitem__(self, index: int) -> int:
        return int(self._data[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self._data.tolist())


class DistributedHostBuffer:
    """The bytes of a host tensor, a part for each chip of its mesh."""

    def __init__(self, values: HostValues):
        self._shape, self._parts = values.mesh_shape, values.as_bytes()

    def shape(self) -> MeshShape:
        return self._shape

    def is_local(self, coord: MeshCoordinate) -> bool:
        """Return whether this process holds the part at `coord`; raises DeviceError outside the mesh."""
        return self._index(coord) >= 0

    def get_shard(self, coord: MeshCoordinate) -> HostBuffer:
        """Return the part at `coord`; raises DeviceError outside the mesh."""
        return HostBuffer(self._parts[self._index(coord)])

    def _index(self, coord: MeshCoordinate) -> int:
        if not isinstance(coord, MeshCoordinate):
            raise TypeError(f"get_shard takes a MeshCoordinate, not a {type(coord).__name__}")
        dims, index = tuple(self._shape), 0
        if len(tuple(coord)) != len(dims) or any(c >= d for c, d in zip(coord, dims, strict=True)):
            raise DeviceError(f"{coord!r} is outside of {self._shape!r}")
        for place, size in zip(coord, dims, strict=True):
            index = index * size + place
        return index


def host_buffer(tensor: Tensor) -> DistributedHostBuffer:
    """Return the bytes of a host tensor; raises DeviceError for one on a device."""
    if tensor._mesh is not None:
        raise DeviceError(f"host_buffer: {tensor.spec!r} is on a device; only host tensors have one (cpu())")
    values = tensor._values
    if values.writer is not None and not values.writer.host_knows(values.written):
        raise DeviceError(
            f"host_buffer: a host tensor that {values.writer.name} may still be writing; wait with synchronize_device"
        )
    if not isinstance(values, HostValues):
        data = whole(values.data, tensor.spec)
        if data.shape[0] > 1:
            raise NotEmulatedError(
                "host_buffer: the emulator does not have it for host tensors in several parts, except those of "
                "allocate_tensor_on_host (into which copy_device_to_host_tensor copies)"
            )
        values = tensor._values = HostValues(tensor.spec, MeshShape(1, 1), data)
    return DistributedHostBuffer(values)


def packed(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the bytes (uint8, one axis) of one part's values, `spec.shape`."""
    full = _padded(values, spec)
    if spec.layout is not Layout.TILE:
        return pack(full, spec.dtype)
    data = pack(_faces(full).contiguous(), spec.dtype)
    return _by_tile(data, spec) if spec.dtype.is_block_float else data


def unpacked(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the values, `spec.shape`, in one part's bytes: the inverse of `packed`."""
    shape = tuple(spec.padded_shape)
    if spec.layout is Layout.TILE:
        if spec.dtype.is_block_float:
            tiles = data.view(math.prod(shape) // TILE_SIZE**2, -1)
            data = torch.cat([tiles[:, :_ROWS_A_TILE].reshape(-1), tiles[:, _ROWS_A_TILE:].reshape(-1)])
        lead, high, wide = math.prod(shape[:-2]), shape[-2] // TILE_SIZE, shape[-1] // TILE_SIZE
        faces = unpack(data, (lead, high, wide, 2, 2, _FACE, _FACE), spec.dtype)
        full = faces.permute(0, 1, 3, 5, 2, 4, 6).reshape(shape)
    else:
        full = unpack(data, shape, spec.dtype)
    if shape == tuple(spec.shape):
        return full
    return full[tuple(slice(0, size) for size in _leading(spec))].reshape(tuple(spec.shape))


def _leading(spec: TensorSpec) -> list[int]:
    """Return the shape with as many axes as the padded shape has."""
    return [1] * (len(spec.padded_shape) - len(spec.shape)) + list(spec.shape)


def _padded(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return `values` in the padded shape, filled up with zeros."""
    shape, padded = _leading(spec), list(spec.padded_shape)
    values = values.reshape(shape)
    if shape == padded:
        return values
    margins = [m for size, to in zip(reversed(shape), reversed(padded), strict=True) for m in (0, to - size)]
    return torch.nn.functional.pad(values, margins)


def _faces(full: torch.Tensor) -> torch.Tensor:
    """Return values in the order of memory: [.., tile rows, tile columns, 2, 2, 16, 16]."""
    high, wide = full.shape[-2] // TILE_SIZE, full.shape[-1] // TILE_SIZE
    return full.reshape(-1, high, 2, _FACE, wide, 2, _FACE).permute(0, 1, 4, 2, 5, 3, 6)


def _by_tile(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return packed block floats, all exponents first, with each tile's exponents before its values."""
    tiles = math.prod(spec.padded_shape) // TILE_SIZE**2
    exponents = tiles * _ROWS_A_TILE
    parts = data[:exponents].view(tiles, -1), data[exponents:].view(tiles, -1)
    return torch.cat(parts, dim=1).reshape(-1)
