"""What comes over one link to a decode rank: chunks of prompts, each announced, layer by layer, and ended with its token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_tt.errors import StreamError
from disagg_tt.kv_stream.base import KVReceiver
from disagg_tt.kv_stream.control import Message
from disagg_tt.link import Link
from disagg_tt.perf import transfer_times
from disagg_tt.serving.scheduler import Sequence


@dataclass(frozen=True)
class Arrived:
    """A chunk that is in the cache. bytes: of K and V and metadata on the wire. Times are s of this rank's clock.

    prefill: the start and end of the prefill rank's work on it. layers: each layer's sending and arrival.
    """

    tokens: int
    next_token: int
    bytes: int
    prefill: tuple[float, float]
    layers: list[tuple[float, float]]
    hidden_ms: float
    exposed_ms: float


class Inlet:
    """A link from the prefill rank `peer`, and the chunk that comes over it, if one does: `sequence` is whose."""

    def __init__(self, peer: str, link: Link, receiver: KVReceiver, offset: float):
        """`offset`: the prefill rank's clock minus this one's, s."""
        self.peer, self.link = peer, link
        self.sequence: Sequence | None = None
        self._receiver, self._offset = receiver, offset
        self._pending: deque[Message] = deque()  # layers told of, and the chunk's end
        self._number = self._tokens = 0
        self._sent: list[float] = []  # when each layer was, s of this rank's clock

    @property
    def pending(self) -> bool:
        """Whether a layer or a chunk's end waits to be taken."""
        return bool(self._pending)

    @property
    def layers(self) -> int:
        """How many layers wait to be taken."""
        return sum(message["kind"] == "layer" for message in self._pending)

    @property
    def ended(self) -> bool:
        """Whether all layers of a chunk have been taken, and its end is next."""
        return bool(self._pending) and self._pending[0]["kind"] == "sent"

    def poll(self, announced: Callable[[Inlet, int, int], None]) -> bool:
        """Take what the prefill rank says, up to a chunk's end: what follows that on the channel is the stream's own.

        `announced(self, request, tokens)` is called for each chunk, and answers with `accept` or `refuse`. Returns whether
        the prefill rank goes on; raises StreamError for what it may not say now.
        """
        while not (self._pending and self._pending[-1]["kind"] == "sent"):
            message = self.link.control.poll()
            if message is None:
                return True
            kind = message["kind"]
            if kind == "announce":
                if self.sequence is not None:
                    raise StreamError(
                        f"{self.peer} announces request {message['request']} while another is streaming"
                    )
                announced(self, message["request"], message["tokens"])
            elif kind in ("layer", "sent"):
                if self.sequence is None or message["request"] != self._number:
                    raise StreamError(
                        f"{self.peer} sends a {kind!r} of request {message['request']} unannounced"
                    )
                self._pending.append(message)
            elif kind == "bye":
                return False
            elif kind != "busy":
                raise StreamError(f"{self.peer} sends a {kind!r} message, which it may not")
        return True

    def accept(self, sequence: Sequence, number: int, tokens: int, row: Any) -> None:
        """Let the announced chunk of request `number` come into the blocks of `row` (PagedCache.table_row)."""
        self.sequence, self._number, self._tokens, self._sent = sequence, number, tokens, []
        self._receiver.accept(number, tokens, row)

    def refuse(self, number: int) -> None:
        """Tell the prefill rank that nobody waits for the chunk which it announced."""
        self.link.control.send("refused", request=number, reason="it was cancelled, or never asked for")

    def take_layer(self) -> None:
        """Put the next arrived layer into the cache."""
        message = self._pending.popleft()
        self._sent.append(message["at"] - self._offset)
        self._receiver.receive_layer(message["layer"])

    def note_arrivals(self) -> None:
        """Wait until the layers that were taken are in the cache, so that each one's time is its own and not the chunk's."""
        while self._receiver.wait_for_layer():
            pass

    def end(self) -> Arrived:
        """Wait for the last of the chunk whose layers have all been taken; the link is free for another then."""
        message = self._pending.popleft()
        metadata = self._receiver.finish()
        self.sequence = None
        began, computed = message["started_at"] - self._offset, message["computed_at"] - self._offset
        arrived_at = list(self._receiver.arrived_at)
        times = transfer_times(self._sent[0], arrived_at[-1], computed)
        return Arrived(
            tokens=self._tokens,
            next_token=metadata.next_token,
            bytes=self._receiver.bytes_received,
            prefill=(began, computed),
            layers=list(zip(self._sent, arrived_at, strict=True)),
            hidden_ms=times["hidden_ms"],
            exposed_ms=times["exposed_ms"],
        )

    def close(self) -> None:
        """Close the link of a worker that was started by hand; those of a job's ranks are closed with the job."""
        if not self.link.ranks:
            self.link.close()
