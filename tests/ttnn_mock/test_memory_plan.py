"""The memory map against the allocators that it foresees: the real runtime's and the emulator's, byte for byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from memory_probe import SETUPS
from runs import run

from disagg_tt.plan import DRAM_BYTES, Setup, decode_map

PROBE = Path(__file__).with_name("memory_probe.py")
pytestmark = pytest.mark.xdist_group("memory")  # one worker runs the two probes, all cases read their output


@pytest.fixture(scope="module")
def real(mock_environment: dict[str, str]) -> dict[str, Any]:
    return _probe(DISAGG_TT_DEVICE="ttnn", **mock_environment)


@pytest.fixture(scope="module")
def emulated() -> dict[str, Any]:
    return _probe(DISAGG_TT_DEVICE="emulator")


def _probe(**env: str) -> dict[str, Any]:
    done = run([sys.executable, str(PROBE)], **env)
    assert done.code == 0, done.err[-4000:]
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


def planned(setup: Setup) -> dict[str, int]:
    dram = decode_map(setup).dram
    return {
        "weights": sum(dram[item] for item in ("embedding", "layers", "lm_head", "norms")),
        "rope tables": dram["rope tables"],
        "cache": dram["K/V cache"] + dram["page table"],
    }


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("device", ["real", "emulated"])
def test_the_plan_equals_the_allocator_to_the_byte(name, device, request):
    assert request.getfixturevalue(device)[name] == planned(SETUPS[name])


@pytest.mark.parametrize("device", ["real", "emulated"])
def test_the_chip_has_the_memory_that_the_plan_deals_out(device, request):
    assert request.getfixturevalue(device)["capacity"] == DRAM_BYTES


def test_the_longest_prefill_runs_in_what_is_reserved_for_it_and_not_in_three_quarters(real):
    assert real["prefill fits"] == {"1.0": True, "0.75": False}
