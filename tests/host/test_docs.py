"""The documentation names things that exist: files that it links to, tests that it calls proof, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    every = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    text = page.read_text()
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text))
    missing = [name for name in sorted(named) if f"def {name}(" not in every]
    assert not missing, f"{page.name} names {missing}"
    files = set(re.findall(r"\b(?:tests/)?((?:emulator|ttnn_mock|host|e2e|kv_stream)/test_\w+\.py)", text))
    gone = [file for file in sorted(files) if not (ROOT / "tests" / file).exists()]
    assert not gone, f"{page.name} names {gone}"
