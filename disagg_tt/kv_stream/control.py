"""Control messages between the prefill and the decode rank: one schema, one channel.

    hello     both ways, first: what each side runs (compared), its clock, and the prefill side's plan
    announce  prefill -> decode: a request's id, prompt tokens, new tokens at most
    ready     decode -> prefill: its slot is reserved
    refused   decode -> prefill: it takes this request no more, which was cancelled; nothing may follow
    layer     prefill -> decode: one layer's K and V are computed and about to leave; and when (prefill's clock, s)
    sent      prefill -> decode: the metadata too; and when the request came, its prefill started and was computed
    metadata  prefill -> decode: the integers that end a staged stream; over a MeshSocket they are a tile
    done      decode -> prefill: a request's answer is complete
    busy      both ways: loading or decoding, so that a long wait is no silence
    ping, pong  comparing clocks
    bye       prefill -> decode: no more requests
    challenge, proof  both ways, before all else between programs: that both know the token, see programs.py
    wire      decode -> prefill: where the wire listens
    failed    both ways: the sender ends with this reason

Between ranks the channel is a pyzmq PAIR socket on loopback or the ranks' host, whose address the ranks exchange through
the distributed context; between programs its address is configured. A message is JSON of at most 1 MiB whose fields are
checked before use.
"""

from __future__ import annotations

import json
import math
import os
import socket as sockets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from disagg_tt.errors import InputError, PeerError, RefusedError, StreamError

Message = dict[str, Any]
Handler = Callable[[Message], None]

SCHEMA: dict[str, dict[str, type | tuple[type, ...]]] = {
    "hello": {"digest": str, "settings": dict, "requests": int, "tokens": int},
    "announce": {"request": int, "tokens": int, "max_new_tokens": int},
    "ready": {"request": int},
    "refused": {"request": int, "reason": str},
    "layer": {"request": int, "layer": int, "at": float},
    "sent": {"request": int, "called_at": float, "started_at": float, "computed_at": float},
    "metadata": {"request": int, "sequence_length": int, "next_token": int, "layers": int},
    "done": {"request": int, "answer": dict},
    "busy": {},
    "ping": {"at": float},
    "pong": {"at": float, "seen": float},
    "bye": {},
    "challenge": {"nonce": str},
    "proof": {"proof": str},
    "wire": {"host": str, "port": int, "token": str},
    "failed": {"reason": str},
}
MAX_BYTES = 1 << 20
ADDRESS_BYTES = 64
CONNECT_S = 10.0  # between two ranks that are both there, as ttnn gives its sockets
START_UP_S = 600.0  # for the other rank's weights and compilation, in which it may be silent; its death is noticed sooner


def check(message: object) -> Message:
    """Return `message` if it fits the schema; raises StreamError naming what does not."""
    kind = message.get("kind") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(kind, str) or kind not in SCHEMA:
        raise StreamError(
            f"control message {str(message)[:200]!r}; its kind must be one of {', '.join(SCHEMA)}"
        )
    fields = SCHEMA[kind]
    for name, type_ in fields.items():
        value = message.get(name)
        right = isinstance(value, (int, float) if type_ is float else type_) and not isinstance(value, bool)
        if right and type_ in (int, float):
            right = math.isfinite(value) and (type_ is float or value >= 0)  # type: ignore[arg-type, operator]
        if not right:
            raise StreamError(f"control message {kind}: {name} is {value!r}; a valid {type_} is needed")
    if set(message) != {"kind", *fields}:
        raise StreamError(f"control message {kind} has fields {sorted(message)}; allowed: {sorted(fields)}")
    return message


class Control(Protocol):
    """One end of the channel. `receive` raises PeerError for a `failed` message, a lost peer, or a passed deadline."""

    def send(self, kind: str, **fields: Any) -> None: ...
    def receive(self, timeout_s: float, what: str) -> Message: ...
    def poll(self, wait_s: float = 0.0) -> Message | None: ...
    def close(self) -> None: ...


