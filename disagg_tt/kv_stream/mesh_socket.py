"""K and V over a ttnn MeshSocket: each chip sends its own shard to its twin on the other mesh.

The receiver enqueues a layer's receive only when the sender has said that its send is enqueued: a receive without a send
would stall the decode work behind it. Sends go, by `overlap`:

    inline  on the queue that computes, in order: the layer's attention waits until its K and V have left
    queue   on a second command queue, after an event that says K and V exist: overlaps with the attention
    after   when the whole prefill is computed, for comparison
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from disagg_tt.cache import PagedCache
from disagg_tt.config import LlamaConfig
from disagg_tt.core import TILE
from disagg_tt.device import kind, ttnn
from disagg_tt.device.host import read, to_device
from disagg_tt.errors import InputError
from disagg_tt.kv_stream.base import KVReceiver, Metadata, PrefillTimes, RemoteSender, layer_spec
from disagg_tt.kv_stream.control import Control

FIFO_BYTES = 8192  # of L1 on every receiver core, so small; more than a bfloat8_b or bfloat16 page
LINKS = 2  # fabric links between two N300 boards; more connections a chip are rejected at the first send
SEND_QUEUE = 1


def socket_config(rows: int, columns: int, *, sender: int | None = None, receiver: int | None = None) -> Any:
    """Return the config of one socket that joins every chip to its twin over two links; ranks only between processes."""
    connections = []
    for row in range(rows):
        for column in range(columns):
            chip = ttnn.MeshCoordinate(row, column)
            for link in range(LINKS):
                core = ttnn.MeshCoreCoord(chip, ttnn.CoreCoord(link, 0))
                connections.append(ttnn.SocketConnection(core, core))
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, FIFO_BYTES)
    if sender is None:
        return ttnn.SocketConfig(connections, memory)
    return ttnn.SocketConfig(connections, memory, sender_rank=sender, receiver_rank=receiver)


def tensor_bytes(tensor: Any, chips: int) -> int:
    """Return the bytes that a device tensor takes on the wire: its pages, packed, on every chip."""
    return int(tensor.buffer_num_pages()) * int(tensor.buffer_page_size()) * chips


class MeshSocketSender(RemoteSender):
    """The prefill end of the socket."""

    def __init__(
        self,
        mesh: Any,
        socket: Any,
        control: Control,
        layers: int,
        *,
        overlap: str,
        direct: bool,
        deadline_s: float,
    ):
        super().__init__(control, layers, deadline_s)
        if overlap not in ("inline", "queue", "after"):
            raise InputError(f"--overlap is {overlap!r}; allowed: inline, queue, after")
        self._mesh, self._socket, self._overlap = mesh, socket, overlap
        self._send = ttnn.experimental.send_direct_async if direct else ttnn.experimental.send_async
        self._chips = mesh.get_num_devices()
        self._sent: list[tuple[Any, Any]] = []
        self._counted = 0  # of the emulator's bytes, those of earlier requests

    def send_layer(self, layer: int, k: Any, v: Any) -> None:
        if not self._leaves_now(layer, k, v):
            return
        if self._overlap == "after":
            self._kept.append((layer, k, v))
        elif self._overlap == "inline":
            self._enqueue(layer, k, v)
        else:
            self._enqueue(layer, k, v, SEND_QUEUE)
            # their memory may be reused only when the other queue has sent them
            self._sent.append((k, v))

    def _enqueue(self, layer: int, k: Any, v: Any, queue: int = 0) -> None:
        computed = ttnn.record_event(self._mesh, 0)
        if queue:
            ttnn.wait_for_event(queue, computed)
        with ttnn.command_queue(queue):
            for tensor in (k, v):
                self._send_tensor(tensor)
        # Outside the block: within one process the decode side acts on this at once, on queues of its own.
        self._tell_when_computed(layer, computed)

    def _send_tensor(self, tensor: Any) -> None:
        self._send(tensor, self._socket)
        # The emulator counts where its transport writes, see finish; ttnn does not tell, the tensor's pages do.
        self.bytes_sent += tensor_bytes(tensor, self._chips)

    def finish(self, metadata: Metadata, times: PrefillTimes) -> None:
        self._wait_for_kept()
        self.stream.ending()
        for kept in self._kept:
            self._enqueue(*kept)
        self._tell_of_layers()
        tile = to_device(self._mesh, metadata.tile(), ttnn.uint32, ttnn.TILE_LAYOUT)
        if self._overlap == "queue":
            ttnn.synchronize_device(self._mesh)
        self._send_tensor(tile)
        self._control.send("sent", request=self.stream.request, **asdict(times))
        ttnn.synchronize_device(self._mesh)
        total = written(self._socket)
        if total is not None:
            self.bytes_sent, self._counted = total - self._counted, total
        self._kept.clear()
        self._sent.clear()
        self.stream.end()

    def close(self) -> None:
        self._kept.clear()
        self._sent.clear()


def written(socket: Any) -> int | None:
    """Return the bytes that the emulator's transport has written on `socket`, None on the real runtime."""
    return int(socket.bytes_written) if kind == "emulator" else None


class MeshSocketReceiver(KVReceiver):
    """The decode end of the socket."""

    def __init__(
        self,
        mesh: Any,
        socket: Any,
        control: Control,
        config: LlamaConfig,
        cache: PagedCache,
        *,
        direct: bool,
    ):
        super().__init__(mesh, config.num_hidden_layers)
        self.scripted_token = 0  # what a mock cluster's metadata is taken to say
        self._socket, self._control, self._config, self._cache = socket, control, config, cache
        self._receive = ttnn.experimental.recv_direct_async if direct else ttnn.experimental.recv_async
        self._staging: list[Any] = []
        self._row: Any = None
        self._tokens = 0

    def accept(self, request: int, tokens: int, row: Any) -> None:
        self._begin(request)
        self._row, self._tokens = row, tokens
        spec = layer_spec(self._config, self._mesh.get_num_devices(), tokens, self._cache.dtype)
        # One pair serves all layers: the queue empties it into the cache before it is written again.
        self._staging = [ttnn.allocate_tensor_on_device(spec, self._mesh) for _ in range(2)]
        self.stream.streaming()
        self._control.send("ready", request=request)

    def receive_layer(self, layer: int) -> None:
        self.stream.layer(layer)
        for staging in self._staging:
            self._receive_tensor(staging)
        self._cache.fill(layer, self._staging[0], self._staging[1], self._row)
        self._events.append(ttnn.record_event(self._mesh, 0))

    def _receive_tensor(self, tensor: Any) -> None:
        self._receive(tensor, self._socket)
        self.bytes_received += tensor_bytes(tensor, self._mesh.get_num_devices())

    def finish(self) -> Metadata:
        self.stream.ending()
        while self.wait_for_layer():
            pass
        spec = ttnn.TensorSpec(ttnn.Shape([1, 1, TILE, TILE]), ttnn.uint32, ttnn.TILE_LAYOUT)
        tile = ttnn.allocate_tensor_on_device(spec, self._mesh)
        self._receive_tensor(tile)
        scripted = Metadata(self.stream.request, self._tokens, self.scripted_token, self.stream.layers)
        metadata = Metadata.from_tile(read(tile, scripted.tile))
        misfit = metadata.misfit(self.stream.request, self._tokens, self.stream.layers)
        if misfit:
            self.stream.fail(misfit)
        self._staging = []
        self.stream.end()
        return metadata

    def close(self) -> None:
        self._staging = []
