"""The nixl wire: the receiver READs the sender's registered memory (RDMA where there is such a network, else UCX's best).

A tcp connection, authenticated as the tcp wire's, carries what is small: once a session the agent's metadata, and for each
layer where its bytes lie. The receiver reads them straight into its own extents, and NIXL notifies the sender, which may
then reuse the memory. A layer that nobody reads is taken back after `lease_s` (counted in `expired_leases`): the receiver
is told and the memory deregistered, so that a late read fails, or does not count where the network (as UCX between two
processes of one host) can read memory that is not registered.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from disagg_tt.errors import DisaggError, InputError, PeerError, StreamError
from disagg_tt.kv_stream.frame import Header, Kind, encode_descriptors, parse_descriptors, parse_header
from disagg_tt.kv_stream.host_wire import expect, tell
from disagg_tt.kv_stream.layout import Extents, Layout, coalesce
from disagg_tt.kv_stream.tcp import TcpChannel, TcpReceiver, TcpSender
from disagg_tt.transfer_config import is_loopback

LEASE_S = 30.0
BUSY_S = 0.002  # of polling without a pause
MOST_TRANSFERS = 1024  # prepared at a time


def new_agent(role: str, *, one_host: bool) -> Any:
    """Return a NIXL agent with a name of its own; raises InputError where NIXL is not installed.

    On `one_host` the reader's own calls move the bytes, and NIXL's thread, which never rests, would take a core from that;
    over a network without RDMA the sender's thread serves the reads.
    """
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise InputError(f"the nixl wire needs NIXL ({error}): pip install 'disagg_tt[nixl]'") from None
    if "NIXL_LOG_LEVEL" not in os.environ:  # it logs to stdout, where results go
        logging.getLogger("nixl").setLevel(logging.WARNING)
    return nixl_agent(
        f"{role}-{secrets.token_hex(8)}", nixl_agent_config(enable_prog_thread=not one_host, backends=["UCX"])
    )


def _poll(ready: Callable[[], bool], deadline: float) -> bool:
    """Wait until `ready()`, busily at first, then with pauses; return whether it came in time.

    Short ones, of up to 0.1 ms: small layers are served by the sender's calls, where no thread of NIXL's does it.
    """
    started, pause = time.monotonic(), 0.0
    while not ready():
        now = time.monotonic()
        if now > deadline:
            return False
        if now - started > BUSY_S:
            pause = min(pause * 1.5 + 20e-6, 1e-4)
            time.sleep(pause)
    return True


class _Memory:
    """An agent and the memory registered with it, once a session."""

    def __init__(self, role: str, host: str):
        self.agent = new_agent(role, one_host=is_loopback(host))
        self._registered: Any = None

    def register(self, memory: Sequence[torch.Tensor]) -> None:
        if self._registered is not None:
            raise StreamError("nixl: memory is registered once a session, before the first stream")
        self._registered = self.agent.register_memory(
            [(m.data_ptr(), m.numel(), 0, "") for m in coalesce(memory)], "DRAM"
        )

    @property
    def registered(self) -> bool:
        return self._registered is not None

    def release(self) -> None:
        """Deregister the memory: from now on no other agent can read it."""
        if self._registered is not None:
            self.agent.deregister_memory(self._registered)
            self._registered = None

    def close(self) -> None:
        """Release the memory and end the agent."""
        self.release()
        self.agent = None


class NixlSender(TcpSender):
    """The end whose memory is read. `lease_s`: how long a layer waits for its reader."""

    name = "nixl"

    def __init__(
        self, host: str, port: int, *, token: str = "", deadline_s: float = 30.0, lease_s: float = LEASE_S,
        verify: bool = True,
    ):  # fmt: skip
        super().__init__(host, port, token=token, deadline_s=deadline_s, verify=verify)
        self.memory = _Memory("prefill", host)
        self.expired_leases = 0
        self._lease_s = lease_s
        self._leases: dict[int, float] = {}  # of each layer not read yet: when it ends

    def register(self, memory: Sequence[torch.Tensor]) -> None:
        self.memory.register(memory)

    def _meet(self) -> TcpChannel:
        channel = super()._meet()
        metadata = self.memory.agent.get_agent_metadata()
        channel.put(Header(Kind.AGENT, length=len(metadata)), metadata)
        return channel

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        return encode_descriptors(pieces)

    def _send(self, header: Header, layout: Layout) -> None:
        self._channel.check_failure()
        where = layout.form
        self._leases[header.layer] = time.monotonic() + self._lease_s
        self._channel.put(
            Header(Kind.READABLE, header.request, header.layer, len(where), header.value), where
        )

    def _sent(self, layer: int) -> None:
        started = time.monotonic()
        ends = min([started + self._deadline_s, *self._leases.values()])
        if not _poll(lambda: self._read_up_to(layer), ends):
            self._take_back()

    def _read_up_to(self, layer: int) -> bool:
        """Return whether all layers up to `layer` have been read, by the notifications that have come."""
        for notes in self.memory.agent.get_new_notifs().values():
            for note in notes:
                header = parse_header(note)
                if header.kind is not Kind.READ or header.request != self._planned().request:
                    raise StreamError(f"nixl: {header} is notified; READ of this stream's layers is due")
                self._leases.pop(header.layer, None)
        if next(iter(self._leases), layer + 1) > layer:  # they are in the order of layers
            return True
        self._channel.check_failure()
        return False

    def _take_back(self) -> None:
        """Tell the receiver, deregister the memory, and count the layers whose lease is over; raises PeerError."""
        over = [layer for layer, end in self._leases.items() if end <= time.monotonic()]
        self.expired_leases += len(over)
        reason = (
            f"nixl: layers {[*self._leases]} were not read within {self._deadline_s:g} s, or their lease of "
            f"{self._lease_s:g} s ({len(over)} expired); the memory is taken back"
        )
        tell(self._channel, reason)  # first: see the receiver's look after each read
        self.memory.release()
        raise PeerError(reason)

    def close(self) -> None:
        self.memory.close()
        self._leases.clear()
        super().close()


class NixlReceiver(TcpReceiver):
    """The end that reads."""

    name = "nixl"
    layer_kind = Kind.READABLE

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str = "",
        deadline_s: float = 30.0,
        verify: bool = True,
    ):
        super().__init__(host, port, token=token, deadline_s=deadline_s, verify=verify)
        self.memory = _Memory("decode", host)
        self._remote = ""
        self._transfers: dict[bytes, Any] = {}  # by the two ends' descriptors: a ring of buffers repeats them

    def register(self, memory: Sequence[torch.Tensor]) -> None:
        self.memory.register(memory)

    def _meet(self) -> TcpChannel:
        channel = super()._meet()
        try:
            metadata = expect(channel, Kind.AGENT, "waiting for its agent", f"nixl: the {self.peer} end")[1]
            remote = self.memory.agent.add_remote_agent(metadata)
        except DisaggError:
            channel.close()
            raise
        except Exception as error:  # NIXL's kinds have no base of their own
            tell(channel, reason := f"nixl: the metadata of the prefill end's agent is not valid: {error}")
            channel.close()
            raise StreamError(reason) from None
        self._remote = remote.decode() if isinstance(remote, bytes) else str(remote)
        return channel

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        return encode_descriptors(pieces)

    def _receive(self, header: Header, payload: bytes, layout: Layout) -> None:
        layer, agent = header.layer, self.memory.agent
        key = layout.form + payload
        handle = self._transfers.get(key) or self._transfer(
            key, layout.pieces, parse_descriptors(payload, self._planned().layer_bytes)
        )
        note, state = Header(Kind.READ, header.request, layer).encode(), "PROC"

        def done() -> bool:
            nonlocal state
            state = agent.check_xfer_state(handle)
            if state == "PROC":
                self._channel.check_failure()
            return state != "PROC"

        try:
            state = agent.transfer(handle, note)
            if state == "PROC":
                _poll(done, time.monotonic() + self._deadline_s)
        except DisaggError:
            raise
        except Exception as error:
            raise PeerError(f"nixl: reading layer {layer} failed: {error}") from None
        if state != "DONE":
            raise PeerError(f"nixl: layer {layer} was not read within {self._deadline_s:g} s (state {state})")
        self._channel.check_failure()  # what was read counts only if it was not taken back meanwhile

    def _transfer(self, key: bytes, pieces: Extents, theirs: list[tuple[int, int]]) -> Any:
        """Return a transfer from their extents into ours, kept under `key`."""
        agent, pairs = self.memory.agent, matched([(p.data_ptr(), p.numel()) for p in pieces], theirs)
        if len(self._transfers) >= MOST_TRANSFERS:
            self._forget()
        try:
            local = agent.get_xfer_descs([(a, size, 0) for a, _, size in pairs], "DRAM")
            remote = agent.get_xfer_descs([(b, size, 0) for _, b, size in pairs], "DRAM")
            self._transfers[key] = agent.initialize_xfer("READ", local, remote, self._remote, b"")
        except Exception as error:
            raise StreamError(
                f"nixl: a layer cannot be read: {error}; is its memory registered on both ends?"
            ) from None
        return self._transfers[key]

    def _forget(self) -> None:
        for handle in self._transfers.values():
            with suppress(Exception):  # one that hangs cannot be released
                self.memory.agent.release_xfer_handle(handle)
        self._transfers.clear()

    def close(self) -> None:
        if self.memory.agent is not None:
            self._forget()
            if self._remote:
                with suppress(Exception):
                    self.memory.agent.remove_remote_agent(self._remote)
        self.memory.close()
        super().close()


def matched(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (our address, their address, bytes) of pieces cut where either side's extents end; the sums are equal."""
    pairs, i, j, at, there = [], 0, 0, 0, 0
    while i < len(ours):
        size = min(ours[i][1] - at, theirs[j][1] - there)
        pairs.append((ours[i][0] + at, theirs[j][0] + there, size))
        at, there = at + size, there + size
        if at == ours[i][1]:
            i, at = i + 1, 0
        if there == theirs[j][1]:
            j, there = j + 1, 0
    return pairs
