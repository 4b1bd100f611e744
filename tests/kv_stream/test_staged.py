"""K and V through host memory: what is sent lands in the slot, a buffer is reused only when it was sent, and a failure ends both."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import tiny_config

from disagg_tt.cache import PagedCache
from disagg_tt.core import Request, whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_two
from disagg_tt.errors import DisaggError, InputError, PeerError, StreamError
from disagg_tt.kv_stream.base import Metadata, PrefillTimes, State
from disagg_tt.kv_stream.control import ZmqControl
from disagg_tt.kv_stream.staged import SEND_DEPTH, StagedReceiver, StagedSender
from disagg_tt.kv_stream.tcp import TcpReceiver, TcpSender

LAYERS = SEND_DEPTH + 2  # so that the ring of layer buffers goes round
CONFIG = tiny_config(num_hidden_layers=LAYERS, num_key_value_heads=4, head_dim=64)
CHIPS, PAGES = 2, 8
TILE_BYTES = {"bfloat8_b": 1088, "bfloat16": 2048}
TIMES = PrefillTimes(0.0, 0.0, 0.0)
DEADLINE = 5.0
TOKEN = 35308


class LazyWire:
    """A wire in memory whose sender reads a layer as late as it may: when told that its buffer is wanted back."""

    name = "lazy"

    def __init__(self) -> None:
        self.layers: queue.Queue[torch.Tensor] = queue.Queue()
        self.sizes: list[list[int]] = []
        self._sent: list[Any] = []
        self._read = 0

    def register(self, memory: Any) -> None:
        self.memory = memory

    def begin(self, plan: Any) -> None:
        """Both ends are this object."""

    def send(self, layer: int, extents: Any) -> None:
        self.sizes.append([e.numel() for e in extents])
        self._sent.append(extents)

    def sent(self, layer: int) -> None:
        for extents in self._sent[self._read : layer + 1]:
            self.layers.put(torch.cat(extents))
            self._read += 1

    def receive(self, layer: int, extents: Any) -> None:
        data = self.layers.get(timeout=DEADLINE)
        for extent, part in zip(extents, data.split([e.numel() for e in extents]), strict=True):
            extent.copy_(part)

    def finish(self) -> None:
        """Nothing to agree on."""

    close = finish


class Stream:
    """A staged sender in this thread and its receiver in another, each with a mesh; layers are random numbers."""

    def __init__(
        self, dtype: str = "bfloat8_b", overlap: str = "inline", wires: Any = None, deadline: float = DEADLINE
    ):
        self.dtype = getattr(ttnn, dtype)
        self.parent, self.mesh, there = open_two((1, CHIPS))
        self.ours = ZmqControl("decode", bind=True)
        self.theirs = ZmqControl("prefill", bind=False)
        self.theirs.connect(self.ours.address)
        self.ours.wait_for_peer()
        if wires is None:
            receiving: Any = TcpReceiver(token="test", deadline_s=deadline)
            wires = TcpSender("127.0.0.1", receiving.port, token="test", deadline_s=deadline), receiving
        self.wires = wires
        self.cache = PagedCache(there, CONFIG, 2, PAGES, 2 * PAGES, self.dtype)
        self.row = self.cache.table_row(list(range(PAGES, 2 * PAGES)))
        most = PAGES * 32
        self.sender = StagedSender(
            self.mesh, wires[0], self.ours, CONFIG, self.dtype, most, overlap=overlap, deadline_s=deadline
        )
        self.receiver = StagedReceiver(
            there, wires[1], self.theirs, CONFIG, self.cache, most, deadline_s=deadline
        )
        self.metadata: queue.Queue[Metadata] = queue.Queue()  # of streams that the receiver has ended
        self.failure: DisaggError | None = None
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        try:
            while True:
                message = self.theirs.receive(DEADLINE, "the next message")
                if message["kind"] == "announce":
                    self.receiver.accept(message["request"], message["tokens"], self.row)
                elif message["kind"] == "layer":
                    self.receiver.receive_layer(message["layer"])
                elif message["kind"] == "sent":
                    self.metadata.put(self.receiver.finish())
                elif message["kind"] == "bye":
                    return
        except DisaggError as error:
            self.failure = error
            self.theirs.send("failed", reason=str(error))
            self.receiver.close()

    def tensors(self, tokens: int, layer: int) -> tuple[Any, Any]:
        shape = (1, CONFIG.num_key_value_heads, whole_tiles(tokens), CONFIG.head_dim)
        mapper = ttnn.ShardTensorToMesh(self.mesh, dim=1)
        values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1000 * tokens + layer))
        k, v = (
            ttnn.from_torch(
                part, dtype=self.dtype, layout=ttnn.TILE_LAYOUT, device=self.mesh, mesh_mapper=mapper
            )
            for part in values
        )
        return k, v

    def send(self, tokens: int, request: int = 0, length: int | None = None) -> list[tuple[Any, Any]]:
        """Stream a request of so many tokens; return its layers as the sender's tensors."""
        self.sender.announce(Request(request, (1,) * tokens, 8))
        layers = [self.tensors(tokens, layer) for layer in range(LAYERS)]
        for layer, (k, v) in enumerate(layers):
            self.sender.send_layer(layer, k, v)
        self.sender.finish(Metadata(request, length or tokens, TOKEN, LAYERS), TIMES)
        return layers

    def end(self) -> None:
        """End the receiver's thread and close everything."""
        if self._thread.is_alive() and self.failure is None:
            self.ours.send("bye")
        self._thread.join(2 * DEADLINE)
        assert not self._thread.is_alive()
        for end in (self.sender, self.receiver, self.ours, self.theirs):
            end.close()
        close_mesh(self.parent)


