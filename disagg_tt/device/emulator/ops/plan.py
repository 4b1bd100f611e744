"""Helpers of op validation: checks whose messages say what was given, what is allowed and what to do."""

from __future__ import annotations

from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.types import DRAM_MEMORY_CONFIG, DataType, Layout, MemoryConfig
from disagg_tt.errors import DeviceError


def need(condition: bool, op: str, message: str) -> None:
    """Raise DeviceError naming `op` unless `condition`."""
    if not condition:
        raise DeviceError(f"{op}: {message}")


def need_tile(op: str, **specs: Spec) -> None:
    """Each named input must be in TILE layout."""
    for name, spec in specs.items():
        need(
            spec.layout is Layout.TILE,
            op,
            f"{name} {spec!r} must be in TILE layout; convert it with to_layout",
        )


def need_dtype(op: str, name: str, spec: Spec, *allowed: DataType) -> None:
    """The named input's dtype must be one of `allowed`."""
    names = ", ".join(d.value for d in allowed)
    need(spec.dtype in allowed, op, f"{name} is {spec.dtype.value}; allowed: {names}; use typecast")


def placed(memory_config: MemoryConfig | None, default: MemoryConfig | None = None) -> MemoryConfig:
    """Return the output's memory config: the one asked for, else `default`, else interleaved DRAM."""
    return memory_config or default or DRAM_MEMORY_CONFIG
