"""Helpers of op validation: checks whose messages say what was given, what is allowed and what to do."""

from __future__ import annotations

import math

from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.types import DRAM_MEMORY_CONFIG, DataType, Layout, MemoryConfig, ShardSpec
from disagg_tt.errors import DeviceError, NotEmulatedError


def need(condition: bool, op: str, message: str) -> None:
    """Raise DeviceError naming `op` unless `condition`."""
    if not condition:
        raise DeviceError(f"{op}: {message}")


def leave_out(op: str, **given: object) -> None:
    """Arguments of ttnn that the emulator does not have: each must be None or False; raises NotEmulatedError."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotEmulatedError(f"{op}: the emulator does not take {name}; leave it out")


def emulated(condition: bool, op: str, message: str) -> None:
    """Raise NotEmulatedError naming `op` unless `condition`; `message` continues "the emulator does not"."""
    if not condition:
        raise NotEmulatedError(f"{op}: the emulator does not {message}")


def need_tile(op: str, **specs: Spec) -> None:
    """Each named input must be in TILE layout."""
    for name, spec in specs.items():
        if spec.layout is not Layout.TILE:
            raise DeviceError(f"{op}: {name} {spec!r} must be in TILE layout; convert it with to_layout")


def need_dtype(op: str, name: str, spec: Spec, *allowed: DataType) -> None:
    """The named input's dtype must be one of `allowed`."""
    if spec.dtype not in allowed:
        names = ", ".join(d.value for d in allowed)
        raise DeviceError(f"{op}: {name} is {spec.dtype.value}; allowed: {names}; use typecast")


def placed(memory_config: MemoryConfig | None, default: MemoryConfig | None = None) -> MemoryConfig:
    """Return the output's memory config: the one asked for, else `default`, else interleaved DRAM."""
    return memory_config or default or DRAM_MEMORY_CONFIG


def broadcast(op: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an elementwise op on shapes `a` and `b`: axes of 1, and missing first axes, are repeated."""
    rank = max(len(a), len(b))
    first, second = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    for axis, (x, y) in enumerate(zip(first, second, strict=True)):
        need(
            x == y or (1 in (x, y) and rank - axis <= 6),
            op,
            f"shapes {list(a)} and {list(b)} differ on axis {axis - rank}; sizes must be equal, or 1 on the last 6 axes",
        )
    return tuple(y if x == 1 else x for x, y in zip(first, second, strict=True))


def adjusted(place: MemoryConfig, before: tuple[int, ...], after: tuple[int, ...]) -> MemoryConfig:
    """Return the sharded `place` of a tensor padded to `before` for one padded to `after`, on the same cores.

    A shard keeps its part of the rows and of the columns, but has at least 32 of each.
    """
    shard = place.shard_spec
    assert shard is not None
    rows = [math.prod(shape[:-1]) for shape in (before, after)]
    height = max(shard.shape[0] * rows[1] // rows[0], 32)
    width = max(shard.shape[1] * after[-1] // before[-1], 32)
    return MemoryConfig(
        place.memory_layout, place.buffer_type, ShardSpec(shard.grid, (height, width), shard.orientation)
    )


def same_place(op: str, a: Spec, asked: MemoryConfig | None) -> MemoryConfig:
    """Return where the result of an op of one tensor lies: as asked, else as its input; shards not told are the input's."""
    if asked is None:
        return a.memory_config
    if not asked.is_sharded() or asked.shard_spec is not None:
        return asked
    here = a.memory_config
    alike = (
        here.shard_spec is not None and here.memory_layout is asked.memory_layout and a.layout is Layout.TILE
    )
    emulated(alike, op, f"choose shards for {asked!r}; give it a shard spec")
    return MemoryConfig(asked.memory_layout, asked.buffer_type, a.memory_config.shard_spec)