class LocalControl:
    """Both ends in one process: a message is handled by the other end's handler at once, or waits in its inbox."""

    def __init__(self) -> None:
        self.peer: LocalControl | None = None
        self.handler: Handler | None = None
        self._inbox: deque[Message] = deque()

    @classmethod
    def pair(cls) -> tuple[LocalControl, LocalControl]:
        one, other = cls(), cls()
        one.peer, other.peer = other, one
        return one, other

    def send(self, kind: str, **fields: Any) -> None:
        assert self.peer is not None
        message = check({"kind": kind, **fields})
        if self.peer.handler is not None:
            self.peer.handler(message)
        else:
            self.peer._inbox.append(message)

    def receive(self, timeout_s: float, what: str) -> Message:
        message = self.poll()
        if message is None:
            raise PeerError(f"{what}: nothing came, and in one process nothing else can; this is a deadlock")
        return message

    def poll(self, wait_s: float = 0.0) -> Message | None:
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        self.handler = None


class ZmqControl:
    """One end of a channel between two ranks. zmq's own heartbeats tell when the peer is gone or stopped."""

    def __init__(self, peer: str, *, bind: bool, address: str = "", heartbeat_s: float = 2.0):
        """Make an end; the one that binds does so at `address`, or at a free port. Raises InputError where it cannot."""
        import zmq

        self._zmq, self._peer = zmq, peer
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(heartbeat_s * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(heartbeat_s * 4000))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.setsockopt(zmq.IPV6, 1)
        self.address = address
        if bind and address:
            try:
                self._socket.bind(address)
            except zmq.ZMQError as error:
                self.close()
                raise InputError(
                    f"the control channel cannot listen at {address}: {error}; choose another"
                ) from None
            self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        elif bind:
            host = own_host()
            port = self._socket.bind_to_random_port(f"tcp://{host}")
            self.address = f"tcp://{host}:{port}"

    def connect(self, address: str) -> None:
        self._socket.connect(address)

    def wait_for_peer(self, limit_s: float = CONNECT_S) -> None:
        """Wait until the peer has connected: before that, the binding end's `send` would take it for gone."""
        if not self._socket.poll(int(limit_s * 1000), self._zmq.POLLOUT):
            raise PeerError(
                f"the {self._peer} rank did not connect its control channel within {limit_s:.0f} s"
            )

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message; raises PeerError when the peer is not there to take it."""
        data = json.dumps(check({"kind": kind, **fields})).encode()
        if len(data) > MAX_BYTES:  # zmq would drop the connection, and the peer would take this rank for dead
            raise StreamError(f"control message {kind} has {len(data)} bytes; allowed are {MAX_BYTES}")
        try:
            self._socket.send(data, self._zmq.NOBLOCK)
        except self._zmq.Again:
            raise PeerError(f"the {self._peer} rank is gone: it does not take the message {kind!r}") from None

    def receive(self, timeout_s: float, what: str) -> Message:
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.poll(wait_s=max(0.0, min(0.5, deadline - time.monotonic())))
            if message is not None:
                return message
            if time.monotonic() >= deadline:
                raise PeerError(
                    f"{what}: nothing came from the {self._peer} rank within {timeout_s:.0f} s; it hangs or never came "
                    "(--deadline-s sets the limit)"
                )

    def poll(self, wait_s: float = 0.0) -> Message | None:
        """Return the next message if one comes within `wait_s`; raises PeerError when the peer is gone or failed."""
        poller = self._zmq.Poller()
        poller.register(self._socket, self._zmq.POLLIN)
        poller.register(self._monitor, self._zmq.POLLIN)
        ready = dict(poller.poll(int(wait_s * 1000)))
        if self._monitor in ready and self._socket not in ready:
            ready |= dict(poller.poll(200))  # the reason may be right behind the loss of the connection
        if self._socket in ready or int(self._socket.getsockopt(self._zmq.EVENTS)) & self._zmq.POLLIN:
            data = self._socket.recv(self._zmq.NOBLOCK)
            try:
                message = check(json.loads(data))
            except (ValueError, RecursionError) as error:
                raise StreamError(f"control message is not JSON: {error}") from None
            if message["kind"] == "failed":
                raise PeerError(f"the {self._peer} rank failed: {message['reason']}")
            return message
        if self._monitor in ready:
            raise PeerError(f"the {self._peer} rank died or hangs: its control connection is lost")
        return None

    @property
    def sockets(self) -> list[Any]:
        """What to poll, for reading, to learn that `poll` has something to return or raise."""
        return [self._socket, self._monitor]

    def close(self) -> None:
        """Deliver what was sent, for at most 1 s, and close; a second call does nothing."""
        if self._context.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=1000)


def own_host() -> str:
    """Return the address that the other ranks reach this host at: loopback when all ranks are on one host."""
    local, world = (os.environ.get(f"OMPI_COMM_WORLD_{name}SIZE", "1") for name in ("LOCAL_", ""))
    return "127.0.0.1" if local == world else sockets.gethostbyname(sockets.gethostname())


def connect_ranks(ttnn: Any, *, me: int, peer: int, peer_role: str, bind: bool) -> ZmqControl:
    """Return this rank's end of the channel; the binding rank tells the other its address over the distributed context."""
    control = ZmqControl(peer_role, bind=bind)
    if bind:
        ttnn.distributed_context_send_bytes(control.address.encode().ljust(ADDRESS_BYTES), peer)
        control.wait_for_peer()
    else:
        control.connect(bytes(ttnn.distributed_context_recv_bytes(ADDRESS_BYTES, peer)).decode().strip())
    return control


