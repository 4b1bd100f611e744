"""Every name that a script can import from the emulator is a name of ttnn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, types, ttnn
from disagg_tt.device import emulator
from disagg_tt.device.emulator.namespace import Namespace

def lacking(ours, theirs, path):
    for name, value in vars(ours).items():
        is_part = isinstance(value, Namespace)
        if not is_part and (name.startswith("_") or isinstance(value, types.ModuleType)):
            continue
        if not hasattr(theirs, name):
            yield f"{path}.{name}"
        elif is_part:
            yield from lacking(value, getattr(theirs, name), f"{path}.{name}")

print("RESULT", json.dumps(list(lacking(emulator, ttnn, "ttnn"))))
"""


def test_the_emulator_has_no_name_that_ttnn_lacks(mock_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **mock_environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("RESULT", 1)[1]) == []
