"""The contract of a K/V stream.

One stream carries one request:  announce -> ready -> layers 0..L-1, K then V -> metadata.

    sender    waiting --announce, ready--> streaming --finish--> done
    receiver  waiting --accept-----------> streaming --finish--> done      any error: failed

A call in the wrong state, a layer out of order, or metadata that does not fit the announcement raises StreamError and
leaves the stream failed. K and V are [1, kv_heads / chips, whole tiles of tokens, head_dim] a chip, of the cache's
dtype; only the prompt, rounded up to 32 tokens, ever travels.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from disagg_tt.config import LlamaConfig
from disagg_tt.core import TILE, Request, whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.errors import RefusedError, StreamError
from disagg_tt.kv_stream.control import START_UP_S, Control, Message, expect, look_for

Guard = Callable[[str], AbstractContextManager[Any]]

MAGIC, VERSION = 0x44544B56, 1


class State(Enum):
    WAITING = "waiting"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class PrefillTimes:
    """When a request came, when its prefill started and when it was computed: s of the prefill rank's clock."""

    called_at: float
    started_at: float
    computed_at: float


@dataclass(frozen=True)
class Metadata:
    """What ends a stream: integers, sent as one uint32 tile (bfloat16 would turn token 35308 into 35328)."""

    request: int
    sequence_length: int
    next_token: int
    layers: int

    def tile(self) -> torch.Tensor:
        """Return the int64 [1, 1, 32, 32] tile: magic, version, then the fields in order."""
        values = torch.zeros(1, 1, TILE, TILE, dtype=torch.int64)
        fields = [MAGIC, VERSION, self.request, self.sequence_length, self.next_token, self.layers]
        values[0, 0, 0, : len(fields)] = torch.tensor(fields)
        return values

    @classmethod
    def from_tile(cls, tile: torch.Tensor) -> Metadata:
        """Read a tile back; raises StreamError when it is not one of ours."""
        magic, version, *fields = (int(v) for v in tile.to(torch.int64)[0, 0, 0, :6])
        if (magic, version) != (MAGIC, VERSION):
            raise StreamError(
                f"metadata begins with {magic:#x}, version {version}; {MAGIC:#x}, version {VERSION} is needed: "
                "the tile was corrupted, or another program sends on this socket"
            )
        return cls(*fields)

    def misfit(self, request: int, tokens: int, layers: int) -> str:
        """Return "" if this can end the stream of `request` as it was announced, else what is wrong."""
        if (self.request, self.sequence_length, self.layers) == (request, tokens, layers):
            return ""
        return f"metadata {self} does not fit the announced request {request} of {tokens} tokens and {layers} layers"