def reason_of(control: Control, error: Exception, aside: list[Message] | None = None) -> Exception:
    """Return what the peer says about its end, for a moment, if `error` is only that it is gone; else `error`."""
    try:
        while isinstance(error, PeerError):
            message = control.poll(0.5)
            if message is None:
                break
            if message["kind"] == "done" and aside is not None:
                aside.append(message)
    except PeerError as told:
        return told
    return error


def clock_offset(control: Control, timeout_s: float, *, asks: bool, rounds: int = 8) -> float:
    """Return the peer's clock minus this rank's, in seconds, from the fastest of a few round trips (0 to who answers)."""
    best, offset = float("inf"), 0.0
    for _ in range(rounds):
        if asks:
            sent = time.monotonic()
            control.send("ping", at=sent)
            reply = expect(control, "pong", timeout_s, "comparing clocks")
            now = time.monotonic()
            if now - sent < best:
                best, offset = now - sent, reply["seen"] - (sent + now) / 2
        else:
            ping = expect(control, "ping", timeout_s, "comparing clocks")
            control.send("pong", at=ping["at"], seen=time.monotonic())
    return offset


def expect(
    control: Control, kind: str, timeout_s: float, what: str, aside: list[Message] | None = None
) -> Message:
    """Return the next message, which must be of `kind`; `busy` restarts the wait, `done` goes to `aside` if given.

    Raises RefusedError for `refused`, StreamError for another kind.
    """
    while True:
        message = control.receive(timeout_s, what)
        if _is(message, kind, what, aside):
            return message


def look_for(
    control: Control, kind: str, wait_s: float, what: str, aside: list[Message] | None = None
) -> Message | None:
    """Return the next message as `expect` does, None when nothing comes within `wait_s` seconds."""
    while (message := control.poll(wait_s)) is not None:
        if _is(message, kind, what, aside):
            return message
    return None


def _is(message: Message, kind: str, what: str, aside: list[Message] | None) -> bool:
    if message["kind"] == kind:
        return True
    if message["kind"] == "done" and aside is not None:
        aside.append(message)
    elif message["kind"] == "refused":
        raise RefusedError(f"{what}: {message['reason']}")
    elif message["kind"] != "busy":
        raise StreamError(f"{what}: a {message['kind']!r} message came where {kind!r} is due")
    return False
