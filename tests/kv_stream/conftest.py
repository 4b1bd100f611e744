"""A stream that fails in this process leaves its meshes open; the next test finds the emulator's host as new."""

from collections.abc import Iterator

import pytest

from disagg_tt.device.emulator import mesh, system
from disagg_tt.device.emulator.types import FabricConfig


@pytest.fixture(autouse=True)
def _host_as_new() -> Iterator[None]:
    yield
    system.open_chips.clear()
    mesh._fabric = FabricConfig.DISABLED
