"""The device layer: chooses ttnn or the emulator, once, for the whole process.

Everybody else writes `from disagg_tt.device import ttnn` and never learns which of the two it got. `kind` says:

    "ttnn"      the real runtime and real chips (or Tenstorrent's simulator)
    "mock"      the real runtime on a mock cluster: every call is validated and allocated, tensor contents are garbage
    "emulator"  disagg_tt.device.emulator, which defines the subset of ttnn that this program may use

DISAGG_TT_DEVICE=ttnn|emulator decides; without it, ttnn where it is installed and something for it to drive is present.
What a device of this kind cannot do is in `features`, the only such place.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loguru import logger

from disagg_tt.device import calls
from disagg_tt.errors import InputError

CARDS = Path("/dev/tenstorrent")


@dataclass(frozen=True)
class Features:
    """What the program may ask of the device.

    Attributes:
        cross_queue_events: one command queue may wait for another's event (`--overlap queue`).
        numbers: values read back are the computed ones (on a mock cluster they are garbage, see host.py).
        trace: a decode step can be captured as a trace and replayed (`--enable-trace`).
        compiles: a program of a new shape is compiled at its first use, so every shape is worth a warm-up.
    """

    cross_queue_events: bool
    trace: bool
    numbers: bool
    compiles: bool


def choose(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return (kind, reason) for this environment; raises InputError for an unknown or impossible DISAGG_TT_DEVICE."""
    wanted = environ.get("DISAGG_TT_DEVICE", "")
    installed = find_spec("ttnn") is not None
    real = "mock" if environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH") else "ttnn"
    if wanted not in ("", "ttnn", "emulator"):
        raise InputError(
            f"DISAGG_TT_DEVICE is {wanted!r}; it may be 'ttnn' or 'emulator', or unset to choose by itself"
        )
    if wanted == "emulator":
        return "emulator", "DISAGG_TT_DEVICE=emulator"
    if wanted == "ttnn":
        if not installed:
            raise InputError(
                "DISAGG_TT_DEVICE is 'ttnn' but ttnn is not installed here; "
                "install the extra with `pip install 'disagg_tt[ttnn]'` (Python 3.10 or 3.12) or unset the variable"
            )
        return real, "DISAGG_TT_DEVICE=ttnn"
    if not installed:
        card = (
            ", though a card is here: pip install 'disagg_tt[ttnn]' with Python 3.10 or 3.12"
            if CARDS.exists()
            else ""
        )
        return "emulator", f"ttnn is not installed{card}"
    for sign in ("TT_METAL_MOCK_CLUSTER_DESC_PATH", "TT_METAL_SIMULATOR"):
        if environ.get(sign):
            return real, f"{sign} is set"
    if CARDS.exists():
        return "ttnn", "a Tenstorrent card is present"
    return "emulator", "ttnn is installed but no Tenstorrent card is present"


kind, _reason = choose(os.environ)
features = Features(
    cross_queue_events=kind != "mock",
    trace=kind != "mock",
    numbers=kind != "mock",
    compiles=kind != "emulator",
)


def __getattr__(name: str) -> Any:
    """Load ttnn, or the emulator, when `ttnn` is first asked for: a launcher that only chooses loads neither."""
    if name != "ttnn":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if kind == "emulator":
        module = import_module("disagg_tt.device.emulator")
    else:
        find_root(os.environ)
        logger.disable("ttnn")  # its banner; the level of the rest is TT_LOGGER_LEVEL's
        module = import_module("ttnn")
    calls.log_process(module, os.environ)
    globals()["ttnn"] = module
    return module


def find_root(environ: MutableMapping[str, str]) -> None:
    """Point TT_METAL_RUNTIME_ROOT to the ttnn package where it names a folder without tt_metal/, where ttnn finds nothing.

    tt-run sets it for each rank, to TT_METAL_HOME or the folder that it was called from (ttnn 0.81, ttrun.py).
    """
    spec, root = find_spec("ttnn"), environ.get("TT_METAL_RUNTIME_ROOT")
    if root is None or spec is None or spec.origin is None or (Path(root) / "tt_metal").is_dir():
        return
    package = Path(spec.origin).resolve().parent
    if (package / "tt_metal").is_dir():
        environ["TT_METAL_RUNTIME_ROOT"] = str(package)


def log_choice() -> None:
    """Log, in one line, which device layer runs and why."""
    unused = kind == "emulator" and CARDS.exists() and not os.environ.get("DISAGG_TT_DEVICE")
    logger.log("WARNING" if unused else "INFO", "device layer: {} ({})", kind, _reason)
