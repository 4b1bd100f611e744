"""A worker's end of the connection to the hub: a zmq DEALER, and beats from a thread of their own."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from disagg_tt.errors import PeerError, StreamError
from disagg_tt.serving import protocol
from disagg_tt.serving.protocol import (
    BEAT_S,
    LOST_S,
    MAX_MESSAGE_BYTES,
    Beat,
    Challenge,
    Dropped,
    Hello,
    Register,
    State,
    Welcome,
)

M = TypeVar("M", bound=protocol.Message)


class HubLostError(PeerError):
    """The hub is gone, or does not know this worker any more; `again`: it may be joined anew."""

    def __init__(self, message: str, *, again: bool = True):
        super().__init__(message)
        self.again = again


def proof(token: str, who: str, nonce: str) -> str:
    """Return the answer to a challenge: an HMAC under the token, which itself never travels; `who` is hub or worker."""
    return hmac.digest(token.encode(), f"{who} {nonce}".encode(), hashlib.sha256).hex()


class Connection:
    """One worker's connection. `state` is what its beats tell; the worker keeps it up to date.

    The beats stop when the process does, or is stopped; a loop that hangs in it is ended by its watchdog.
    """

    def __init__(self, address: str, token: str, deadline_s: float):
        self.state = State()
        self.name = ""
        self._address, self._token, self._deadline_s = address, token, deadline_s
        self._open()

    def _open(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.socket = self._dealer()
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(self._address)
        self._closed = threading.Event()
        self._beats: threading.Thread | None = None

    def _dealer(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(BEAT_S * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(LOST_S * 1000))
        return socket

    def join(self, register: Callable[[str], Register]) -> None:
        """Register with the hub; `register` makes the message of the proof that it is given. Beats begin.

        Raises PeerError when the hub does not answer in time or refuses, StreamError when it does not know the token.
        """
        nonce = secrets.token_hex(32)
        self.send(Hello(nonce=nonce))
        challenge = self._expect(Challenge)
        if not hmac.compare_digest(challenge.proof, proof(self._token, "hub", nonce)):
            raise StreamError(f"the hub at {self._address} does not know the token; give both the same one")
        message = register(proof(self._token, "worker", challenge.nonce))
        self.send(message)
        session, self.name = self._expect(Welcome).session, message.name
        self._beats = threading.Thread(target=self._beat, args=(session,), name="beats", daemon=True)
        self._beats.start()

    def join_again(self, register: Callable[[str], Register]) -> None:
        """Leave what is left of the connection, and `join` over a new one."""
        self.close()
        self._open()
        self.join(register)

    def _expect(self, kind: type[M]) -> M:
        until = time.monotonic() + self._deadline_s
        while (left := until - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                message = self.receive()
                if isinstance(message, kind):
                    return message
                raise StreamError(f"the hub at {self._address} answers {message!r:.200}")
        raise PeerError(
            f"the hub at {self._address} did not answer within {self._deadline_s:g} s; is `disagg-tt proxy` or serve running "
            "there, and does it take this worker (its log says)?"
        )

    def send(self, message: protocol.Message) -> None:
        """Send a message to the hub; raises PeerError when it takes none."""
        try:
            self.socket.send(protocol.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise HubLostError(f"the hub at {self._address} is gone") from None

    def receive(self) -> protocol.Message | None:
        """Return the next message that is here; raises HubLostError when the hub is gone or has dropped this worker."""
        try:
            message = protocol.to_worker(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            if self._monitor.poll(0):
                raise HubLostError(f"the hub at {self._address} is gone: the connection is lost") from None
            return None
        if isinstance(message, Dropped):
            raise HubLostError(
                f"the hub at {self._address} does not take this worker: {message.reason}", again=message.again
            )
        return message

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to poll, for reading, to learn that `receive` has something to return or raise."""
        return [self.socket, self._monitor]

    def _beat(self, session: str) -> None:
        socket = self._dealer()
        socket.connect(self._address)
        while not self._closed.wait(BEAT_S / 2):
            beat = Beat(name=self.name, session=session, state=self.state)
            try:
                socket.send(protocol.encode(beat), zmq.NOBLOCK)
            except zmq.Again:
                continue
        socket.close(linger=0)

    def close(self) -> None:
        """Deliver what was sent, for at most 1 s, and close; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._beats is not None:
            self._beats.join()
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close()
        self._context.term()
