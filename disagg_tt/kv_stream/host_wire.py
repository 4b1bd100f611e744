"""What carries K and V between two hosts' memories: the contract that each wire (tcp, mpi, nixl, torch) keeps.

A wire moves the layers of one stream at a time, each a number of bytes known beforehand. The two ends meet once, when the
first stream begins; then for each stream:

    decode    begin: PREFILL_REQUEST ---->  begin      both know request, layers and bytes a layer, and compare
    prefill   receive (layer 0) <---- PREFILL_RESPONSE  begin
    prefill   send, sent (layer 0) ... send, sent (layer L-1)  ---->  receive (layer 0) ... receive (layer L-1)
    decode    finish: TAKEN  ---->  finish

A layer is given as extents: uint8 tensors, contiguous in memory, whose bytes follow one another. The two ends may cut a
layer differently: only the sum must be the same. `coalesce` joins extents that touch, so that a paged cache whose blocks
lie in order costs as little as one piece. What a wire makes of a layer's extents is its Layout, kept and used again: the
buffers of a cache or a ring come back, and to look at 64 extents anew costs as much as a third of moving them. With `verify`
each layer travels with its digest.

Every call ends at the wire's deadline. What goes wrong raises StreamError (one end broke the protocol, or the ends do not
agree) or PeerError (the other is gone, hangs, or failed with a reason), tells the other end if it can still be told, and
leaves the wire failed: it must be closed. What was received in a stream may be used when `finish` has returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from disagg_tt.errors import DisaggError, PeerError, StreamError
from disagg_tt.kv_stream.frame import SMALL_BYTES, Header, Kind, digest_of
from disagg_tt.kv_stream.layout import Extents, Layout, coalesce

MAX_LAYERS = 4096
MAX_LAYER_BYTES = 1 << 36  # 64 GiB: more than any mesh holds

MOST_LAYOUTS = 1024  # kept at a time
TELL_S = 0.5  # for telling why an end stops


@dataclass(frozen=True)
class Plan:
    """What a stream is going to carry: `layers` layers of `layer_bytes` bytes each, for request number `request`."""

    request: int
    layers: int
    layer_bytes: int

    @classmethod
    def of(cls, header: Header) -> Plan:
        """Return the plan that a frame announces; raises StreamError for numbers that no stream can have."""
        return cls(header.request, header.layer, header.value).check()

    def header(self, kind: Kind) -> Header:
        return Header(kind, self.request, self.layers, value=self.layer_bytes)

    def check(self) -> Plan:
        """Return the plan; raises StreamError for numbers that no stream can have, before anything is allocated."""
        for name, value, least, most in (
            ("request", self.request, 0, 2**32 - 1),
            ("layers", self.layers, 1, MAX_LAYERS),
            ("layer_bytes", self.layer_bytes, 1, MAX_LAYER_BYTES),
        ):
            if not least <= value <= most:
                raise StreamError(f"a K/V stream with {name} {value:,}; allowed: {least} to {most:,}")
        return self

    @property
    def total_bytes(self) -> int:
        return self.layers * self.layer_bytes


class Channel(ABC):
    """Carries frames to and from the other end, each within `deadline_s` seconds."""

    deadline_s: float

    @abstractmethod
    def put(self, header: Header, payload: bytes = b"") -> None:
        """Send a frame; raises PeerError when the other end does not take it."""

    @abstractmethod
    def get(self, what: str) -> tuple[Header, bytes]:
        """Wait for `what`; return the next frame, its payload only where it is no layer's."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""


