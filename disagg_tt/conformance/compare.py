"""How the two outcomes of a case compare."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from disagg_tt.conformance.case import Case
from disagg_tt.conformance.known import Known

# What a kernel's own circular buffers take of L1 is decided in the real op's program; the emulator has no kernels.
_KERNEL_BUFFERS = re.compile(r"circular buffers|dataflow buffers|beyond max L1 size", re.IGNORECASE)

ACCEPTED, REJECTED, CRASHED, BUFFERS, KNOWN_DIFFERENCE, DIFFERS = (
    "accepted",
    "rejected",
    "ttnn crashed",
    "kernel buffers",
    "known",
    "differs",
)
VERDICTS = (ACCEPTED, REJECTED, CRASHED, BUFFERS, KNOWN_DIFFERENCE, DIFFERS)


def verdict(
    case: Case, real: dict[str, Any], ours: dict[str, Any], documented: Sequence[Known]
) -> tuple[str, Known | None]:
    """Return whether both accepted alike or both rejected, and the documented difference if it is one.

    A crash of the real runtime, or of its whole process, is its rejection, counted apart. A crash of the emulator is never
    right.
    """
    accepts = real["outcome"] == "accepted"
    # As text, in which a NaN is the same as a NaN.
    if (
        accepts
        and ours["outcome"] == "accepted"
        and json.dumps(real["outputs"]) == json.dumps(ours["outputs"])
    ):
        return ACCEPTED, None
    if not accepts and ours["outcome"] in ("rejected", "not emulated"):
        return CRASHED if real["outcome"] == "crashed" else REJECTED, None
    if ours["outcome"] == "accepted" and _KERNEL_BUFFERS.search(real.get("error", "")):
        return BUFFERS, None
    for known in documented:
        if known.op.fullmatch(case.op) and known.holds(case, real, ours):
            return KNOWN_DIFFERENCE, known
    return DIFFERS, None
