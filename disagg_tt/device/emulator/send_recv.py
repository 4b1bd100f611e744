"""send_async and recv_async, through a socket's FIFO or direct.

A transfer is a head (number, spec, mode) and the shards. ttnn checks none of what the head carries: on hardware a receive
of another shape, dtype or mode hangs or corrupts. Here it is an error at both ends that names both.

As on hardware, a send through the FIFO is done when what has not been received fits in the FIFO, and a direct send when it
has been received. Sends that follow each other on a queue are packed ahead of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from disagg_tt.device.emulator import waits, wire
from disagg_tt.device.emulator.channel import REPLICATED, UNDEFINED, LocalChannel
from disagg_tt.device.emulator.launch import reads, writes
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.socket import MeshSocket
from disagg_tt.device.emulator.socket_config import DIRECT_FIFO_BYTES, chips, fifo_bytes
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, on_device, undefined, whole
from disagg_tt.device.emulator.types import BufferType
from disagg_tt.errors import DeviceError


@lru_cache(maxsize=4096)
def _describe(spec: Spec, direct: bool) -> str:
    return f"{list(spec.shape)} {spec.dtype.value} {spec.layout.name} {'direct' if direct else 'through the FIFO'}"


def _begin(what: str, tensor: Tensor, socket: MeshSocket, sends: bool, direct: bool) -> list[int]:
    """Check a transfer; return the chips of this end's mesh that take part, in the order of the connections."""
    mesh = on_device(what, tensor)
    memory = socket._config._memory
    if mesh is not socket._mesh:
        raise DeviceError(f"{what}: tensor on {mesh!r}, socket on {socket._mesh!r}")
    if socket._sends is not sends:
        raise DeviceError(
            f"{what} on the socket's {'sending' if socket._sends else 'receiving'} end; use the other end"
        )
    if socket._chips is None:
        socket._chips = chips(what, socket._config, mesh, sends)
    page = -(-tensor.buffer_page_size() // 32) * 32
    if direct and memory.socket_storage_type is not BufferType.L1:
        raise DeviceError(
            f"{what}: a FIFO in {memory.socket_storage_type.name}; direct transfers need one in L1"
        )
    least = DIRECT_FIFO_BYTES if direct else page
    if memory.fifo_size < least:
        raise DeviceError(
            f"{what}: FIFO of {memory.fifo_size} B for pages of {least} B; make it {least} B or more"
        )
    socket._channel.check()
    return socket._chips


def _post(what: str, socket: MeshSocket, work: Callable[[int, CommandQueue], None]) -> None:
    """Enqueue `work` as the socket's next transfer, in a trace at each replay; a failure of it is told to the other end."""

    def enqueue(queue: CommandQueue) -> None:
        number = socket._next + 1

        def run() -> None:
            socket._channel.run(number)
            try:
                work(number, queue)
            except Exception as error:
                socket._channel.fail(str(error))
                raise
            finally:
                socket._channel.run(0)

        waits.touch()
        queue.submit(what, run, waits=True, peer=socket)
        socket._next = number
        socket._channel.post(number)

    socket._mesh.queue().submit_transfer(enqueue)


def _send(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> list[Tensor]:
    ours = _begin(what, tensor, socket, True, direct)
    spec, values = tensor.spec, tensor._values
    mine = _describe(spec, direct)
    fifo = socket._config._memory.fifo_size
    # A direct send holds the queue until it has been received, whatever the FIFO's size.
    held = fifo + 1 if direct else fifo_bytes(socket._config, spec, -(-tensor.buffer_page_size() // 32) * 32)
    reads(what, socket._mesh.queue(), tensor)

    def work(number: int, queue: CommandQueue) -> None:
        def waited_for() -> str:
            return f"{what} number {number} of {mine}: a matching receive on {socket._peer}"

        flags, shards = _shards(values, spec, ours)
        if isinstance(socket._channel, LocalChannel):
            values.private = False  # the receiver may hold the same memory now
        socket._channel.write((number, flags, mine.encode()), shards, spec.dtype, waited_for)
        socket.bytes_written += spec.bytes * len(ours)
        socket._unsettled.append((number, held))
        _settle(socket, queue, fifo, number, waited_for)

    _post(what, socket, work)
    return []


def _shards(values: Values, spec: Spec, ours: list[int]) -> tuple[int, list[torch.Tensor]]:
    """Return the flags of a transfer and each chip's values as one axis."""
    data = values.held
    if data is None:
        return UNDEFINED, []
    data = whole(data, spec)
    if data.shape[0] == 1:
        return REPLICATED, [data[0].reshape(-1)]
    shards = data.unbind()
    return 0, [shards[chip].reshape(-1) for chip in ours]


def _settle(socket: MeshSocket, queue: CommandQueue, fifo: int, number: int, what: Callable[[], str]) -> None:
    """Wait until the FIFO holds all that was sent and not received, or until the next send may be packed."""
    channel, unsettled = socket._channel, socket._unsettled

    def settled() -> bool:
        taken = channel.taken()
        while unsettled and unsettled[0][0] <= taken:
            unsettled.popleft()
        return sum(size for _, size in unsettled) <= fifo or queue.next_is(socket)

    if not settled():
        channel.until(settled, unsettled[0][0], what)


def _receive(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> list[Tensor]:
    ours = _begin(what, tensor, socket, False, direct)
    spec, values, channel = tensor.spec, tensor._values, socket._channel
    mine = _describe(spec, direct)
    count = socket._mesh.get_num_devices()
    reads(what, socket._mesh.queue(), tensor)

    def work(number: int, queue: CommandQueue) -> None:
        def waited_for() -> str:
            return f"{what} number {number} into {mine}: a matching send on {socket._peer}"

        found, flags, text = channel.read_head(number, waited_for)
        theirs = text.decode()
        if (found, theirs) != (number, mine):
            raise DeviceError(
                f"socket transfer mismatch: {socket._peer} sends number {found}, {theirs}; this end receives number {number}, {mine}; "
                "on hardware this hangs or corrupts memory. Post receives in the order of the sends, with the same shape, "
                "dtype, layout and mode"
            )
        channel.read(_rooms(values, spec, ours, count, flags), spec.dtype, waited_for)
        _land(values, spec, ours, count, flags)
        channel.done(number)

    writes(what, socket._mesh.queue(), tensor)
    _post(what, socket, work)
    return [tensor]


def _rooms(values: Values, spec: Spec, ours: list[int], count: int, flags: int) -> list[torch.Tensor]:
    """Give `values` memory for what is received, its own if nothing else shares it; chips that get nothing keep theirs."""
    everywhere, data = len(ours) == count, values.held
    if flags & UNDEFINED and everywhere:
        values.hold(None)
        values.private = False
        return []
    shape = (1 if flags & REPLICATED and everywhere else count, *spec.shape)
    form = wire.form(spec.dtype)
    if (
        data is None
        or not values.private
        or data.shape != shape
        or not data.is_contiguous()
        or data.dtype is not form
    ):
        if everywhere:
            data = torch.empty(shape, dtype=form)
        else:
            data = whole(data, spec).to(form).expand(shape).clone(memory_format=torch.contiguous_format)
    values.hold(data)
    values.private = True
    if flags & UNDEFINED:
        return []
    chips = [0] if shape[0] == 1 else ours[: 1 if flags & REPLICATED else None]
    rooms = data.unbind()
    return [rooms[chip].view(-1) for chip in chips]


def _land(values: Values, spec: Spec, ours: list[int], count: int, flags: int) -> None:
    """Give every chip that takes part its own where one shard or none came for all."""
    data = values.held
    if len(ours) < count and data is not None:
        for chip in ours:
            if flags & UNDEFINED:
                data[chip] = undefined(spec)
            elif flags & REPLICATED and chip != ours[0]:
                data[chip] = data[ours[0]]


def send_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue sending each chip's shard through the socket's FIFO; returns no tensors."""
    return _send("send_async", input_tensor, mesh_socket, direct=False)


def recv_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue receiving into a tensor of the sender's spec, and return it."""
    return _receive("recv_async", output_tensor, mesh_socket, direct=False)


def send_direct_async(input_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue sending straight into the receiver's tensor; returns no tensors."""
    return _send("send_direct_async", input_tensor, mesh_socket, direct=True)


def recv_direct_async(output_tensor: Tensor, mesh_socket: MeshSocket) -> list[Tensor]:
    """Enqueue being written by the sender, and return the tensor."""
    return _receive("recv_direct_async", output_tensor, mesh_socket, direct=True)
