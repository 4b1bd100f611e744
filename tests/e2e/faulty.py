"""disagg-tt, except that one rank dies, stops or hangs at a chosen point.

python faulty.py ROLE:WHEN:WHAT generate ...   WHEN: start, socket, prefill, stream, decode. WHAT: dies, stops, hangs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from disagg_tt.__main__ import main


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hangs() -> None:
    """Do nothing for ever, with the threads of zmq still alive."""
    while True:
        signal.pause()


def at_call(owner: type, name: str, number: int, fault: Callable[[], object]) -> None:
    """Let call `number` of a method begin with the fault."""
    method, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fault()
        return method(*args, **kwargs)

    setattr(owner, name, faulty)


def inject(when: str, fault: Callable[[], None]) -> None:
    if when == "start":
        fault()
    elif when == "socket":
        from disagg_tt.device import ttnn
        from disagg_tt.link import Link

        at_call(Link, "between_ranks", 1, lambda: (ttnn.init_distributed_context(), fault()))
    elif when == "prefill":
        from disagg_tt.prefill import Prefill

        at_call(Prefill, "run", 1, fault)
    elif when == "stream":
        from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver

        at_call(MeshSocketReceiver, "receive_layer", 3, fault)
    else:
        from disagg_tt.decode import Decode

        at_call(Decode, "step", 5, fault)


if __name__ == "__main__":
    role, when, what = sys.argv[1].split(":")
    if os.environ["DISAGG_TT_ROLE"] == role:
        inject(when, {"dies": dies, "stops": stops, "hangs": hangs}[what])
    sys.exit(main(sys.argv[2:]))
