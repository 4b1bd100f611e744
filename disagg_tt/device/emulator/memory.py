"""The memory of a mesh's chips: what each tensor takes of every DRAM bank or core's L1, and what is left.

Only the sizes are modelled, not the addresses: memory that real allocations have fragmented counts as free here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from disagg_tt.device.emulator.spec import TensorSpec
from disagg_tt.device.emulator.types import TILE_SIZE, BufferType, CoreCoord, Layout
from disagg_tt.errors import DeviceError

DRAM_BANKS = 12
# What ttnn.get_memory_view gives on the mock cluster, and how it rounds.
DRAM_BANK_BYTES = 1_072_693_184
L1_CORE_BYTES = 1_393_312
L1_MOST_BYTES = 1_463_968
PAGE_ALIGNMENT = {BufferType.DRAM: 32, BufferType.L1: 16}
BANK_ALIGNMENT = 32
TRACE_ALIGNMENT = 8192


class Memory:
    """Bytes in use in each DRAM bank and each core's L1 of a mesh's chips; all chips of a mesh allocate alike.

    Attributes:
        overlapping: the memories of other meshes on some of the same chips (a mesh and its submeshes). Each mesh has
            an allocator that does not know of the others, so two of them in use would lie over each other.
    """

    def __init__(
        self, grid: CoreCoord, l1_small_size: int = 0, trace_region_size: int = 0, worker_l1_size: int = 0
    ):
        self._sizes_asked = (l1_small_size, trace_region_size, worker_l1_size)
        if worker_l1_size > L1_MOST_BYTES:
            raise DeviceError(
                f"worker_l1_size={worker_l1_size}; allowed: at most {L1_MOST_BYTES} B, 0 for the default"
            )
        self.grid = grid
        self.l1_small = up(l1_small_size, BANK_ALIGNMENT)
        self.trace_region = up(-(-trace_region_size // DRAM_BANKS), TRACE_ALIGNMENT)
        l1 = worker_l1_size // BANK_ALIGNMENT * BANK_ALIGNMENT or L1_CORE_BYTES
        self.banks = {BufferType.DRAM: DRAM_BANKS, BufferType.L1: grid.x * grid.y}
        self.limit = {
            BufferType.DRAM: DRAM_BANK_BYTES - self.trace_region,
            BufferType.L1: l1 - self.l1_small,
        }
        for kind, what in ((BufferType.DRAM, "trace_region_size"), (BufferType.L1, "l1_small_size")):
            if self.limit[kind] <= 0:
                raise DeviceError(
                    f"{what} is as large as all of {kind.name}; leave room for tensors beside it"
                )
        self.used = {BufferType.DRAM: 0, BufferType.L1: 0}
        self.peak = {BufferType.DRAM: 0, BufferType.L1: 0}
        self.overlapping: list[Memory] = []
        self._sizes: dict[TensorSpec, int] = {}

    def allocate(self, spec: TensorSpec) -> int:
        """Take what a tensor of `spec` needs of every bank and return it; raises DeviceError when it is not there."""
        per_bank = self._sizes.get(spec)
        if per_bank is None:
            per_bank = self._sizes[spec] = self.per_bank(spec)
        kind = spec.memory_config.buffer_type
        used = self.used[kind] + per_bank
        if self.overlapping or used > self.peak[kind]:
            self.take(kind, per_bank, spec)
        else:
            self.used[kind] = used
        return per_bank

    def take(self, kind: BufferType, per_bank: int, what: object) -> None:
        """Take `per_bank` bytes of every bank; raises DeviceError when they are not there."""
        used = self.used[kind] + per_bank
        if used > self.limit[kind]:
            place = "DRAM bank" if kind is BufferType.DRAM else "core's L1"
            raise DeviceError(
                f"out of {kind.name}: {what} needs {per_bank:,} B of each {place}, {self.limit[kind] - self.used[kind]:,} of "
                f"{self.limit[kind]:,} B are free; free tensors, or use a smaller cache, batch or weight dtype"
            )
        for other in self.overlapping:
            if other.used[kind] and per_bank:
                raise DeviceError(
                    f"{what} in {kind.name} of a mesh while another mesh on the same chips holds {other.used[kind]:,} B a bank "
                    "there; a mesh and its submeshes allocate without knowing of each other, so on hardware the tensors would "
                    "overwrite each other. Free those first, or allocate on one of the meshes only"
                )
        self.used[kind] = used
        if used > self.peak[kind]:
            self.peak[kind] = used

    def release(self, kind: BufferType, per_bank: int) -> None:
        self.used[kind] -= per_bank

    def sibling(self) -> Memory:
        """Return the memory of a submesh: as large as this one, and empty."""
        return Memory(self.grid, *self._sizes_asked)

    def share(self, other: Memory) -> None:
        """Note that `other` belongs to a mesh on some of the same chips."""
        self.overlapping.append(other)
        other.overlapping.append(self)

    def leave(self) -> None:
        """Undo `share`: the mesh is closed."""
        for other in self.overlapping:
            other.overlapping.remove(self)
        self.overlapping = []

    def per_bank(self, spec: TensorSpec) -> int:
        """Return the bytes that a tensor of `spec` takes in each bank: a shard, or whole pages dealt round the banks.

        Raises DeviceError for a place that the chip does not have.
        """
        place = spec.memory_config
        kind = place.buffer_type
        if kind not in self.banks:
            raise DeviceError(f"{spec!r}; tensors can be allocated in DRAM and L1 only")
        page = up(spec.page, PAGE_ALIGNMENT[kind])
        if not place.is_sharded():
            return up(-(-spec.pages // self.banks[kind]) * page, BANK_ALIGNMENT)
        shard = place.shard_spec
        assert shard is not None
        banks = (DRAM_BANKS, 1) if kind is BufferType.DRAM else (self.grid.x, self.grid.y)
        for core in spec.shard_cores():
            if core.x >= banks[0] or core.y >= banks[1]:
                raise DeviceError(
                    f"{spec!r}: core {core} has no {kind.name} bank; the chip has {banks[0]}x{banks[1]} (dram_grid_size, "
                    "compute_with_storage_grid_size)"
                )
        height, width = shard.shape
        rows = height // TILE_SIZE * (width // TILE_SIZE) if spec.layout is Layout.TILE else height
        return up(rows * page, BANK_ALIGNMENT)


@dataclass(frozen=True)
class MemoryView:
    """What ttnn.get_memory_view tells of one kind of memory; free memory is not fragmented here."""

    num_banks: int
    total_bytes_per_bank: int
    total_bytes_allocated_per_bank: int
    total_bytes_free_per_bank: int
    largest_contiguous_bytes_free_per_bank: int
    block_table: list[dict[str, str]] = field(default_factory=list)


def get_memory_view(device: Any, buffer_type: BufferType) -> MemoryView:
    """Return how much of `buffer_type` each bank of `device` has, uses and has free, in bytes."""
    memory: Memory = device.memory
    if buffer_type in memory.banks:
        banks, total = memory.banks[buffer_type], memory.limit[buffer_type]
    elif buffer_type is BufferType.TRACE:
        banks, total = DRAM_BANKS, memory.trace_region
    else:
        banks, total = memory.banks[BufferType.L1] if memory.l1_small else 0, memory.l1_small
    used = memory.used.get(buffer_type, 0)
    return MemoryView(banks, total, used, total - used, total - used)


def get_dram_alignment() -> int:
    """Return the bytes that pages of DRAM tensors are aligned to."""
    return PAGE_ALIGNMENT[BufferType.DRAM]


def get_l1_alignment() -> int:
    """Return the bytes that pages of L1 tensors are aligned to."""
    return PAGE_ALIGNMENT[BufferType.L1]


def get_max_worker_l1_unreserved_size() -> int:
    """Return the largest worker_l1_size."""
    return L1_MOST_BYTES


def up(size: int, to: int) -> int:
    """Return `size` rounded up to a multiple of `to`."""
    return -(-size // to) * to
