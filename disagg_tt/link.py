"""The link between the two meshes, made before weights and before any compute: mesh, control channel, socket or wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from disagg_tt.cache import PagedCache
from disagg_tt.config import Options
from disagg_tt.core import DECODE, PREFILL, Request
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh, open_two
from disagg_tt.errors import CheckpointError, StreamError
from disagg_tt.kv_stream.base import KVReceiver, KVSender, RemoteSender
from disagg_tt.kv_stream.control import Control, LocalControl, Message, connect_ranks, expect
from disagg_tt.kv_stream.host_wire import WireReceiver, WireSender
from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver, MeshSocketSender, socket_config
from disagg_tt.kv_stream.open_wire import Wire, open_receiver, open_sender
from disagg_tt.kv_stream.programs import connect_programs
from disagg_tt.kv_stream.staged import StagedReceiver, StagedSender
from disagg_tt.model import weights
from disagg_tt.run import Run


@dataclass
class Link:
    """One rank's mesh, its control channel, and its socket or its wire."""

    mesh: Any
    control: Control
    opened: Any  # what close_mesh must close; None when the other link closes it
    ranks: bool
    socket: Any = None
    wire: Wire | None = None
    stream: KVSender | KVReceiver | None = None  # this rank's end, closed with the link

    @classmethod
    def between_ranks(
        cls,
        role: str,
        shape: tuple[int, int],
        peer: int,
        *,
        sockets: bool = True,
        queues: int = 1,
        trace: bool = False,
    ) -> Link:
        """Open this rank's mesh and, for `sockets`, its end of the socket, which both ranks must within ttnn's 10 s."""
        ttnn.init_distributed_context()
        me = int(ttnn.distributed_context_get_rank())
        mesh = open_mesh(shape, queues=queues, trace=trace)
        socket = None
        if sockets:
            sender, receiver = (me, peer) if role == PREFILL else (peer, me)
            socket = ttnn.MeshSocket(mesh, socket_config(*as_row(shape), sender=sender, receiver=receiver))
        ttnn.distributed_context_barrier()
        other = DECODE if role == PREFILL else PREFILL
        control = connect_ranks(ttnn, me=me, peer=peer, peer_role=other, bind=role == PREFILL)
        return cls(mesh, control, mesh, ranks=True, socket=socket)

    @classmethod
    def between_programs(cls, o: Options, shape: tuple[int, int], *, trace: bool = False) -> Link:
        """Wait for the other program, started separately, and open this one's mesh."""
        assert o.kv_transfer is not None
        control = connect_programs(o.kv_transfer, o.deadline_s)
        mesh = open_mesh(shape, trace=trace)
        return cls(mesh, control, mesh, ranks=False)

    @classmethod
    def within_process(
        cls, shape: tuple[int, int], *, queues: int = 1, trace: bool = False
    ) -> tuple[Link, Link]:
        """Open one mesh that holds both and join its two submeshes."""
        parent, prefill, decode = open_two(shape, queues=queues, trace=trace)
        sender, receiver = ttnn.create_socket_pair(prefill, decode, socket_config(*shape))
        ours, theirs = LocalControl.pair()
        return cls(prefill, ours, parent, ranks=False, socket=sender), cls(
            decode, theirs, None, ranks=False, socket=receiver
        )

    def open_wire(self, o: Options, role: str, peer: int) -> None:
        """Join the wire of `--transport`, if it is one; both ends must."""
        if self.socket is None:
            self.wire = (open_sender if role == PREFILL else open_receiver)(o, self.control, peer)

    def sender(self, run: Run, tokens: int) -> RemoteSender:
        """Return the prefill end of the stream, for prompts of up to `tokens` tokens: over the wire, or the socket."""
        o, dtype, layers = run.options, getattr(ttnn, run.options.kv_dtype), run.config.num_hidden_layers
        sender: RemoteSender
        if isinstance(self.wire, WireSender):
            sender = StagedSender(
                self.mesh, self.wire, self.control, run.config, dtype, tokens, overlap=o.overlap, deadline_s=o.deadline_s
            )  # fmt: skip
        else:
            sender = MeshSocketSender(
                self.mesh, self.socket, self.control, layers, overlap=o.overlap, direct=o.direct, deadline_s=o.deadline_s
            )  # fmt: skip
        sender.guard = run.watchdog.guard
        self.stream = sender
        return sender

    def receiver(self, run: Run, cache: PagedCache, tokens: int) -> KVReceiver:
        """Return the decode end of the stream, which fills `cache`."""
        o = run.options
        if isinstance(self.wire, WireReceiver):
            self.stream = StagedReceiver(
                self.mesh, self.wire, self.control, run.config, cache, tokens, deadline_s=o.deadline_s
            )
        else:
            self.stream = MeshSocketReceiver(
                self.mesh, self.socket, self.control, run.config, cache, direct=o.direct
            )
        return self.stream

    def close_stream(self) -> None:
        """Close this rank's end of the stream and the wire, in any state."""
        for part in (self.stream, self.wire):
            if part is not None:
                part.close()

    def close(self) -> None:
        """Wait for the other rank to be done too, then close the stream, the control channel, the socket and the mesh."""
        self.close_stream()
        if self.ranks:
            ttnn.synchronize_device(self.mesh)
            ttnn.distributed_context_barrier()
        self.control.close()
        self.socket = None
        if self.opened is not None:
            close_mesh(self.opened)


def as_row(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape that open_mesh gives a mesh of `shape` chips."""
    return (1, shape[0] * shape[1]) if min(shape) > 1 else shape


def exchange_hellos(run: Run, control: Control, requests: list[Request] | None) -> Message:
    """Compare what the two ranks run; return the other's hello. Raises CheckpointError or StreamError if they differ."""
    o = run.options
    settings = {
        "kv_dtype": o.kv_dtype,
        "weight_dtype": str(weights.weight_dtype(run.config, o.weight_dtype)),
        "direct": o.direct,
        "transport": o.transport,
        "sampling": [o.temperature, o.top_p, o.top_k, o.seed],
        "stop": [*o.stop],
        "ignore_eos": o.ignore_eos,
    }
    count, tokens = (len(requests), run.tokens_a_slot(requests)) if requests else (0, 0)
    control.send("hello", digest=run.checkpoint.digest(), settings=settings, requests=count, tokens=tokens)
    theirs = expect(control, "hello", o.deadline_s, "comparing checkpoints")
    if theirs["digest"] != run.checkpoint.digest():
        raise CheckpointError(
            f"the two ranks load different checkpoints or tokenizers: this rank's digest is {run.checkpoint.digest()[:16]}, the "
            f"other's {theirs['digest'][:16]}; give both the same --model"
        )
    if theirs["settings"] != settings:
        raise StreamError(
            f"the two ranks run with different settings: {settings} here, {theirs['settings']} there"
        )
    return theirs
