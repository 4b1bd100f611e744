"""send_async and recv_async, through a socket's FIFO or direct.

A transfer is a head (number, spec, mode) and the shards. ttnn checks none of what the head carries: on hardware a receive
of another shape, dtype or mode hangs or corrupts. Here it is an error at both ends that names both.

As on hardware, a send through the FIFO is done when what has not been received fits in the FIFO, and a direct send when it
has been received. Sends that follow each other on a queue are packed ahead of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from disagg_tt.device.emulator import waits, wire
from disagg_tt.device.emulator.channel import REPLICATED, UNDEFINED, Channel, LocalChannel
from disagg_tt.device.emulator.launch import reads, writes
from disagg_tt.device.emulator.queue import CommandQueue
from disagg_tt.device.emulator.socket import MeshSocket
from disagg_tt.device.emulator.socket_config import DIRECT_FIFO_BYTES, chips, fifo_bytes
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import Tensor, Values, on_device, undefined, whole
from disagg_tt.device.emulator.types import BufferType
from disagg_tt.errors import DeviceError


@dataclass(frozen=True)
class _Plan:
    """What all transfers of one kind of tensor over one end of a socket have in common.

    Attributes:
        mine: the description that both ends must agree on.
        chips: of this end's mesh that take part, in the order of the connections.
        in_order: they are all of the mesh's, in its own order.
        held: bytes of FIFO that a transfer holds until it has been received.
    """

    mine: bytes
    chips: list[int]
    in_order: bool
    held: int


def _begin(what: str, tensor: Tensor, socket: MeshSocket, sends: bool, direct: bool) -> _Plan:
    """Check a transfer and return its plan."""
    mesh = on_device(what, tensor)
    if mesh is not socket._mesh:
        raise DeviceError(f"{what}: tensor on {mesh!r}, socket on {socket._mesh!r}")
    if socket._sends is not sends:
        raise DeviceError(
            f"{what} on the socket's {'sending' if socket._sends else 'receiving'} end; use the other end"
        )
    plan: _Plan | None = socket._plans.get((tensor.spec, direct))
    if plan is None:
        plan = socket._plans[tensor.spec, direct] = _planned(what, tensor.spec, socket, direct)
    socket._channel.check()
    return plan


def _planned(what: str, spec: Spec, socket: MeshSocket, direct: bool) -> _Plan:
    memory, mesh = socket._config._memory, socket._mesh
    ours = chips(what, socket._config, mesh, socket._sends)
    page = -(-spec.page // 32) * 32
    if direct and memory.socket_storage_type is not BufferType.L1:
        raise DeviceError(
            f"{what}: a FIFO in {memory.socket_storage_type.name}; direct transfers need one in L1"
        )
    least = DIRECT_FIFO_BYTES if direct else page
    if memory.fifo_size < least:
        raise DeviceError(
            f"{what}: FIFO of {memory.fifo_size} B for pages of {least} B; make it {least} B or more"
        )
    mine = f"{list(spec.shape)} {spec.dtype.value} {spec.layout.name} {'direct' if direct else 'through the FIFO'}"
    # A direct send holds the queue until it has been received, whatever the FIFO's size.
    held = memory.fifo_size + 1 if direct else fifo_bytes(socket._config, spec, page)
    return _Plan(mine.encode(), ours, ours == list(range(mesh.get_num_devices())), held)


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
    plan = _begin(what, tensor, socket, True, direct)
    spec, values = tensor.spec, tensor._values
    ours, fifo = plan.chips, socket._config._memory.fifo_size
    reads(what, socket._mesh.queue(), tensor)

    def work(number: int, queue: CommandQueue) -> None:
        def waited_for() -> str:
            return f"{what} number {number} of {plan.mine.decode()}: a matching receive on {socket._peer}"

        flags, shards = _shards(values, spec, plan)
        if isinstance(socket._channel, LocalChannel):
            values.private = False  # the receiver may hold the same memory now
        socket._channel.write((number, flags, plan.mine), shards, spec.dtype, waited_for)
        socket.bytes_written += spec.bytes * len(ours)
        socket._unsettled.append((number, plan.held))
        _settle(socket, queue, fifo, number, waited_for)

    _post(what, socket, work)
    return []


def _shards(values: Values, spec: Spec, plan: _Plan) -> tuple[int, torch.Tensor]:
    """Return the flags of a transfer and the values of the chips that take part: [shards, *shape]."""
    data = values.held
    if data is None:
        return UNDEFINED, _NOTHING
    if data.shape[1:] != spec.shape:
        data = whole(data, spec)
    if data.shape[0] == 1:
        return REPLICATED, data
    return 0, data if plan.in_order else data[plan.chips]


_NOTHING = torch.empty(0, 0)


def _settle(socket: MeshSocket, queue: CommandQueue, fifo: int, number: int, what: Callable[[], str]) -> None:
    """Wait until the FIFO holds all that was sent and not received, or until the next send may be packed."""
    channel, unsettled = socket._channel, socket._unsettled

    def settled() -> bool:
        taken = channel.taken()
        while unsettled and unsettled[0][0] <= taken:
            unsettled.popleft()
        return queue.next_is(socket) or sum(size for _, size in unsettled) <= fifo

    if not settled():
        channel.until(settled, lambda: unsettled[0][0], what)


def _receive(what: str, tensor: Tensor, socket: MeshSocket, direct: bool) -> list[Tensor]:
    plan = _begin(what, tensor, socket, False, direct)
    spec, values, channel = tensor.spec, tensor._values, socket._channel
    ours = plan.chips
    count = socket._mesh.get_num_devices()
    reads(what, socket._mesh.queue(), tensor)

    def work(number: int, queue: CommandQueue) -> None:
        def waited_for() -> str:
            return f"{what} number {number} into {plan.mine.decode()}: a matching send on {socket._peer}"

        found, flags, text = channel.read_head(number, waited_for)
        if (found, text) != (number, plan.mine):
            theirs, mine = text.decode(), plan.mine.decode()
            raise DeviceError(
                f"socket transfer mismatch: {socket._peer} sends number {found}, {theirs}; this end receives number {number}, {mine}; "
                "on hardware this hangs or corrupts memory. Post receives in the order of the sends, with the same shape, "
                "dtype, layout and mode"
            )
        if not _kept(channel, values, spec, plan, count, flags):
            channel.read(_rooms(values, spec, ours, count, flags), spec.dtype, waited_for)
            _land(values, spec, ours, count, flags)
        channel.done(number)

    writes(what, socket._mesh.queue(), tensor)
    _post(what, socket, work)
    return [tensor]


def _kept(channel: Channel, values: Values, spec: Spec, plan: _Plan, count: int, flags: int) -> bool:
    """Let `values` be those received, where the channel has them in memory to keep, and return whether it has."""
    if flags & UNDEFINED or not plan.in_order:
        return False
    shape = (1 if flags & REPLICATED else count, *spec.shape)
    kept = channel.keep(math.prod(shape), spec.dtype)
    if kept is None:
        return False
    values.hold(kept.view(shape))
    values.private = True
    return True


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
    values.hold(
        data.view(data.shape)
    )  # another object: what was derived from the values before is known by theirs
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
