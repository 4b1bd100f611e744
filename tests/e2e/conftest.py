"""Where tests find the examples' modules, and a host without meshes for each test.

A run that fails in this process leaves its meshes open; the next test finds the emulator's host as new.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_tt.device.emulator import mesh, system
from disagg_tt.device.emulator.types import FabricConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "train_tiny_llama")]


@pytest.fixture(autouse=True)
def _host_as_new() -> Iterator[None]:
    yield
    system.open_chips.clear()
    mesh._fabric = FabricConfig.DISABLED