class _End(ABC):
    """What both ends share: the plan in hand, the next layer, the channel, and why the wire has failed."""

    name = "?"
    peer = "?"  # what the other end is called in messages

    def __init__(self, *, verify: bool = True) -> None:
        self.plan: Plan | None = None
        self.failure: str | None = None
        self._verify, self._next = verify, 0
        self._channel: Any = None  # of the wire's own kind
        self._layouts: dict[tuple[tuple[int, ...], ...], Layout] = {}  # by the extents' places and sizes

    def register(self, memory: Sequence[torch.Tensor]) -> None:  # noqa: B027 (most wires need nothing)
        """Make `memory`, where all extents lie, known to the wire, once and before the first stream."""

    @abstractmethod
    def _meet(self) -> Channel:
        """Find the other end and return the channel to it."""

    def _begin(self, plan: Plan) -> None:
        if self.plan is not None:
            raise StreamError(f"{self.name}: request {plan.request} begun while {self.plan} is not finished")
        self.plan, self._next = plan.check(), 0
        if self._channel is None:
            self._channel = self._meet()

    def _same(self, header: Header) -> None:
        if (theirs := Plan.of(header)) != self.plan:
            raise StreamError(
                f"{self.name}: the {self.peer} end announces {theirs}, this end expects {self.plan}"
            )

    def _layer(self, layer: int, extents: Extents) -> Layout:
        """Check that `layer` is next and has the planned size; return how its extents lie."""
        plan = self._planned()
        if layer != self._next or layer >= plan.layers:
            raise StreamError(f"{self.name}: layer {layer} of {plan.layers}; layer {self._next} is next")
        sizes, whole = tuple(map(torch.Tensor.numel, extents)), all(map(torch.Tensor.is_contiguous, extents))
        if sum(sizes) != plan.layer_bytes or {e.dtype for e in extents} != {torch.uint8} or not whole:
            raise StreamError(
                f"{self.name}: layer {layer} has {sum(sizes):,} bytes of {', '.join(sorted({str(e.dtype) for e in extents}))}; "
                f"the plan says {plan.layer_bytes:,} bytes, contiguous uint8"
            )
        self._next += 1
        where = tuple(map(torch.Tensor.data_ptr, extents)), sizes
        if where not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._forget_layouts()
            pieces = coalesce(extents)  # which keep their memory, so that nothing else comes to lie there
            self._layouts[where] = Layout(pieces, self._form(pieces))
        return self._layouts[where]

    def _form(self, pieces: list[torch.Tensor]) -> Any:
        """Return what the wire's library takes instead of `pieces`."""
        return pieces

    def _forget_layouts(self) -> None:
        self._layouts.clear()

    def _finish(self) -> Plan:
        plan = self._planned()
        if self._next != plan.layers:
            raise StreamError(f"{self.name}: finished after {self._next} of {plan.layers} layers")
        return plan

    def _planned(self) -> Plan:
        if self.plan is None:
            raise StreamError(f"{self.name}: no stream has begun; call begin with its plan first")
        return self.plan

    def _get(self, kind: Kind, what: str) -> tuple[Header, bytes]:
        return expect(self._channel, kind, what, f"{self.name}: the {self.peer} end")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Inside the block, what is raised leaves the wire failed, and the other end is told of it."""
        if self.failure is not None:
            raise StreamError(
                f"{self.name}: this end has failed ({self.failure}); close it and make a new one"
            )
        try:
            yield
        except BaseException as error:
            self.failure = str(error) or type(error).__name__
            if self._channel is not None and not isinstance(error, PeerError):  # else it knows, or is gone
                tell(self._channel, self.failure)
            raise

    def close(self) -> None:
        """Release everything; may be called in any state, and twice."""
        self.failure = self.failure or "it is closed"
        self._forget_layouts()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def expect(channel: Channel, kind: Kind, what: str, who: str) -> tuple[Header, bytes]:
    """Return the next frame, which must be of `kind`; raises PeerError when it is a failure's reason instead."""
    header, payload = channel.get(what)
    if header.kind is Kind.FAILED:
        raise PeerError(f"{who} failed: {payload.decode(errors='replace')}")
    if header.kind is not kind:
        raise StreamError(f"{who} sent a {header.kind.name} frame; {kind.name} is due")
    return header, payload


def tell(channel: Channel, reason: str) -> None:
    """Say why this end stops, if the other can still be told; the channel is good for nothing else after."""
    text = reason.encode()[:SMALL_BYTES]
    with suppress(DisaggError):
        channel.deadline_s = min(channel.deadline_s, TELL_S)
        channel.put(Header(Kind.FAILED, length=len(text)), text)