@pytest.fixture
def stream() -> Iterator[Callable[..., Stream]]:
    made: list[Stream] = []

    def make(*arguments: Any, **named: Any) -> Stream:
        made.append(Stream(*arguments, **named))
        return made[-1]

    yield make
    for one in made:
        one.end()
    left = [t.name for t in threading.enumerate() if "-sender" in t.name]
    assert left == []


def whole(tensor: Any) -> torch.Tensor:
    return torch.cat([ttnn.to_torch(shard) for shard in ttnn.get_device_tensors(tensor)], dim=1).float()


def check_cache(one: Stream, sent: list[tuple[Any, Any]], tokens: int) -> None:
    """Each layer's K and V are in the slot's first pages, and nothing is anywhere else that was not there before."""
    pages = whole_tiles(tokens) // 32
    for layer, pools in zip(sent, one.cache.layers, strict=True):
        for tensor, pool in zip(layer, pools, strict=True):
            values, blocks = whole(tensor)[0], whole(pool)
            for page in range(pages):
                assert torch.equal(blocks[PAGES + page], values[:, 32 * page : 32 * page + 32])
            assert not blocks[:PAGES].any(), "another slot's pages"


@pytest.mark.parametrize("overlap", ["inline", "after"])
@pytest.mark.parametrize("dtype", TILE_BYTES)
def test_each_layer_lands_in_the_slots_pages_and_its_bytes_are_counted(stream, dtype, overlap):
    one = stream(dtype, overlap)
    for request, tokens in enumerate((70, 1, 33, 33)):  # other shapes in the same memory
        sent = one.send(tokens, request)
        assert one.metadata.get(timeout=DEADLINE) == Metadata(request, tokens, TOKEN, LAYERS)
        assert one.sender.stream.state is one.receiver.stream.state is State.DONE
        check_cache(one, sent, tokens)
        tiles = 2 * LAYERS * CONFIG.num_key_value_heads * whole_tiles(tokens) // 32 * CONFIG.head_dim // 32
        assert one.sender.bytes_sent == one.receiver.bytes_received == tiles * TILE_BYTES[dtype]
        assert len(one.receiver.arrived_at) == LAYERS


