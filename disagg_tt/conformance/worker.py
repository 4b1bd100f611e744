"""A process that makes calls: cases in on stdin, results out, one JSON line each. `python -m disagg_tt.conformance.worker 1x2`

DISAGG_TT_DEVICE chooses between the emulator and the real ttnn. Results go to the stdout that the process was started
with; whatever else prints there is sent to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from disagg_tt.conformance.case import Calls, Case, described
from disagg_tt.errors import NotEmulatedError


def result(calls: Calls, case: Case) -> dict[str, Any]:
    """Make the call and return {"outcome", "outputs" or "error"}; outcome: accepted, rejected, not emulated."""
    try:
        return {"outcome": "accepted", "outputs": described(calls.ttnn, calls.make(case))}
    except NotEmulatedError as error:
        return {"outcome": "not emulated", "error": str(error)}
    except Exception as error:  # the real runtime raises RuntimeError, TypeError, ValueError and more
        return {"outcome": "rejected", "error": f"{type(error).__name__}: {str(error)[:2000]}"}


def main(shape: str) -> None:
    """Answer cases until stdin ends, on a mesh of `shape` (such as 1x2)."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from disagg_tt.device import ttnn

    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    rows, columns = map(int, shape.split("x"))
    dispatch = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), dispatch_core_config=dispatch)
    calls = Calls(ttnn, mesh)
    print(json.dumps({"outcome": "ready"}), file=answers)
    for line in sys.stdin:
        print(json.dumps(result(calls, Case(**json.loads(line))), default=str), file=answers)
    os._exit(0)  # the mock may crash when it closes a mesh after a call that failed half-way


if __name__ == "__main__":
    main(sys.argv[1])
