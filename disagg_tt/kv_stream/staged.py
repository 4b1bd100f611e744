"""K and V through the hosts' memories, over any wire (host_wire.py): for meshes that no socket joins.

    prefill  chips -> host tensors -> layer buffers -> wire       the last two steps by a thread, while prefill goes on
    decode   wire -> layer buffer -> host tensors -> chips -> cache

Host tensors have the prompt's shape; the layer buffers are one piece of memory, registered with the wire once, and each
chip's part of K and of V is an extent of it. The bytes are those of the device: packed tiles. The control messages are
those of a socket's stream, and the metadata is one of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import torch

from disagg_tt.cache import PagedCache
from disagg_tt.config import LlamaConfig
from disagg_tt.core import Request
from disagg_tt.device import ttnn
from disagg_tt.device.host import staging
from disagg_tt.errors import DisaggError, InputError, StreamError
from disagg_tt.kv_stream.base import KVReceiver, Metadata, PrefillTimes, RemoteSender, State, layer_spec
from disagg_tt.kv_stream.control import Control, expect, reason_of
from disagg_tt.kv_stream.host_wire import Plan, WireReceiver, WireSender

SEND_DEPTH = 4  # layers between the chips and the wire
RECEIVE_DEPTH = 2  # layers between the wire and the cache
CLOSE_S = 2.0  # that a closing sender gives its thread, whose waits end at the wire's deadline


class _Staging:
    """Host tensors for one layer's K and V, and the bytes of every chip's part, K's first."""

    def __init__(self, mesh: Any, spec: Any):
        (self.k, k_parts), (self.v, v_parts) = staging(mesh, spec), staging(mesh, spec)
        self.parts = [*k_parts, *v_parts]

    @property
    def sizes(self) -> list[int]:
        return [part.numel() for part in self.parts]


class _Layers:
    """What both ends hold: layer buffers for the longest prompt, and `depth` stagings of the prompt in hand's shape."""

    def __init__(self, mesh: Any, config: LlamaConfig, dtype: Any, tokens: int, depth: int):
        self._mesh, self._config, self._dtype = mesh, config, dtype
        self.depth = min(depth, config.num_hidden_layers)
        self._most = sum(_Staging(mesh, self.spec(tokens)).sizes)
        self.memory = torch.empty(self.depth * self._most, dtype=torch.uint8)
        self._stagings: list[_Staging] = []
        self._spec: Any = None

    def spec(self, tokens: int) -> Any:
        return layer_spec(self._config, self._mesh.get_num_devices(), tokens, self._dtype)

    def plan(self, request: int, tokens: int) -> Plan:
        """Make stagings for a prompt of `tokens` tokens; return what its stream carries."""
        spec = self.spec(tokens)
        if self._spec is None or list(spec.shape) != list(self._spec.shape):
            self._stagings = [_Staging(self._mesh, spec) for _ in range(self.depth)]
            self._spec = spec
        return Plan(request, self._config.num_hidden_layers, sum(self._stagings[0].sizes))

    def staging(self, layer: int) -> _Staging:
        return self._stagings[layer % self.depth]

    def extents(self, layer: int) -> list[torch.Tensor]:
        """Return the buffer of a layer, cut into the parts of its staging."""
        at, sizes = layer % self.depth * self._most, self.staging(layer).sizes
        return list(self.memory[at : at + sum(sizes)].split(sizes))


