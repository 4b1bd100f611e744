"""The workers as the server's process knows them: who is there, in what state, and the messages to and from them.

A worker is there from its registration until its beats stop, its process says so, or another of its name registers. It
must know the token (each end answers the other's nonce with an HMAC under it), and run the same model and settings as
the others: these decide the tokens.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio
from loguru import logger

from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import DisaggError, InputError, PeerError, StreamError
from disagg_tt.serving import protocol
from disagg_tt.serving.connection import proof
from disagg_tt.serving.protocol import (
    BEAT_S,
    LOST_S,
    MAX_MESSAGE_BYTES,
    Beat,
    Challenge,
    Connect,
    Dropped,
    Hello,
    Leave,
    Linked,
    Message,
    Open,
    Opened,
    Register,
    Stop,
    Welcome,
)
from disagg_tt.transfer_config import is_loopback

MAX_STRANGERS = 256  # connections that have said hello and not registered
LINK_S = 15.0  # that making a link may take; then it is tried again


@dataclass
class Worker:
    """A registered worker.

    Of a prefill worker, `linked`: the decode workers that it has a link to (a rank of a job: all of the job), and
    `asked_at`: when they were told to make one.
    """

    identity: bytes
    about: Register
    session: str
    beat_at: float
    state: protocol.State = field(default_factory=protocol.State)
    linked: set[str] = field(default_factory=set)
    asked_at: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.about.name


class Hub:
    """Listens for workers. `on_message(name, message)`, `on_join(worker)` and `on_lost(name, reason)` are the frontend's.

    job_lost: set when a rank of a job is lost, and with it its job. told: whether workers were told to stop.
    """

    def __init__(
        self, address: str = "tcp://127.0.0.1:*", token: str = "", *, digest: str = "", max_seq_len: int = 0
    ):
        """Listen at `address`, zmq's form; raises InputError where that cannot be, or would be open to all.

        digest, max_seq_len: of the checkpoint that is served, if one is, and the tokens that a request may have: workers
        with another one, or for fewer tokens, are refused.
        """
        host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        if not token and not is_loopback(host):
            raise InputError(
                f"the hub's address is {address}, which others reach too, and there is no token; set DISAGG_TT_TOKEN for the "
                "proxy and its workers"
            )
        self.workers: dict[str, Worker] = {}
        self.on_message: Callable[[str, Message], None] = lambda name, message: None
        self.on_join: Callable[[Worker], None] = lambda worker: None
        self.on_lost: Callable[[str, str], None] = lambda name, reason: None
        self.job_lost = asyncio.Event()
        self.stopping = self.told = False
        self._token, self._digest, self._max_seq_len = token, digest, max_seq_len
        self._by_identity: dict[bytes, str] = {}
        self._nonces: dict[bytes, str] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise InputError(f"the hub cannot listen at {address}: {error}; choose another address") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to take messages, in the running event loop."""
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    def of_role(self, role: str) -> list[Worker]:
        """Return the workers of a role that are there."""
        return [worker for worker in self.workers.values() if worker.about.role == role]

    def linked_to(self, decode: str) -> list[str]:
        """Return the prefill workers that have a link to a decode worker."""
        worker = self.workers.get(decode)
        if worker is None:
            return []
        in_job = worker.about.in_job
        return [p.name for p in self.of_role(PREFILL) if (in_job and p.about.in_job) or decode in p.linked]

    def send(self, name: str, message: Message) -> None:
        """Send `message` to a worker; raises PeerError when it is not there."""
        worker = self.workers.get(name)
        if worker is None:
            raise PeerError(f"worker {name} is gone; there are {', '.join(self.workers) or 'none'}")
        self._send(worker.identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        frames = [identity, protocol.encode(message)]
        sent: asyncio.Future[Any] = self._socket.send_multipart(frames, zmq.NOBLOCK)  # type: ignore[assignment]
        # a worker that far behind hangs, or is gone: its beats will tell
        if sent.done() and sent.exception():
            logger.debug("{} took no message: {}", self._by_identity.get(identity), sent.exception())

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            if len(frames) != 1:
                continue
            try:
                self._take(identity, protocol.to_hub(frames[0]))
            except DisaggError as error:
                logger.warning("from {}: {}", self._by_identity.get(identity, "a stranger"), error)
            except Exception:  # a defect here; without this task no worker would be heard any more
                logger.exception("from {}", self._by_identity.get(identity, "a stranger"))

    def _take(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif isinstance(message, Register):
            self._register(identity, message)
        elif isinstance(message, Beat):
            worker = self.workers.get(message.name)
            if worker is not None and hmac.compare_digest(worker.session, message.session):
                worker.beat_at, worker.state = time.monotonic(), message.state
        elif (name := self._by_identity.get(identity)) is None:
            logger.debug("a {} message of a worker that is not registered", message.kind)  # type: ignore[attr-defined]
        elif isinstance(message, Leave):
            self.lose(name, "it left")
        elif isinstance(message, Opened):
            self._connect(name, message)
        elif isinstance(message, Linked):
            if message.peer in self.workers:
                self.workers[name].linked.add(message.peer)
        else:
            self.on_message(name, message)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if len(self._nonces) >= MAX_STRANGERS:
            self._nonces.pop(next(iter(self._nonces)))
        nonce = self._nonces[identity] = secrets.token_hex(32)
        self._send(identity, Challenge(nonce=nonce, proof=proof(self._token, "hub", hello.nonce)))

    def _register(self, identity: bytes, about: Register) -> None:
        if refusal := self._refusal(identity, about):
            self._send(identity, Dropped(reason=refusal))
            raise StreamError(refusal)
        if about.name in self.workers:
            self.lose(about.name, "another worker of its name registered", again=False)
        if name := self._by_identity.get(identity):
            self.lose(name, "it registered under another name", again=False)
        worker = Worker(identity, about, secrets.token_hex(16), time.monotonic())
        self.workers[about.name], self._by_identity[identity] = worker, about.name
        self._send(identity, Welcome(session=worker.session))
        logger.info("{} joined: {} slots, {} blocks", about.name, about.slots, about.blocks)
        self.on_join(worker)
        self._link_all()

    def _refusal(self, identity: bytes, about: Register) -> str:
        """Return why a worker cannot be taken, "" if it can."""
        nonce = self._nonces.pop(identity, None)
        if nonce is None or not hmac.compare_digest(about.proof, proof(self._token, "worker", nonce)):
            return f"{about.name} does not know the token; give both the same one"
        if self.stopping:
            return "the server stops"
        if self._digest and about.digest != self._digest:
            return f"{about.name} has checkpoint {about.digest:.16}, the server {self._digest:.16}; give both the same --model"
        if about.max_seq_len < self._max_seq_len:
            return (
                f"{about.name} takes sequences of {about.max_seq_len} tokens, the server of {self._max_seq_len}; give both the "
                "same --max-seq-len"
            )
        if other := next((w for w in self.workers.values() if w.name != about.name), None):
            for what in ("digest", "settings", "max_seq_len"):
                ours, theirs = getattr(other.about, what), getattr(about, what)
                if ours != theirs:
                    return (
                        f"{about.name} has {what} {theirs!s:.200}, {other.name} has {ours!s:.200}; start all workers with the "
                        "same model and settings"
                    )
        return ""

    def _link_all(self) -> None:
        """Have every prefill worker that was started by hand linked with every such decode worker."""
        now = time.monotonic()
        for prefill in self.of_role(PREFILL):
            for decode in self.of_role(DECODE):
                by_hand = not (prefill.about.in_job or decode.about.in_job)
                lately = now - prefill.asked_at.get(decode.name, -LINK_S) < LINK_S
                if by_hand and decode.name not in prefill.linked and not lately:
                    prefill.asked_at[decode.name] = now
                    self._send(decode.identity, Open(peer=prefill.name))

    def _connect(self, decode: str, opened: Opened) -> None:
        if opened.peer in self.workers:
            self.send(opened.peer, Connect(peer=decode, address=opened.address))

    def relink(self, prefill: str, decode: str) -> None:
        """Have a link that was lost made anew."""
        worker = self.workers.get(prefill)
        if worker is not None and decode in worker.linked:
            worker.linked.discard(decode)
            worker.asked_at.pop(decode, None)
            self._link_all()

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            if now - before > 2 * BEAT_S:
                continue  # this process was held up, and beats wait to be taken
            for worker in list(self.workers.values()):
                if now - worker.beat_at > LOST_S:
                    self.lose(worker.name, f"no beat for {LOST_S:g} s")
            self._link_all()

    def lose(self, name: str, reason: str, *, again: bool = True) -> None:
        """Take a worker off the list, whatever it was doing, and tell it so; a rank of a job with all others of the job.

        `again`: one that was started by hand may come again.
        """
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self._by_identity.pop(worker.identity, None)
        for other in self.workers.values():
            other.linked.discard(name)
            other.asked_at.pop(name, None)
        logger.warning("{} is lost: {}", name, reason)
        if not self.told:
            self._send(worker.identity, Dropped(reason=reason, again=again and not worker.about.in_job))
        self.on_lost(name, reason)
        if worker.about.in_job:
            self.job_lost.set()
            for other in list(self.workers.values()):
                if other.about.in_job:
                    self.lose(other.name, f"{name} of its job is lost")

    def stop_workers(self) -> None:
        """Tell all workers to stop, and take no more. They are lost from here on."""
        self.stopping, self.told = True, bool(self.workers)
        for name in list(self.workers):
            self.send(name, Stop())
        for name in list(self.workers):
            self.lose(name, "the server stops")

    async def close(self) -> None:
        """Close; workers that were not told to stop look for a hub at this address for a while."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=500)