class WireSender(_End):
    """The prefill end."""

    peer = "decode"

    def begin(self, plan: Plan) -> None:
        """Agree on `plan` with the receiver, which must call its `begin` with the same; else both raise StreamError."""
        with self._step():
            self._begin(plan)
            header, _ = self._get(Kind.PREFILL_REQUEST, f"waiting for the request of prefill {plan.request}")
            self._channel.put(
                plan.header(Kind.PREFILL_RESPONSE)
            )  # before it is judged: both ends shall see both
            self._same(header)

    def send(self, layer: int, extents: Extents) -> None:
        """Start sending a layer; its extents must stay unchanged until `sent` returns."""
        with self._step():
            layout, plan = self._layer(layer, extents), self._planned()
            digest = digest_of(layout.pieces) if self._verify else 0
            self._send(Header(Kind.LAYER, plan.request, layer, plan.layer_bytes, digest), layout)

    def sent(self, layer: int) -> None:
        """Wait until the extents of `layer`, and of all before it, may be reused."""
        with self._step():
            self._sent(min(layer, self._next - 1))

    def finish(self) -> None:
        """Wait until the receiver has confirmed the whole stream."""
        with self._step():
            plan = self._finish()
            self._sent(plan.layers - 1)
            header, _ = self._get(Kind.TAKEN, f"waiting for the end of request {plan.request}")
            if header.request != plan.request:
                raise StreamError(
                    f"{self.name}: request {header.request} is confirmed; {plan.request} is due"
                )
            self.plan = None

    @abstractmethod
    def _send(self, header: Header, layout: Layout) -> None:
        """Start sending a layer's header and bytes."""

    @abstractmethod
    def _sent(self, layer: int) -> None:
        """Wait until layers up to `layer` are out of their memory."""


class WireReceiver(_End):
    """The decode end."""

    peer = "prefill"
    layer_kind = Kind.LAYER

    _agreed = True  # whether the sender's plan has come and is the same

    def begin(self, plan: Plan) -> None:
        """Ask for `plan`, which the sender's `begin` must be given too; else both raise StreamError, this end at its first layer.

        It waits for nothing but, once, to meet: a sender that is busy answers late, and decode steps go on meanwhile.
        """
        with self._step():
            self._begin(plan)
            self._agreed = False
            self._channel.put(plan.header(Kind.PREFILL_REQUEST))

    def receive(self, layer: int, extents: Extents) -> None:
        """Wait for a layer and write it into `extents`; they hold nothing usable if this raises."""
        with self._step():
            layout, plan = self._layer(layer, extents), self._planned()
            what = f"waiting for layer {layer} of request {plan.request}"
            if not self._agreed:
                self._same(self._get(Kind.PREFILL_RESPONSE, what)[0])
                self._agreed = True
            self._prepare(layout)
            header, payload = self._get(self.layer_kind, what)
            size = plan.layer_bytes if header.kind is Kind.LAYER else header.length
            if (header.request, header.layer, header.length) != (plan.request, layer, size):
                raise StreamError(
                    f"{self.name}: layer {header.layer} of request {header.request} with {header.length:,} bytes came; "
                    f"layer {layer} of request {plan.request} with {size:,} bytes is due"
                )
            self._receive(header, payload, layout)
            if self._verify and header.value and digest_of(layout.pieces) != header.value:
                raise StreamError(
                    f"{self.name}: layer {layer} of request {plan.request} arrived damaged: its digest differs"
                )

    def finish(self) -> None:
        """Confirm to the sender that all layers are here."""
        with self._step():
            self._channel.put(Header(Kind.TAKEN, self._finish().request))
            self.plan = None

    def _prepare(self, layout: Layout) -> None:
        """Get ready for a layer's bytes before its header is here, where that saves a wait."""
        return

    @abstractmethod
    def _receive(self, header: Header, payload: bytes, layout: Layout) -> None:
        """Write a layer's bytes, whose header has come, to where `layout` says."""