class StagedSender(RemoteSender):
    """The prefill end. The wire is its thread's alone; what fails there is raised by the next call here."""

    def __init__(
        self,
        mesh: Any,
        wire: WireSender,
        control: Control,
        config: LlamaConfig,
        dtype: Any,
        tokens: int,
        *,
        overlap: str,
        deadline_s: float,
    ):
        """Register memory for prompts of up to `tokens` tokens of K and V of `dtype` with `wire`, which is closed with this."""
        super().__init__(control, config.num_hidden_layers, deadline_s)
        if overlap not in ("inline", "after"):
            raise InputError(f"--overlap is {overlap!r}; over a wire allowed: inline, after")
        self._mesh, self._wire, self._overlap = mesh, wire, overlap
        self._layers = _Layers(mesh, config, dtype, tokens, SEND_DEPTH)
        wire.register([self._layers.memory])
        self._plan: Plan | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{wire.name}-sender")
        self._going: deque[Future[None]] = deque()
        self._failed = False

    def announce(self, request: Request) -> None:
        super().announce(request)
        self._plan = self._layers.plan(request.id, len(request.tokens))

    def send_layer(self, layer: int, k: Any, v: Any) -> None:
        if not self._leaves_now(layer, k, v):
            return
        if layer == 0:
            self._submit(self._wire.begin, self._plan)
        if self._overlap == "after":
            self._kept.append((layer, k, v))
        else:
            self._copy(layer, k, v)

    def _copy(self, layer: int, k: Any, v: Any) -> None:
        """Enqueue the copy to the host, and have the thread send it when it is there."""
        self._settle(self._layers.depth - 1)  # the staging is free again
        staged = self._layers.staging(layer)
        for tensor, host in ((k, staged.k), (v, staged.v)):
            ttnn.copy_device_to_host_tensor(tensor, host, blocking=False)
        copied = ttnn.record_event(self._mesh, 0)
        self._submit(self._send, layer, copied)
        self._tell_when_computed(layer, copied)

    def _send(self, layer: int, copied: Any) -> None:
        ttnn.event_synchronize(copied)
        if layer >= self._layers.depth:
            self._wire.sent(layer - self._layers.depth)
        extents = self._layers.extents(layer)
        for extent, part in zip(extents, self._layers.staging(layer).parts, strict=True):
            extent.copy_(part)
        self._wire.send(layer, extents)
        assert self._plan is not None
        self.bytes_sent += self._plan.layer_bytes

    def finish(self, metadata: Metadata, times: PrefillTimes) -> None:
        if self._wait_for_kept():
            self._submit(self._wire.begin, self._plan)
        self.stream.ending()
        for kept in self._kept:
            self._copy(*kept)
        self._kept.clear()
        self._tell_of_layers()
        self._submit(self._finish)
        self._control.send("sent", request=self.stream.request, **asdict(times))
        self._control.send("metadata", **asdict(metadata))
        self._settle(0)
        self.stream.end()

    def _finish(self) -> None:
        self._wire.sent(self.stream.layers - 1)
        self._wire.finish()

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._going.append(self._thread.submit(self._unless_failed, work, *arguments))

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            raise StreamError(f"{self._wire.name}: nothing goes over a wire that failed")
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _settle(self, most: int) -> None:
        """Wait until at most `most` pieces of work are going; raises what the thread raised, or why the peer ended."""
        try:
            while len(self._going) > most:
                self._going.popleft().result()
        except DisaggError as error:
            self.stream.state = State.FAILED
            raise reason_of(self._control, error, self.done) from error

    def close(self) -> None:
        self._failed = True  # what waits in the thread is not begun
        self._thread.shutdown(wait=False, cancel_futures=True)
        wait(self._going, CLOSE_S)
        self._going.clear()
        self._kept.clear()
        self._wire.close()


class StagedReceiver(KVReceiver):
    """The decode end: a layer is waited for when the sender has said that it is on its way."""

    def __init__(
        self,
        mesh: Any,
        wire: WireReceiver,
        control: Control,
        config: LlamaConfig,
        cache: PagedCache,
        tokens: int,
        *,
        deadline_s: float,
    ):
        """Register memory for prompts of up to `tokens` tokens with `wire`, which is closed with this."""
        super().__init__(mesh, config.num_hidden_layers)
        self._wire, self._control, self._cache, self._deadline_s = wire, control, cache, deadline_s
        self._layers = _Layers(mesh, config, cache.dtype, tokens, RECEIVE_DEPTH)
        wire.register([self._layers.memory])
        self._on_device: list[Any] = []
        self._row: Any = None
        self._tokens = 0

    def accept(self, request: int, tokens: int, row: Any) -> None:
        self._begin(request)
        self._row, self._tokens = row, tokens
        plan, spec = self._layers.plan(request, tokens), self._layers.spec(tokens)
        # One pair serves all layers: the queue empties it into the cache before it is written again.
        self._on_device = [ttnn.allocate_tensor_on_device(spec, self._mesh) for _ in range(2)]
        self.stream.streaming()
        self._control.send("ready", request=request)
        self._do(self._wire.begin, plan)

    def receive_layer(self, layer: int) -> None:
        self.stream.layer(layer)
        if layer >= self._layers.depth:  # its staging is still being copied from
            ttnn.event_synchronize(self._events[layer - self._layers.depth])
        staged, extents = self._layers.staging(layer), self._layers.extents(layer)
        self._do(self._wire.receive, layer, extents)
        for part, extent in zip(staged.parts, extents, strict=True):
            part.copy_(extent)
            self.bytes_received += part.numel()
        for host, tensor in zip((staged.k, staged.v), self._on_device, strict=True):
            ttnn.copy_host_to_device_tensor(host, tensor)
        self._cache.fill(layer, self._on_device[0], self._on_device[1], self._row)
        self._events.append(ttnn.record_event(self._mesh, 0))

    def finish(self) -> Metadata:
        self.stream.ending()
        while self.wait_for_layer():
            pass
        message = expect(self._control, "metadata", self._deadline_s, "the metadata of the stream")
        metadata = Metadata(**{name: value for name, value in message.items() if name != "kind"})
        misfit = metadata.misfit(self.stream.request, self._tokens, self.stream.layers)
        if misfit:
            self.stream.fail(misfit)
        self._do(self._wire.finish)
        self.stream.end()
        return metadata

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call the wire; raises what it raises, or why the peer ended."""
        try:
            work(*arguments)
        except DisaggError as error:
            self.stream.state = State.FAILED
            raise reason_of(self._control, error) from error

    def close(self) -> None:
        self._on_device = []
        self._wire.close()
