"""Generators of cases, and the documented differences of their ops.

Each module has GENERATORS: op -> function of a seeded random.Random that returns a Case; and KNOWN, a list (see known.py).
A generator mixes calls that should be accepted with calls that should not: wrong dtypes, layouts, axes, shapes, memory.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from random import Random
from typing import Any

from disagg_tt.conformance.case import Case
from disagg_tt.conformance.known import Known

Generator = Callable[[Random], Case]


def generators() -> dict[str, Generator]:
    """Return every op's generator, by name, from the modules of this folder."""
    every: dict[str, Generator] = {}
    for module in _modules():
        every.update(module.GENERATORS)
    return dict(sorted(every.items()))


def known_differences() -> list[Known]:
    """Return the documented differences of every module."""
    return [known for module in _modules() for known in module.KNOWN]


def _modules() -> list[Any]:
    return [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
