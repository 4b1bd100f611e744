"""The tcp wire: two programs, one connection, no copy but the kernel's.

The receiver listens, on loopback unless told otherwise; the sender connects. Each proves that it knows the shared token
(HMAC-SHA256 over the other's nonce; the token itself never travels). Whoever cannot, or speaks something else, is sent
away, and the receiver goes on waiting for its sender.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from disagg_tt.errors import DisaggError, InputError, PeerError, StreamError
from disagg_tt.kv_stream.frame import HEADER_BYTES, Header, Kind, parse_header, view_of
from disagg_tt.kv_stream.host_wire import Channel, WireReceiver, WireSender, expect, tell
from disagg_tt.kv_stream.layout import Layout
from disagg_tt.transfer_config import is_loopback

NONCE_BYTES = 32
IOV_MAX = 1024  # extents that one system call takes
RETRY_S = 0.05  # between attempts to connect to a receiver that is not there yet
PROVE_S = 1.0  # for the proof of one who has begun to speak
REASON_S = 0.2  # for the reason of one who has closed the connection
MOST_UNPROVEN = 16  # connections that have said nothing yet


class TcpChannel(Channel):
    """Frames over a connection. The kernel keeps the deadline (SO_RCVTIMEO): one system call takes a whole layer."""

    def __init__(self, sock: socket.socket, peer: str, deadline_s: float):
        self._socket, self._peer, self._whole = sock, peer, True
        self._header = bytearray(HEADER_BYTES)
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.deadline_s = deadline_s

    @property
    def deadline_s(self) -> float:
        return self._deadline_s

    @deadline_s.setter
    def deadline_s(self, seconds: float) -> None:
        self._deadline_s = seconds
        limit = struct.pack("@ll", *divmod(max(int(seconds * 1e6), 1), 10**6))
        for side in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, side, limit)

    def put(self, header: Header, payload: bytes = b"") -> None:
        self.put_views(header, [memoryview(payload)])

    def put_views(self, header: Header, payload: Sequence[memoryview]) -> None:
        """Send a frame whose payload lies in several places."""
        what = f"sending {header.kind.name} {header.layer}"
        if not self._whole:
            raise PeerError(f"tcp: the {self._peer} end has half a frame; nothing can follow it")
        self._whole = False
        try:
            self._move([memoryview(header.encode()), *payload], what, self._socket.sendmsg)
        except OSError as error:
            raise PeerError(
                f"tcp: the {self._peer} end {self._reason() or f'is gone ({error})'} while {what}"
            ) from None
        self._whole = True

    def _reason(self) -> str:
        """Return what the other end said before it closed the connection, if anything."""
        self.deadline_s = REASON_S
        with contextlib.suppress(DisaggError):
            header, payload = self.get("its reason")
            if header.kind is Kind.FAILED:
                return f"failed: {payload.decode(errors='replace')}"
        return ""

    def get(self, what: str) -> tuple[Header, bytes]:
        self.fill([memoryview(self._header)], what)
        header = parse_header(self._header)
        if header.kind is Kind.LAYER or not header.length:
            return header, b""
        payload = bytearray(header.length)  # at most what parse_header allows
        self.fill([memoryview(payload)], what)
        return header, bytes(payload)

    def fill(self, views: Sequence[memoryview], what: str) -> None:
        """Receive exactly what fits into `views`."""

        def take(some: list[memoryview]) -> int:
            done = self._socket.recvmsg_into(some, 0, socket.MSG_WAITALL)[0]
            if not done:
                raise PeerError(f"tcp: the {self._peer} end closed the connection while {what}")
            return done

        try:
            self._move(list(views), what, take)
        except OSError as error:
            raise PeerError(f"tcp: the {self._peer} end is gone ({error}) while {what}") from None

    def _move(self, views: list[memoryview], what: str, call: Callable[[list[memoryview]], int]) -> None:
        """Call until all views are done; raises PeerError when the deadline comes first."""
        deadline, first = time.monotonic() + self._deadline_s, 0
        while first < len(views):
            try:
                done = call(views[first : first + IOV_MAX])
            except BlockingIOError:  # the kernel's deadline
                done = 0
            while first < len(views) and done >= len(views[first]):
                done -= len(views[first])
                first += 1
            if first < len(views):
                views[first] = views[first][done:]
                if time.monotonic() > deadline - 1e-3:
                    raise PeerError(
                        f"tcp: the {self._peer} end did not move within {self._deadline_s:g} s while {what}"
                    )

    def check_failure(self) -> None:
        """Raise PeerError if the other end has closed the connection or said that it failed; waits for nothing."""
        try:
            said = self._socket.recv(HEADER_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerError(f"tcp: the {self._peer} end is gone ({error})") from None
        if not said:
            raise PeerError(f"tcp: the {self._peer} end closed the connection")
        if len(said) == HEADER_BYTES and parse_header(said).kind is Kind.FAILED:
            expect(self, Kind.TAKEN, "its reason", f"tcp: the {self._peer} end")

    def close(self) -> None:
        self._socket.close()


class TcpSender(WireSender):
    """Connects to a TcpReceiver at `host`:`port` when its first stream begins."""

    name = "tcp"
    _channel: TcpChannel

    def __init__(
        self, host: str, port: int, *, token: str = "", deadline_s: float = 30.0, verify: bool = True
    ):
        super().__init__(verify=verify)
        self._address, self._token, self._deadline_s = (host, port), token, deadline_s

    def _meet(self) -> TcpChannel:
        channel = TcpChannel(_connect(self._address, self._deadline_s), self.peer, self._deadline_s)
        try:
            self._prove(channel)
        except BaseException:
            channel.close()
            raise
        return channel

    def _prove(self, channel: TcpChannel) -> None:
        """Prove that this end knows the token, and have it proven."""
        nonce, who = secrets.token_bytes(NONCE_BYTES), f"{self.name}: the {self.peer} end"
        challenge = expect(channel, Kind.CHALLENGE, "waiting to be asked for the token", who)[1]
        proof = _proof(self._token, challenge, b"prefill") + nonce
        channel.put(Header(Kind.PROOF, length=len(proof)), proof)
        answer = expect(channel, Kind.PROOF, "waiting for its proof of the token", who)[1]
        if not hmac.compare_digest(answer, _proof(self._token, nonce, b"decode")):
            raise StreamError(f"{who} does not know the token; give both ends the same one")

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        return [view_of(piece) for piece in pieces]

    def _send(self, header: Header, layout: Layout) -> None:
        self._channel.check_failure()
        self._channel.put_views(header, layout.form)

    def _sent(self, layer: int) -> None:
        """Nothing to wait for: the kernel has copied what it was given."""


class TcpReceiver(WireReceiver):
    """Listens on `host`:`port` (0: any; then see `port`) for one TcpSender; raises InputError where it cannot."""

    name = "tcp"
    _channel: TcpChannel

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str = "",
        deadline_s: float = 30.0,
        verify: bool = True,
    ):
        super().__init__(verify=verify)
        if not token and not is_loopback(host):
            raise InputError(
                f"tcp: listening on {host} without a token; give both ends the same one, or use 127.0.0.1"
            )
        self._token, self._deadline_s = token, deadline_s
        self._listener = listen(host, port)
        self.port: int = self._listener.getsockname()[1]

    def _meet(self) -> TcpChannel:
        """Wait for a sender that proves itself; those who say nothing, or something else, cost it no time."""
        deadline, refused = time.monotonic() + self._deadline_s, ""
        unproven: dict[socket.socket, bytes] = {}  # and the nonce each was asked with
        with contextlib.closing(self._listener) as listener, selectors.DefaultSelector() as ready:
            ready.register(listener, selectors.EVENT_READ)
            try:
                while (left := deadline - time.monotonic()) > 0:
                    for key, _ in ready.select(left):
                        sock = key.fileobj
                        assert isinstance(sock, socket.socket)
                        if sock is listener:
                            with contextlib.suppress(OSError, DisaggError):  # it has gone again
                                self._ask(listener, unproven, ready)
                            continue
                        if sock not in unproven:  # it was dropped for another a moment ago
                            continue
                        ready.unregister(sock)
                        channel = TcpChannel(sock, self.peer, PROVE_S)
                        try:
                            self._check(channel, unproven.pop(sock))
                        except DisaggError as error:
                            refused = str(error)
                            tell(channel, refused)
                            channel.close()
                        else:
                            channel.deadline_s = self._deadline_s
                            return channel
            finally:
                for sock in unproven:
                    sock.close()
        if refused:
            raise StreamError(
                f"{self.name}: no sender with the token came; the last that came was refused: {refused}"
            )
        raise PeerError(
            f"{self.name}: no sender connected to port {self.port} within {self._deadline_s:g} s; start the prefill program"
        )

    def _ask(
        self, listener: socket.socket, unproven: dict[socket.socket, bytes], ready: selectors.BaseSelector
    ) -> None:
        """Accept a connection and ask it for its proof; of too many, drop the one that has been silent longest."""
        sock, nonce = listener.accept()[0], secrets.token_bytes(NONCE_BYTES)
        unproven[sock] = nonce
        ready.register(sock, selectors.EVENT_READ)
        TcpChannel(sock, self.peer, PROVE_S).put(Header(Kind.CHALLENGE, length=NONCE_BYTES), nonce)
        if len(unproven) > MOST_UNPROVEN:
            oldest = next(iter(unproven))
            del unproven[oldest]
            ready.unregister(oldest)
            oldest.close()

    def _check(self, channel: TcpChannel, nonce: bytes) -> None:
        """Have the token proven, and prove that this end knows it; raises StreamError."""
        who = f"{self.name}: the {self.peer} end"
        answer = expect(channel, Kind.PROOF, "waiting for its proof of the token", who)[1]
        proof, theirs = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if len(theirs) != NONCE_BYTES or not hmac.compare_digest(
            proof, _proof(self._token, nonce, b"prefill")
        ):
            raise StreamError(f"{who} does not know the token; give both ends the same one")
        mine = _proof(self._token, theirs, b"decode")
        channel.put(Header(Kind.PROOF, length=len(mine)), mine)

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        return [view_of(piece) for piece in pieces]

    def _receive(self, header: Header, payload: bytes, layout: Layout) -> None:
        self._channel.fill(layout.form, f"receiving layer {header.layer}")

    def close(self) -> None:
        super().close()
        self._listener.close()


def _proof(token: str, nonce: bytes, who: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce + who, "sha256")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises InputError where there can be none."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MOST_UNPROVEN)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host}:{port}: {error}; choose a free port of this host"
        ) from None
    listener.setblocking(False)  # who is ready may be gone when accepted
    return listener


def _connect(address: tuple[str, int], deadline_s: float) -> socket.socket:
    """Connect, trying again until the receiver listens."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            sock = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.01))
            if sock.getsockname() != sock.getpeername():
                return sock
            sock.close()  # on loopback, a port that nobody listens on can be given to the connection itself
            error: Exception = ConnectionRefusedError("it connected to itself")
        except (OSError, OverflowError) as failed:
            error = failed
        if time.monotonic() + RETRY_S > deadline:
            raise PeerError(
                f"tcp: no receiver at {address[0]}:{address[1]} within {deadline_s:g} s ({error}); start the decode program"
            ) from None
        time.sleep(RETRY_S)
