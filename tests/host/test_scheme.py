"""Imports point one way, only the device layer knows ttnn, and starting the program loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "disagg_tt"
# Each module or folder may import those of earlier rows, and of its own.
ROWS = (
    ("__init__", "errors"),
    ("core", "perf"),
    (
        "config",
        "transfer_config",
        "geometry",
        "blocks",
        "watchdog",
        "report",
        "processes",
        "job_output",
        "mesh_descriptor",
        "mpirun",
        "terminal",
    ),
    ("rank_binding",),
    ("device", "launch"),
    ("plan",),
    ("prompt", "tokens", "cache", "model", "kv_stream"),
    ("prefill", "decode"),
    ("run", "link", "decode_server", "generate"),
    ("serving", "rank", "dry_run", "check", "emulate"),
    ("bench", "conformance", "__main__"),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The module or folder right below the package that `disagg_tt.x.y` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported(path: Path, at_its_top: bool = False) -> Iterator[str]:
    """Every module that a file imports, also inside a function; `from disagg_tt import x` gives disagg_tt.x."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_its_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "disagg_tt":
                yield from (
                    f"disagg_tt.{a.name}" if (PACKAGE / f"{a.name}.py").exists() else "disagg_tt"
                    for a in node.names
                )
            else:
                yield node.module or ""


def test_every_module_has_its_row():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - set(LEVEL) == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = room(name_of(path))
    for module in imported(path):
        if module.split(".")[0] == "disagg_tt" and room(module) != own:
            assert LEVEL[room(module)] <= LEVEL[own], f"{name_of(path)} imports {module}"


def test_rooms_of_one_row_import_each_other_in_no_circle():
    uses = {name: set() for name in LEVEL}
    for path in MODULES:
        own = room(name_of(path))
        uses[own] |= {room(m) for m in imported(path, at_its_top=True) if m.split(".")[0] == "disagg_tt"} - {
            own
        }
    done: set[str] = set()
    while free := {name for name in uses if name not in done and uses[name] <= done}:
        done |= free
    assert set(uses) - done == set(), "these import each other"


def test_only_the_device_layer_imports_ttnn():
    users = {name_of(path) for path in MODULES if any(m.split(".")[0] == "ttnn" for m in imported(path))}
    assert all(user.startswith("disagg_tt.device") for user in users), users


HEAVY = ("torch", "ttnn", "transformers", "tokenizers", "numpy", "mpi4py", "zmq", "jinja2", "yaml")


@pytest.mark.parametrize("module", ["disagg_tt", "disagg_tt.__main__", "disagg_tt.emulate"])
def test_starting_loads_nothing_heavy(module):
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
