"""Random calls on the emulator and the real ttnn agree, or differ as documented; and every op of the emulator has its cases."""

from __future__ import annotations

import json

import pytest

from disagg_tt.conformance.ops import generators
from disagg_tt.conformance.run import make_cases, run
from disagg_tt.device.calls import OPS

CASES, SEED = 300, "suite"

# Ops without a generator: random calls of them say nothing, or cannot be made alone.
SOCKET = "takes a socket and a second rank: test_call_log.py"
SEMAPHORES = "is refused by name"
FILE = "works on a file: tests/emulator/test_transfer.py"
COVERED_ELSEWHERE = {
    "deallocate": "every case that frees a tensor calls it",
    "dump_tensor": FILE,
    "load_tensor": FILE,
    "point_to_point": "crashes the mock at most calls: tests/emulator/test_point_to_point.py",
    "experimental.all_gather_async": SEMAPHORES,
    "experimental.all_reduce_async": SEMAPHORES,
    "experimental.reduce_scatter_minimal_async": SEMAPHORES,
    "experimental.send_async": SOCKET,
    "experimental.recv_async": SOCKET,
    "experimental.send_direct_async": SOCKET,
    "experimental.recv_direct_async": SOCKET,
}


@pytest.mark.timeout(300)
def test_random_calls_do_what_they_do_on_ttnn() -> None:
    report = run(make_cases(SEED, CASES))
    assert report["cases"] >= CASES
    assert report["accepted"] >= CASES / 5, "hardly any call was accepted by both"
    assert not report["differences"], "\n" + "\n".join(map(json.dumps, report["differences"]))


def test_every_op_has_a_generator_or_a_reason_why_not() -> None:
    ops = {f"{space}.{name}".lstrip(".") for space, names in OPS.items() for name in names}
    missing = ops - set(generators()) - set(COVERED_ELSEWHERE)
    assert not missing, (
        f"write a generator in disagg_tt/conformance/ops/, or a reason here: {sorted(missing)}"
    )


def test_the_reasons_name_ops_that_exist_and_have_no_generator() -> None:
    ops = {f"{space}.{name}".lstrip(".") for space, names in OPS.items() for name in names}
    assert set(COVERED_ELSEWHERE) <= ops - set(generators())