def layer_spec(config: LlamaConfig, chips: int, tokens: int, dtype: Any) -> Any:
    """Return the spec of one layer's K or V for `tokens` tokens: [1, kv_heads / chips, whole tiles, head_dim] a chip."""
    shape = ttnn.Shape([1, config.num_key_value_heads // chips, whole_tiles(tokens), config.head_dim])
    return ttnn.TensorSpec(shape, dtype, ttnn.TILE_LAYOUT)


class _Stream:
    """The state both ends keep of the stream in hand."""

    def __init__(self, layers: int):
        self.layers = layers
        self.state = State.DONE
        self.request = -1
        self.next_layer = 0

    def begin(self, request: int) -> None:
        if self.state is State.STREAMING:
            self.fail(
                f"request {request} announced while request {self.request} is streaming; finish that first"
            )
        self.state, self.request, self.next_layer = State.WAITING, request, 0

    def streaming(self) -> None:
        self.need(State.WAITING, "starting to stream")
        self.state = State.STREAMING

    def layer(self, index: int) -> None:
        self.need(State.STREAMING, f"layer {index}")
        if index != self.next_layer or index >= self.layers:
            self.fail(
                f"layer {index} of {self.layers}; layer {self.next_layer} is next, layers go in order, each once"
            )
        self.next_layer += 1

    def ending(self) -> None:
        """Check, before the metadata is sent or received, that every layer was."""
        self.need(State.STREAMING, "the end")
        if self.next_layer != self.layers:
            self.fail(f"ended after {self.next_layer} of {self.layers} layers; send every layer first")

    def end(self) -> None:
        self.ending()
        self.state = State.DONE

    def need(self, state: State, what: str) -> None:
        if self.state is not state:
            self.fail(f"{what} in state {self.state.value}; it is allowed in state {state.value}")

    def fail(self, reason: str) -> None:
        self.state = State.FAILED
        raise StreamError(f"K/V stream of request {self.request}: {reason}")


class KVSender(ABC):
    """The prefill side of a stream.

    Of the request in hand `bytes_sent` counts what the transport wrote, `waited_s` how long the prefill waited for a slot.
    """

    def __init__(self, layers: int):
        self.stream = _Stream(layers)
        self.bytes_sent = 0
        self.waited_s = 0.0

    @abstractmethod
    def announce(self, request: Request) -> None:
        """Tell the receiver about `request`. The first layer waits until its cache is reserved: the stream is then streaming."""

    @abstractmethod
    def send_layer(self, layer: int, k: Any, v: Any) -> None:
        """Enqueue sending layer `layer`'s K and V. The tensors are kept alive as long as needed.

        The first layer waits for the receiver, unless that may take until the end (RemoteSender.patience_s): raises
        PeerError when it does not answer in time, died or failed, and RefusedError when it wants the request no more, after
        which another may be announced.
        """

    @abstractmethod
    def finish(self, metadata: Metadata, times: PrefillTimes) -> None:
        """Send the metadata and wait until all of the stream has left; `times` are for the receiver's measurements.

        Raises as `send_layer` where the receiver was not waited for before.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the transport's resources; may be called in any state, and twice."""


class RemoteSender(KVSender):
    """What every sender to another mesh does: it announces over a control channel, and tells of each layer.

    A layer is told of when it is computed, not when it is enqueued: a receive that waits on the device would hold up the
    decode steps behind it. So the host runs at most one layer ahead of the device. `done` holds answers that came while it waited for a slot.

    A receiver that is busy with decode steps takes layers only between two of them, and each layer that waits for that
    holds up the prefill. With `patience_s` the first layer waits so long for it, s; then the layers are kept until all are computed.
    """

    def __init__(self, control: Control, layers: int, deadline_s: float):
        super().__init__(layers)
        self._control, self._deadline_s = control, deadline_s
        # the decode rank may still be compiling at the first request
        self._limit_s = max(START_UP_S, deadline_s)
        self.done: list[Message] = []
        self.patience_s: float | None = None
        self._kept: list[tuple[int, Any, Any]] = []  # layers that leave at the end
        self.guard: Guard = (
            nullcontext  # entered around each wait for the device, which has no deadline of its own
        )
        # layers that the receiver has not been told of, each with the event that says that it is computed
        self._untold: deque[tuple[int, Any]] = deque()

    def announce(self, request: Request) -> None:
        self.bytes_sent, self.waited_s = 0, 0.0
        self._kept.clear()
        self.stream.begin(request.id)
        self._control.send(
            "announce", request=request.id, tokens=len(request.tokens), max_new_tokens=request.max_new_tokens
        )

    def _leaves_now(self, layer: int, k: Any, v: Any) -> bool:
        """Return whether a layer may be sent as it is computed; else it is kept."""
        if self.stream.state is State.WAITING and not self._kept:
            self._wait_until_ready(self.patience_s)
        if self.stream.state is not State.WAITING:
            self.stream.layer(layer)
            return True
        self._kept.append((layer, k, v))
        return False

    def _wait_for_kept(self) -> bool:
        """Wait for the receiver if layers were kept because it was not ready; return whether they were."""
        if self.stream.state is not State.WAITING or not self._kept:
            return False
        self._wait_until_ready()
        for layer, _, _ in self._kept:
            self.stream.layer(layer)
        return True

    def _wait_until_ready(self, patience_s: float | None = None) -> None:
        """Wait until the receiver has reserved its cache, once a stream; `patience_s`: or for so long."""
        what, began = f"request {self.stream.request}: a slot on the decode rank", time.monotonic()
        try:
            if patience_s is None:
                ready: Message | None = expect(self._control, "ready", self._limit_s, what, aside=self.done)
            else:
                ready = look_for(self._control, "ready", patience_s, what, aside=self.done)
        except RefusedError:
            self.stream.state = State.DONE
            self._kept.clear()
            raise
        finally:
            self.waited_s += time.monotonic() - began
        if ready is None:
            return
        self._limit_s = self._deadline_s
        if ready["request"] != self.stream.request:
            self.stream.fail(
                f"the decode rank is ready for request {ready['request']}; it was told of {self.stream.request}"
            )
        self.stream.streaming()

    def _tell_when_computed(self, layer: int, computed: Any) -> None:
        """Tell the receiver of the layers before `layer`, and of this one when the next is enqueued.

        Of the last one at once: the first token is read behind its send, which waits for the receiver.
        """
        self._tell_of_layers()
        self._untold.append((layer, computed))
        if layer == self.stream.layers - 1:
            self._tell_of_layers()

    def _tell_of_layers(self) -> None:
        while self._untold:
            layer, computed = self._untold.popleft()
            with self.guard(
                f"the K/V of request {self.stream.request} to leave"
            ):  # those of the layers before it
                ttnn.event_synchronize(computed)
            self._control.send("layer", request=self.stream.request, layer=layer, at=time.monotonic())


class KVReceiver(ABC):
    """The decode side of a stream: fills the blocks that were reserved as the layers come.

    `bytes_received` counts the request in hand; `arrived_at` holds when each layer was in the cache, as far as waited for.
    """

    def __init__(self, mesh: Any, layers: int):
        self.stream = _Stream(layers)
        self._mesh = mesh
        self._events: list[Any] = []
        self.arrived_at: list[float] = []
        self.bytes_received = 0

    def _begin(self, request: int) -> None:
        self.stream.begin(request)
        self._events, self.arrived_at, self.bytes_received = [], [], 0

    def wait_for_layer(self) -> bool:
        """Wait until the next enqueued layer is in the cache and note the time; False when none is outstanding."""
        if len(self.arrived_at) == len(self._events):
            return False
        ttnn.event_synchronize(self._events[len(self.arrived_at)])
        self.arrived_at.append(time.monotonic())
        return True

    @abstractmethod
    def accept(self, request: int, tokens: int, row: Any) -> None:
        """Take `tokens` tokens of `request` into the blocks of `row` (PagedCache.table_row), and tell the sender so."""

    @abstractmethod
    def receive_layer(self, layer: int) -> None:
        """Enqueue receiving one layer that the sender is known to have enqueued, and writing it into the cache."""

    @abstractmethod
    def finish(self) -> Metadata:
        """Receive the metadata, wait until everything has arrived, and return it; raises StreamError if it is wrong."""

    @abstractmethod
    def close(self) -> None:
        """Release the transport's resources; may be called in any state, and twice."""
