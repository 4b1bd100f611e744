"""What travels between the meshes: every byte counted where the transport writes, its order, and where it lands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import random_checkpoint, small_tokenizer, tiny_config

from disagg_tt.cache import PagedCache
from disagg_tt.config import Options
from disagg_tt.core import Request, whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.emulator.channel import REPLICATED, LocalChannel
from disagg_tt.device.emulator.numeric import pack
from disagg_tt.device.mesh import close_mesh, open_two
from disagg_tt.errors import DeviceError, RefusedError, StreamError
from disagg_tt.kv_stream.base import Metadata, PrefillTimes, State
from disagg_tt.kv_stream.control import LocalControl, Message
from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver, MeshSocketSender, socket_config
from disagg_tt.rank import answer_here

CONFIG = tiny_config(num_hidden_layers=3, num_key_value_heads=4, head_dim=64)
CHIPS, PAGES = 2, 32
TILE_BYTES = {"bfloat8_b": 1088, "bfloat16": 2048}
TIMES = PrefillTimes(0.0, 0.0, 0.0)


class Stream:
    """A sender and a receiver on two meshes of one process; layers are random numbers."""

    def __init__(
        self, dtype: str, overlap: str = "inline", direct: bool = True, receives_direct: bool | None = None
    ):
        self.dtype = getattr(ttnn, dtype)
        self.parent, self.mesh, there = open_two((1, CHIPS), queues=2)
        ours, theirs = LocalControl.pair()
        ends = ttnn.create_socket_pair(self.mesh, there, socket_config(1, CHIPS))
        self.cache = PagedCache(there, CONFIG, 2, PAGES, 2 * PAGES, self.dtype)
        self.row = self.cache.table_row(list(range(PAGES, 2 * PAGES)))
        settings = {"overlap": overlap, "direct": direct, "deadline_s": 5.0}
        self.sender = MeshSocketSender(self.mesh, ends[0], ours, CONFIG.num_hidden_layers, **settings)
        taken = direct if receives_direct is None else receives_direct
        self.receiver = MeshSocketReceiver(there, ends[1], theirs, CONFIG, self.cache, direct=taken)
        self.metadata: list[Metadata] = []
        theirs.handler = self.handle
        self.control = theirs

    def handle(self, message: Message) -> None:
        if message["kind"] == "announce":
            self.receiver.accept(message["request"], message["tokens"], self.row)
        elif message["kind"] == "layer":
            self.receiver.receive_layer(message["layer"])
        elif message["kind"] == "sent":
            self.metadata.append(self.receiver.finish())

    def layer(self, tokens: int, seed: int) -> tuple[torch.Tensor, Any]:
        """A random K or V of whole tiles, on the host and on the sender's mesh."""
        shape = (1, CONFIG.num_key_value_heads, whole_tiles(tokens), CONFIG.head_dim)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        mapper = ttnn.ShardTensorToMesh(self.mesh, dim=1)
        return values, ttnn.from_torch(
            values, dtype=self.dtype, layout=ttnn.TILE_LAYOUT, device=self.mesh, mesh_mapper=mapper
        )

    def send(
        self, tokens: int, request: int = 0, computed: Callable[[], None] = lambda: None
    ) -> list[tuple[Any, Any]]:
        """Stream a request of so many tokens, `computed` called before its end; return its layers as the sender's tensors."""
        self.sender.announce(Request(request, (1,) * tokens, 8))
        layers = []
        for number in range(CONFIG.num_hidden_layers):
            k, v = (self.layer(tokens, 10 * number + half)[1] for half in range(2))
            self.sender.send_layer(number, k, v)
            layers.append((k, v))
        computed()
        self.sender.finish(Metadata(request, tokens, 35308, CONFIG.num_hidden_layers), TIMES)
        return layers


