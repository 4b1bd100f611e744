"""The methods of ttnn.Tensor: what it tells of itself, how it moves, and operators, which are the ops of that name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.memory import PAGE_ALIGNMENT, up
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.spec import TensorSpec
from disagg_tt.device.emulator.types import DataType, Layout, MemoryConfig, Shape, StorageType, Tile
from disagg_tt.errors import DeviceError, NotEmulatedError

_PACKAGE = __name__.rpartition(".")[0]


def op(name: str) -> Any:
    """Return the emulator's ttnn.<name>; raises NotEmulatedError when it has none."""
    found = getattr(sys.modules[_PACKAGE], name, None)
    if found is None:
        raise NotEmulatedError(f"this needs ttnn.{name}, which the emulator does not have")
    return found


def _on_host(name: str) -> Any:
    """Return a function of host.py, which imports this module."""
    return getattr(sys.modules[f"{_PACKAGE}.host"], name)


def _operator(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: op(name)(self, other)


class TensorMethods:
    """What follows from a tensor's spec and place; see tensor.py for what a tensor is."""

    __slots__ = ()

    spec: TensorSpec
    _mesh: MeshDevice | None

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    @property
    def padded_shape(self) -> Shape:
        return self.spec.padded_shape

    @property
    def dtype(self) -> DataType:
        return self.spec.dtype

    @property
    def layout(self) -> Layout:
        return self.spec.layout

    @property
    def tile(self) -> Tile:
        return Tile()

    def get_dtype(self) -> DataType:
        return self.spec.dtype

    def get_layout(self) -> Layout:
        return self.spec.layout

    def get_tile(self) -> Tile:
        return Tile()

    def memory_config(self) -> MemoryConfig:
        return self.spec.memory_config

    def device(self) -> MeshDevice | None:
        """Return the tensor's mesh, None on the host."""
        return self._mesh

    def devices(self) -> list[MeshDevice | None]:
        return [self._mesh]

    def storage_type(self) -> StorageType:
        return StorageType.HOST if self._mesh is None else StorageType.DEVICE

    def is_sharded(self) -> bool:
        return self.spec.memory_config.is_sharded()

    def logical_volume(self) -> int:
        """Return the number of elements of one chip's part."""
        return math.prod(self.spec.shape)

    def volume(self) -> int:
        """Return the number of elements of one chip's part with its padding."""
        return math.prod(self.spec.padded_shape)

    def element_size(self) -> int:
        """Return the bytes of an element; raises DeviceError for block floats, whose elements share an exponent."""
        if self.spec.dtype.is_block_float:
            raise DeviceError(
                f"element_size of {self.spec.dtype.value}; its elements have no size of their own"
            )
        return self.spec.dtype.bytes_of(1)

    def buffer_page_size(self) -> int:
        """Return the bytes of one page: a packed tile, or a row in ROW_MAJOR layout."""
        self._need_device("buffer_page_size")
        return self.spec.page

    def buffer_aligned_page_size(self) -> int:
        """Return the bytes from one page of a bank to the next."""
        self._need_device("buffer_aligned_page_size")
        return up(self.spec.page, PAGE_ALIGNMENT[self.spec.memory_config.buffer_type])

    def buffer_num_pages(self) -> int:
        """Return the pages of one chip's part."""
        self._need_device("buffer_num_pages")
        return self.spec.pages

    def _need_device(self, what: str) -> None:
        if self._mesh is None:
            raise DeviceError(f"{what}: {self.spec!r} is on the host; only device tensors have buffers")

    def to(
        self,
        device: MeshDevice | Layout | None = None,
        mem_config: MemoryConfig | None = None,
        cq_id: int | None = None,
        *,
        target_layout: Layout | None = None,
    ) -> Any:
        """Return the tensor on a device, or in another layout where it is."""
        target = device if target_layout is None else target_layout
        if isinstance(target, MeshDevice):
            return op("to_device")(self, target, mem_config, queue_id=cq_id)
        if not isinstance(target, Layout):
            raise TypeError(f"Tensor.to takes a MeshDevice or a Layout, not a {type(target).__name__}")
        return op("to_layout")(self, target)

    def cpu(self, blocking: bool = True, cq_id: int | None = None) -> Any:
        """Return the tensor on the host."""
        return op("from_device")(self, blocking, queue_id=cq_id)

    def host_buffer(self) -> Any:
        """Return the bytes of a host tensor, a part for each chip; see host_buffer.py."""
        return sys.modules[f"{_PACKAGE}.host_buffer"].host_buffer(self)

    def to_torch(self, mesh_composer: Any = None) -> torch.Tensor:
        values: torch.Tensor = op("to_torch")(self, mesh_composer=mesh_composer)
        return values

    def to_numpy(self, mesh_composer: Any = None) -> Any:
        values = self.to_torch(mesh_composer)
        return (values.float() if values.dtype is torch.bfloat16 else values).numpy()

    def to_list(self) -> Any:
        return self.to_torch().tolist()

    def item(self) -> Any:
        """Return the only element as a Python number; raises DeviceError where there are more."""
        if self.logical_volume() != 1:
            raise DeviceError(f"item of a tensor of {self.logical_volume()} elements; it must have one")
        return self.to_torch().item()

    def reshape(self, *shape: Any) -> Any:
        """Return the tensor in another shape: four numbers, or a sequence with at most one -1."""
        if len(shape) not in (1, 4):
            raise TypeError(f"Tensor.reshape takes four numbers or one sequence, not {len(shape)} arguments")
        dims = list(shape[0] if len(shape) == 1 else shape)
        return op("reshape")(self, dims)

    def __getitem__(self, index: Any) -> Any:
        """Return a part, as in torch: integers (their axis goes), slices and one ellipsis."""
        rank, items = len(self.spec.shape), list(index) if isinstance(index, (tuple, list)) else [index]
        if items.count(Ellipsis) > 1:
            raise ValueError("one ellipsis at most")
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
        if len(items) > rank:
            raise IndexError(f"{len(items)} indices for a tensor of rank {rank}")
        items += [slice(None)] * (rank - len(items))
        spans, gone = [], []
        for axis, (item, size) in enumerate(zip(items, self.spec.shape, strict=True)):
            if isinstance(item, int):
                if not -size <= item < size:
                    raise IndexError(f"index {item} of axis {axis}, which is {size} long")
                gone.append(axis)
                spans.append((item % size, item % size + 1, 1))
            elif isinstance(item, slice):
                first = 0 if item.start is None else item.start
                spans.append((first, size if item.stop is None else item.stop, item.step or 1))
            else:
                raise TypeError(f"a tensor is indexed by integers and slices, not by a {type(item).__name__}")
        if self._mesh is None:
            return _on_host("part")(self, spans, gone)
        part = op("slice")(self, *([span[i] for span in spans] for i in range(3)))
        for axis in reversed(gone):
            part = op("squeeze")(part, axis)
        return part

    __add__ = __radd__ = _operator("add")
    __sub__, __rsub__ = _operator("subtract"), _operator("rsub")
    __mul__ = __rmul__ = _operator("multiply")
    __truediv__, __rtruediv__ = _operator("divide"), _operator("rdiv")
    __matmul__ = _operator("matmul")
    __gt__, __ge__, __lt__, __le__ = (_operator(name) for name in ("gt", "ge", "lt", "le"))
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return op("eq")(self, other)

    def __ne__(self, other: object) -> Any:
        return op("ne")(self, other)

    def __getattr__(self, name: str) -> Any:
        if name in _LACKING:
            raise NotEmulatedError(f"Tensor.{name}: the emulator does not have it")
        raise AttributeError(f"ttnn.Tensor has no {name}")


_LACKING = {
    "buffer_address",
    "buffer_unique_id",
    "device_coords",
    "experimental_per_core_buffer_address",
    "extract_shard",
    "is_per_core_allocated",
    "is_range_lockstep_allocated",
    "pad",
    "pad_to_tile",
    "tensor_id",
    "tensor_topology",
    "to_torch_with_padded_shape",
    "unpad",
    "unpad_from_tile",
    "update_tensor_topology",
}