def test_a_buffer_is_reused_only_when_the_wire_has_sent_it(stream):
    wire = LazyWire()
    one = stream(wires=(wire, wire))
    sent = one.send(64)
    one.metadata.get(timeout=DEADLINE)
    check_cache(one, sent, 64)
    # K of each chip, then V of each chip
    assert wire.sizes == [[CONFIG.num_key_value_heads // CHIPS * 2 * 2 * 1088] * 2 * CHIPS] * LAYERS


def test_a_layer_is_copied_to_the_host_only_where_no_earlier_one_still_waits(stream):
    wire = LazyWire()
    one = stream(wires=(wire, wire))
    all_told = threading.Event()
    send = one.sender._control.send

    def telling(kind: str, **fields: Any) -> None:
        send(kind, **fields)
        if kind == "layer" and fields["layer"] == LAYERS - 1:
            all_told.set()

    # The wire is stuck at first. A sender that did not wait for it would have overwritten layers meanwhile.
    one.sender._control.send = telling
    wire.begin = lambda plan: all_told.wait(0.5) and None  # type: ignore[method-assign]
    one.receiver._wire = type("Receiving", (), {"__getattr__": lambda self, name: getattr(wire, name)})()
    one.receiver._wire.begin = lambda plan: None
    sent = one.send(64)
    one.metadata.get(timeout=DEADLINE)
    check_cache(one, sent, 64)


def test_layers_leave_while_the_prefill_goes_on(stream):
    """The first layer has arrived before the last is computed: nothing else could make this thread wait for it."""
    one = stream()
    one.sender.announce(Request(0, (1,) * 32, 8))
    arrived = threading.Event()
    receive = one.wires[1].receive

    def receiving(layer: int, extents: Any) -> None:
        receive(layer, extents)
        arrived.set()

    one.wires[1].receive = receiving
    for layer in range(2):  # a layer is told of when the next is enqueued
        one.sender.send_layer(layer, *one.tensors(32, layer))
    assert arrived.wait(DEADLINE)
    for layer in range(2, LAYERS):
        one.sender.send_layer(layer, *one.tensors(32, layer))
    one.sender.finish(Metadata(0, 32, TOKEN, LAYERS), TIMES)
    assert one.metadata.get(timeout=DEADLINE)


def breaking(wire: Any, method: str, layer: int, error: Exception) -> None:
    """Let `method` of a wire raise `error` when it is called for `layer`."""
    works = getattr(wire, method)

    def call(number: int, *rest: Any) -> Any:
        if number == layer:
            raise error
        return works(number, *rest)

    setattr(wire, method, call)


@pytest.mark.parametrize("layer", [0, SEND_DEPTH, LAYERS - 1])
def test_a_wire_that_fails_at_the_sender_fails_the_stream_and_the_next_use(stream, layer):
    one = stream(deadline=1.0)
    breaking(one.wires[0], "send", layer, StreamError("torn"))
    with pytest.raises(StreamError, match="torn"):
        one.send(32)
    assert one.sender.stream.state is State.FAILED
    with pytest.raises(DisaggError):
        one.send(32, 1)
    one.sender.close()
    one._thread.join(2 * DEADLINE)
    assert isinstance(one.failure, DisaggError)
    assert one.metadata.empty()


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_wire_that_fails_at_the_receiver_ends_the_sender_with_the_reason(stream, layer):
    one = stream(deadline=2.0)
    breaking(one.wires[1], "receive", layer, StreamError("arrived damaged"))
    with pytest.raises(PeerError, match="arrived damaged"):
        one.send(32)
    assert one.sender.stream.state is one.receiver.stream.state is State.FAILED
    assert one.metadata.empty()


def test_metadata_that_does_not_fit_is_never_confirmed(stream):
    one = stream(deadline=2.0)
    with pytest.raises(PeerError, match="does not fit the announced request 0 of 32 tokens"):
        one.send(32, length=31)
    assert one.receiver.stream.state is State.FAILED
    assert one.metadata.empty()


def test_a_second_queue_is_refused(stream):
    with pytest.raises(InputError, match="over a wire allowed: inline, after"):
        StagedSender(None, None, None, CONFIG, None, 32, overlap="queue", deadline_s=1.0)  # type: ignore[arg-type]


def test_close_may_come_in_any_state_and_twice(stream):
    one = stream(deadline=1.0)
    one.sender.announce(Request(0, (1,) * 32, 8))
    one.sender.send_layer(0, *one.tensors(32, 0))
    for _ in range(2):
        one.sender.close()
    one._thread.join(2 * DEADLINE)  # whose wire is gone
    assert isinstance(one.failure, PeerError)
    for _ in range(2):
        one.receiver.close()