def whole(tensor: Any) -> torch.Tensor:
    return torch.cat([ttnn.to_torch(shard) for shard in ttnn.get_device_tensors(tensor)], dim=1).float()


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The size of every payload that the transport writes."""
    sizes: list[int] = []
    write = LocalChannel.write

    def counting(self: LocalChannel, head: Any, shards: list[torch.Tensor], dtype: Any, what: Any) -> None:
        each = CHIPS if head[1] & REPLICATED else 1  # one shard goes for all chips
        sizes.append(each * sum(pack(shard, dtype).numel() for shard in shards))
        write(self, head, shards, dtype, what)

    monkeypatch.setattr(LocalChannel, "write", counting)
    return sizes


def expected_bytes(tokens: int, dtype: str) -> int:
    tiles = -(-tokens // 32) * CONFIG.head_dim // 32
    k_and_v = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * tiles * TILE_BYTES[dtype]
    return k_and_v + CHIPS * 32 * 32 * 4  # the metadata: one uint32 tile a chip


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("dtype", TILE_BYTES)
def test_exactly_the_prompts_tiles_and_the_metadata_travel(dtype, tokens, written):
    stream = Stream(dtype)
    stream.send(tokens)
    assert len(written) == 2 * CONFIG.num_hidden_layers + 1
    assert sum(written) == expected_bytes(tokens, dtype)
    assert stream.sender.bytes_sent == stream.receiver.bytes_received == sum(written)
    close_mesh(stream.parent)


def test_bytes_are_counted_by_request(written):
    stream = Stream("bfloat8_b")
    for request, tokens in enumerate((100, 20, 33)):
        stream.send(tokens, request)
        assert (
            stream.sender.bytes_sent == stream.receiver.bytes_received == expected_bytes(tokens, "bfloat8_b")
        )
    assert sum(written) == sum(expected_bytes(tokens, "bfloat8_b") for tokens in (100, 20, 33))
    close_mesh(stream.parent)


class LateStream(Stream):
    """Its receiver is busy when a request is announced; the sender does not wait for it."""

    def __init__(self, **settings: Any):
        super().__init__("bfloat8_b", **settings)
        self.sender.patience_s = 0.0
        self.announced: list[Message] = []

    def handle(self, message: Message) -> None:
        if message["kind"] == "announce":
            self.announced.append(message)
        else:
            super().handle(message)

    def take(self) -> None:
        super().handle(self.announced.pop())


@pytest.mark.parametrize("overlap", ["inline", "queue", "after"])
def test_layers_are_kept_while_the_receiver_is_busy_and_all_land_at_the_end(overlap, written):
    stream = LateStream(overlap=overlap)
    for request in range(2):
        seen = []

        def computed(seen=seen):
            seen.append(sum(written))
            stream.take()

        sent = stream.send(70, request, computed)
        assert seen == [request * expected_bytes(70, "bfloat8_b")]  # nothing of it had left
        assert stream.metadata[request] == Metadata(request, 70, 35308, CONFIG.num_hidden_layers)
        for layer, pools in zip(sent, stream.cache.layers, strict=True):
            for tensor, pool in zip(layer, pools, strict=True):
                assert torch.equal(whole(pool)[PAGES + 2], whole(tensor)[0, :, 64:96])
    assert sum(written) == 2 * expected_bytes(70, "bfloat8_b")
    close_mesh(stream.parent)


def test_layers_that_were_kept_for_a_receiver_that_wants_them_no_more_are_dropped(written):
    stream = LateStream()

    def refuse():
        assert stream.control.send("refused", request=0, reason="its client left") is None

    with pytest.raises(RefusedError, match="its client left"):
        stream.send(70, 0, refuse)
    assert written == [] and stream.sender.stream.state is State.DONE
    stream.announced.clear()
    stream.send(33, 1, stream.take)
    assert sum(written) == expected_bytes(33, "bfloat8_b")
    close_mesh(stream.parent)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "fifo"])
@pytest.mark.parametrize("overlap", ["inline", "queue", "after"])
@pytest.mark.parametrize("dtype", TILE_BYTES)
def test_each_layer_lands_in_the_slots_pages(dtype, overlap, direct):
    tokens = 70
    stream = Stream(dtype, overlap, direct)
    sent = stream.send(tokens)
    assert stream.metadata == [Metadata(0, tokens, 35308, CONFIG.num_hidden_layers)]
    assert stream.sender.stream.state is stream.receiver.stream.state is State.DONE
    for layer, pools in zip(sent, stream.cache.layers, strict=True):
        for tensor, pool in zip(layer, pools, strict=True):
            values, blocks = whole(tensor)[0], whole(pool)
            for page in range(3):
                assert torch.equal(blocks[PAGES + page], values[:, 32 * page : 32 * page + 32])
            assert not blocks[:PAGES].any(), "another slot's pages"
            assert not blocks[PAGES + 3 :].any(), "pages behind the prompt"
    close_mesh(stream.parent)


def test_a_layer_out_of_order_never_reaches_the_socket(written):
    stream = Stream("bfloat16")
    stream.sender.announce(Request(0, (1,) * 32, 8))
    tensor = stream.layer(32, 0)[1]
    with pytest.raises(StreamError, match="layer 1 of 3; layer 0 is next"):
        stream.sender.send_layer(1, tensor, tensor)
    with pytest.raises(StreamError, match="in state failed"):
        stream.sender.send_layer(0, tensor, tensor)
    assert written == []


def test_a_stream_that_ends_early_sends_no_metadata(written):
    stream = Stream("bfloat16")
    stream.sender.announce(Request(0, (1,) * 32, 8))
    tensor = stream.layer(32, 0)[1]
    stream.sender.send_layer(0, tensor, tensor)
    with pytest.raises(StreamError, match="ended after 1 of 3 layers"):
        stream.sender.finish(Metadata(0, 32, 5, 3), TIMES)
    assert stream.metadata == []


@pytest.mark.parametrize(
    "wrong", [Metadata(1, 32, 5, 3), Metadata(0, 33, 5, 3), Metadata(0, 32, 5, 2)], ids=str
)
def test_metadata_that_does_not_fit_the_announcement_is_refused(wrong):
    stream = Stream("bfloat16")
    stream.sender.announce(Request(0, (1,) * 32, 8))
    for layer in range(3):
        tensor = stream.layer(32, layer)[1]
        stream.sender.send_layer(layer, tensor, tensor)
    with pytest.raises(StreamError, match="does not fit the announced"):
        stream.sender.finish(wrong, TIMES)
    assert stream.receiver.stream.state is State.FAILED


def test_ends_of_different_modes_are_an_error_that_names_both():
    stream = Stream("bfloat16", direct=True, receives_direct=False)
    with pytest.raises(DeviceError, match=r"sends .* direct; .* receives .* through the FIFO"):
        stream.send(32)


@pytest.mark.parametrize("overlap", ["inline", "queue", "after"])
def test_layer_is_sent_before_its_attention_unless_all_are_sent_after(overlap, tmp_path, monkeypatch):
    folder = random_checkpoint(tmp_path, CONFIG, 1, tokenizer_from=small_tokenizer(tmp_path / "words"))
    calls: list[str] = []

    def recording(module: Any, name: str, as_name: str) -> None:
        op = getattr(module, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(as_name)
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, record)

    recording(ttnn.transformer, "scaled_dot_product_attention", "attention")
    recording(ttnn.experimental, "send_direct_async", "send")
    options = Options(
        prompts=("abc",), model=str(folder), max_new_tokens=1, one_process=True, overlap=overlap
    )
    answer_here(options, lambda event: None)
    layers = CONFIG.num_hidden_layers
    assert calls[:layers] == ["attention"] * layers  # the warm-up, which sends nothing
    each = ["send", "send", "attention"]
    last = ["send"]  # the metadata
    expected = ["attention"] * layers + ["send"] * 2 * layers if overlap == "after" else each * layers
    assert calls[layers:] == expected + last
