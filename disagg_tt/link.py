"""The link between the two meshes, made before weights and before any compute: mesh, socket, barrier, control channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from disagg_tt.core import DECODE, PREFILL, Request
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh, open_two
from disagg_tt.errors import CheckpointError, StreamError
from disagg_tt.kv_stream.control import Control, LocalControl, Message, connect_ranks, expect
from disagg_tt.kv_stream.mesh_socket import socket_config
from disagg_tt.model import weights
from disagg_tt.run import Run


@dataclass
class Link:
    """One rank's mesh, its socket and its control channel."""

    mesh: Any
    socket: Any
    control: Control
    opened: Any  # what close_mesh must close; None when the other link closes it
    ranks: bool

    @classmethod
    def between_ranks(
        cls, role: str, shape: tuple[int, int], peer: int, *, queues: int = 1, trace: bool = False
    ) -> Link:
        """Open this rank's mesh and make its end of the socket; both ranks must do so within ttnn's 10 s."""
        ttnn.init_distributed_context()
        me = int(ttnn.distributed_context_get_rank())
        mesh = open_mesh(shape, queues=queues, trace=trace)
        sender, receiver = (me, peer) if role == PREFILL else (peer, me)
        socket = ttnn.MeshSocket(mesh, socket_config(*_as_row(shape), sender=sender, receiver=receiver))
        ttnn.distributed_context_barrier()
        other = DECODE if role == PREFILL else PREFILL
        control = connect_ranks(ttnn, me=me, peer=peer, peer_role=other, bind=role == PREFILL)
        return cls(mesh, socket, control, mesh, ranks=True)

    @classmethod
    def within_process(
        cls, shape: tuple[int, int], *, queues: int = 1, trace: bool = False
    ) -> tuple[Link, Link]:
        """Open one mesh that holds both and join its two submeshes."""
        parent, prefill, decode = open_two(shape, queues=queues, trace=trace)
        sender, receiver = ttnn.create_socket_pair(prefill, decode, socket_config(*shape))
        ours, theirs = LocalControl.pair()
        return cls(prefill, sender, ours, parent, ranks=False), cls(
            decode, receiver, theirs, None, ranks=False
        )

    def close(self) -> None:
        """Wait for the other rank to be done too, then close the control channel, the socket and the mesh."""
        if self.ranks:
            ttnn.synchronize_device(self.mesh)
            ttnn.distributed_context_barrier()
        self.control.close()
        self.socket = None
        if self.opened is not None:
            close_mesh(self.opened)


def _as_row(shape: tuple[int, int]) -> tuple[int, int]:
    return (1, shape[0] * shape[1]) if min(shape) > 1 else shape


def exchange_hellos(run: Run, control: Control, requests: list[Request] | None) -> Message:
    """Compare what the two ranks run; return the other's hello. Raises CheckpointError or StreamError if they differ."""
    o = run.options
    settings = {
        "kv_dtype": o.kv_dtype,
        "weight_dtype": str(weights.weight_dtype(run.config, o.weight_dtype)),
        "direct": o.direct,
        "sampling": [o.temperature, o.top_p, o.top_k, o.seed],
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
