"""What all tests share: which tests can run here, and the environment of the mock cluster.

DISAGG_TT_REQUIRE_MOCK=1 turns a skipped `mock` test into a failure.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from disagg_tt.device import mock

TESTS = Path(__file__).parent
REQUIRE_MOCK = os.environ.get("DISAGG_TT_REQUIRE_MOCK") == "1"

os.environ.setdefault(
    "DISAGG_TT_DEVICE", "emulator"
)  # in this process; mock tests start processes of their own
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a job of the background; what tests start inherits that
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; must be set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder, and skip with a reason what needs something that is not here."""
    no_ttnn = importlib.util.find_spec("ttnn") is None
    no_cards = not Path("/dev/tenstorrent").exists()
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder == "ttnn_mock":
            item.add_marker("mock")
        if folder == "hardware":
            item.add_marker("hardware")
        if no_ttnn and item.get_closest_marker("mock"):
            item.add_marker(pytest.mark.skip(reason="ttnn is not installed"))
        if no_cards and item.get_closest_marker("hardware"):
            item.add_marker(pytest.mark.skip(reason="no Tenstorrent card: /dev/tenstorrent does not exist"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        REQUIRE_MOCK
        and report.skipped
        and item.get_closest_marker("mock")
        and not hasattr(report, "wasxfail")
    ):
        report.outcome = "failed"
        report.longrepr = f"a mock test was skipped under DISAGG_TT_REQUIRE_MOCK=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRE_MOCK and report.skipped and "ttnn_mock" in collector.path.parts:
        report.outcome = "failed"
        report.longrepr = f"a mock test module was skipped under DISAGG_TT_REQUIRE_MOCK=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def mock_environment() -> dict[str, str]:
    """The variables that make ttnn run on the mock cluster of two N300. A test that uses it is marked `mock`."""
    return mock.environment()
