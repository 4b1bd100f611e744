"""The documented differences between the emulator and ttnn 0.81: what differs, and why it stays so.

Each module of ops/ lists those of its ops in KNOWN. A difference is either a call that ttnn accepts although its result is undefined or wrong on hardware, which the emulator
therefore rejects, or a part of ttnn that the emulator does not have and says so. docs/conformance.md lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_tt.conformance.case import Case

SHARDED = (
    "Sharded inputs or results of these ops have placement rules of their own, which the emulator does not have: it asks to "
    "move the tensor to DRAM or L1 and back."
)
ARGUMENT = "An argument, or a use of one, that the emulator does not have and names."
FREED = "ttnn returns a freed tensor as it is where nothing changes; whatever is done with it next fails."

Holds = Callable[[Case, dict[str, Any], dict[str, Any]], bool]


@dataclass(frozen=True)
class Known:
    """A difference of the ops that `op` matches whole, when `holds`; `reason` is one sentence."""

    op: re.Pattern[str]
    reason: str
    holds: Holds


def stricter(op: str, message: str, reason: str) -> Known:
    """The emulator rejects, with a message that matches `message`, what ttnn accepts."""
    pattern = re.compile(message)

    def holds(case: Case, real: dict[str, Any], ours: dict[str, Any]) -> bool:
        return (
            real["outcome"] == "accepted"
            and ours["outcome"] in ("rejected", "not emulated")
            and bool(pattern.search(ours["error"]))
        )

    return Known(re.compile(op), reason, holds)


def looser(op: str, message: str, reason: str) -> Known:
    """The emulator accepts what ttnn rejects with a message that matches `message`."""
    pattern = re.compile(message)

    def holds(case: Case, real: dict[str, Any], ours: dict[str, Any]) -> bool:
        return ours["outcome"] == "accepted" and bool(pattern.search(real.get("error", "")))

    return Known(re.compile(op), reason, holds)
