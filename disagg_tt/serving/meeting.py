"""How two workers that were started by hand are linked: the decode worker opens an address, the prefill worker connects.

The hub says who shall meet whom. Both show that they know the token (programs.py), compare clocks, and join the wire of
`--transport`. On the decode side that is a thread's work, so that a prefill worker that comes slowly, or never, holds up
no decode step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from loguru import logger

from disagg_tt.config import Options
from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import DisaggError
from disagg_tt.kv_stream.control import ZmqControl, clock_offset
from disagg_tt.kv_stream.programs import authenticate
from disagg_tt.link import Link
from disagg_tt.run import Run
from disagg_tt.transfer_config import KVTransferConfig

MEET_S = 10.0


class Meeting:
    """Makes one worker's links. `listen` is where a decode worker can be reached."""

    def __init__(self, run: Run, mesh: Any, role: str, token: str, listen: str):
        self._options, self._mesh, self._role = run.options, mesh, role
        self._token, self._listen = token, listen
        self._made: SimpleQueue[tuple[str, Link, float]] = SimpleQueue()
        self._closed = False

    def open(self, peer: str) -> str:
        """Wait for `peer` in a thread; return the address at which it finds us."""
        control = ZmqControl(peer, bind=True, address=f"tcp://{_bracketed(self._listen)}:*")
        threading.Thread(target=self._wait, args=(peer, control), name=f"meets {peer}", daemon=True).start()
        return control.address

    def _wait(self, peer: str, control: ZmqControl) -> None:
        try:
            control.wait_for_peer(MEET_S)
            link, offset = self._join(control, self._listen)
        except DisaggError as error:
            logger.warning("no link from {}: {}", peer, error)
            control.close()
            return
        self._made.put((peer, link, offset))
        if self._closed:
            self.close()

    def arrived(self) -> Iterator[tuple[str, Link, float]]:
        """Give the links that were made since the last call: who, the link, and its clock minus ours, s."""
        while True:
            try:
                yield self._made.get_nowait()
            except Empty:
                return

    def connect(self, peer: str, address: str) -> Link:
        """Connect to the decode worker `peer`, which waits at `address`; raises PeerError or StreamError if that fails."""
        control = ZmqControl(peer, bind=False)
        try:
            control.connect(address)
            host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
            return self._join(control, host)[0]
        except DisaggError:
            control.close()
            raise

    def _join(self, control: ZmqControl, host: str) -> tuple[Link, float]:
        theirs = PREFILL if self._role == DECODE else DECODE
        authenticate(control, self._role, theirs, self._token, MEET_S)
        offset = clock_offset(control, MEET_S, asks=self._role == DECODE)
        link = Link(self._mesh, control, None, ranks=False)
        link.open_wire(self._wired(host), self._role, 0)
        return link, offset

    def _wired(self, host: str) -> Options:
        """Return options that name the wire's host and token, as those of two programs do."""
        kind = "kv_consumer" if self._role == DECODE else "kv_producer"
        config = KVTransferConfig(self._options.transport, kind, host, 0, self._token)
        return replace(self._options, kv_transfer=config)

    def close(self) -> None:
        """Close the links that were made and never taken."""
        self._closed = True
        for _, link, _ in self.arrived():
            link.close()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
