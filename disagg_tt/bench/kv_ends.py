"""The two ends of `bench kv`: each transport on one rank, streaming from or into a ring of layer buffers.

An End is made on both ranks; `stream` runs one stream and returns when each layer was sent or had arrived. What is in the
ring afterwards is compared by digest, outside the timed part.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disagg_tt.errors import InputError
from disagg_tt.geometry import Geometry
from disagg_tt.kv_stream.frame import digest_of
from disagg_tt.kv_stream.host_wire import Plan, WireReceiver, WireSender

ORDERS = ("contiguous", "paged", "fragmented")
RUN = 8  # blocks that lie together in the paged order
RING_BYTES = (
    1 << 29
)  # of layer buffers in each rank, so that memory is bounded; more than a CPU's caches hold
Exchange = Callable[[Any], Any]  # gives the other rank a JSON value and returns the other's


@dataclass(frozen=True)
class Load:
    """What one stream carries: `layers` messages of `layer_bytes`, in blocks of `block_bytes`, laid out in `order`."""

    layers: int
    layer_bytes: int
    block_bytes: int
    order: str = "contiguous"

    @classmethod
    def of(cls, geometry: Geometry, tokens: int, order: str, bulk: bool) -> Load:
        """Return the load of `tokens` tokens; in bulk all layers are one message."""
        size, layers = geometry.layer_bytes(tokens), geometry.layers
        return cls(1 if bulk else layers, size * layers if bulk else size, geometry.block_bytes, order)

    @property
    def ring(self) -> int:
        """Layer buffers a rank keeps."""
        return min(self.layers, max(2, RING_BYTES // self.layer_bytes))

    @property
    def total_bytes(self) -> int:
        return self.layers * self.layer_bytes


def extents(memory: torch.Tensor, load: Load, seed: int) -> list[torch.Tensor]:
    """Return a layer buffer's blocks in the load's order: in line, in shuffled runs of 8, or each anywhere."""
    if load.order == "contiguous":
        return [memory]
    blocks = list(memory.split(load.block_bytes))
    run = RUN if load.order == "paged" else 1
    runs = [blocks[i : i + run] for i in range(0, len(blocks), run)]
    random.Random(seed).shuffle(runs)
    return [block for some in runs for block in some]


class End(ABC):
    """One rank's end of one transport. `sends`: this is the prefill rank."""

    def __init__(self, sends: bool, load: Load):
        self.sends, self.load = sends, load
        memory = torch.empty(load.ring, load.layer_bytes, dtype=torch.uint8)
        if sends:
            memory.random_(generator=torch.Generator().manual_seed(1))
        else:
            memory.zero_()
        self.memory = memory
        self.ring = [extents(m, load, 2 * i + sends) for i, m in enumerate(memory)]

    def blank(self) -> None:
        """Clear what this end receives into: what a stream before has left there must not pass for the next one's."""
        if not self.sends:
            self.memory.zero_()

    @abstractmethod
    def stream(self, request: int) -> list[float]:
        """Run one stream; return time.perf_counter() when it has begun here, after each layer, and at its end."""

    def digests(self) -> list[int]:
        """Return a digest of each layer buffer's bytes, in the order of the stream."""
        return [digest_of(layer) for layer in self.ring]

    def close(self) -> None:
        """Release the transport."""
        return


class WireEnd(End):
    """A wire of kv_stream."""

    def __init__(self, wire: Any, sends: bool, load: Load):
        super().__init__(sends, load)
        self._wire: Any = wire
        wire.register([self.memory.view(-1)])

    def stream(self, request: int) -> list[float]:
        load = self.load
        plan = Plan(request, load.layers, load.layer_bytes)
        self._wire.begin(plan)
        times = [time.perf_counter()]
        for layer in range(load.layers):
            if isinstance(self._wire, WireSender):
                if layer >= load.ring:
                    self._wire.sent(layer - load.ring)
                self._wire.send(layer, self.ring[layer % load.ring])
            else:
                assert isinstance(self._wire, WireReceiver)
                self._wire.receive(layer, self.ring[layer % load.ring])
            times.append(time.perf_counter())
        if isinstance(self._wire, WireSender):
            self._wire.sent(load.layers - 1)
        self._wire.finish()
        return [*times, time.perf_counter()]

    def close(self) -> None:
        self._wire.close()


class MeshSocketEnd(End):
    """The MeshSocket: layers are tensors of bytes' worth of bfloat16 tiles on the mesh's chips."""

    def __init__(self, mesh: Any, mesh_socket: Any, dtype: str, sends: bool, load: Load):
        from disagg_tt.device import ttnn

        self.sends, self.load, self._mesh, self._socket, self._ttnn = sends, load, mesh, mesh_socket, ttnn
        chips = mesh.get_num_devices()
        kind = getattr(ttnn, dtype)
        tile = {"bfloat16": 2048, "bfloat8_b": 1088, "float32": 4096}[dtype]
        tiles, rest = divmod(load.layer_bytes, chips * tile)
        if rest:
            raise InputError(
                f"mesh_socket: a layer of {load.layer_bytes:,} bytes is not whole tiles on {chips} chips"
            )
        shape = [1, 1, 32 * tiles, 32]
        made = []
        for slot in range(load.ring):
            if sends:
                values = torch.randn(
                    [1, 1, 32 * tiles * chips, 32], generator=torch.Generator().manual_seed(slot)
                )
                mapper = ttnn.ShardTensorToMesh(mesh, dim=2)
                made.append(
                    ttnn.from_torch(
                        values, dtype=kind, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=mapper
                    )
                )
            else:
                made.append(ttnn.allocate_tensor_on_device(ttnn.Shape(shape), kind, ttnn.TILE_LAYOUT, mesh))
        self._tensors: Sequence[Any] = made

    def stream(self, request: int) -> list[float]:
        ttnn, load = self._ttnn, self.load
        move = ttnn.experimental.send_direct_async if self.sends else ttnn.experimental.recv_direct_async
        times, events = [time.perf_counter()], []
        for layer in range(load.layers):
            move(self._tensors[layer % load.ring], self._socket)
            events.append(ttnn.record_event(self._mesh, 0))
        for event in events:
            ttnn.event_synchronize(event)
            times.append(time.perf_counter())
        ttnn.synchronize_device(self._mesh)
        return [*times, time.perf_counter()]

    def blank(self) -> None:
        if not self.sends:
            ttnn, first = self._ttnn, self._tensors[0]
            empty = ttnn.from_torch(
                torch.zeros(list(first.shape)),
                dtype=first.dtype,
                layout=ttnn.TILE_LAYOUT,
                mesh_mapper=ttnn.ReplicateTensorToMesh(self._mesh),
            )
            for tensor in self._tensors:
                ttnn.copy_host_to_device_tensor(empty, tensor)
            ttnn.synchronize_device(self._mesh)

    def digests(self) -> list[int]:
        composer = self._ttnn.ConcatMeshToTensor(self._mesh, dim=2)
        read = (self._ttnn.to_torch(t, mesh_composer=composer) for t in self._tensors)
        return [digest_of([t.contiguous().view(torch.uint8).flatten()]) for t in read]
