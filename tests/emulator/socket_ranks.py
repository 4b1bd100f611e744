"""What two ranks do in test_socket.py, started by mpirun: `python socket_ranks.py SCENARIO`, one "RESULT {...}" line a rank."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import shm, socket
from disagg_tt.errors import DeviceError

PATIENCE = "TT_METAL_OPERATION_TIMEOUT_SECONDS"
KINDS = {  # dtype, layout, shape a chip
    "bfloat16": (ttnn.bfloat16, ttnn.TILE_LAYOUT, (1, 2, 40, 64)),
    "bfloat8_b": (ttnn.bfloat8_b, ttnn.TILE_LAYOUT, (1, 2, 1024, 64)),
    "uint32": (ttnn.uint32, ttnn.TILE_LAYOUT, (1, 1, 32, 32)),
    "rows": (ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, (1, 1, 5, 64)),
}


def values(kind: str) -> torch.Tensor:
    """Return both chips' values, cut along axis 0; the same on both ranks."""
    dtype, _, shape = KINDS[kind]
    generator = torch.Generator().manual_seed(len(kind))
    if dtype is not ttnn.uint32:
        return torch.randn(2, *shape[1:], generator=generator)
    whole = torch.randint(0, 2**32, (2, *shape[1:]), generator=generator)
    whole[0, 0, 0, :2] = torch.tensor([35308, 2**32 - 1])
    return whole


def config(fifo: int = 8192, links: int = 2, **ends: int) -> Any:
    """Return the config of a socket from rank 0 to rank 1 with `links` connections a chip."""
    connections = []
    for chip in range(2):
        for link in range(links):
            core = ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, chip), ttnn.CoreCoord(link, 0))
            connections.append(ttnn.SocketConnection(core, core))
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, fifo)
    return ttnn.SocketConfig(connections, memory, **(ends or {"sender_rank": 0, "receiver_rank": 1}))


def joined(columns: dict[Any, Any], memory: Any = None) -> Any:
    """Return the config of a socket within a process: chips by column, or (column, x of the core)."""

    def core(place: Any) -> Any:
        column, x = place if isinstance(place, tuple) else (place, 0)
        return ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, column), ttnn.CoreCoord(x, 0))

    connections = [ttnn.SocketConnection(core(s), core(r)) for s, r in columns.items()]
    return ttnn.SocketConfig(connections, memory or ttnn.SocketMemoryConfig(ttnn.BufferType.L1, 8192))


def sent(mesh: Any, kind: str) -> Any:
    """Return the tensor of `kind` with values, for sending."""
    dtype, layout, _ = KINDS[kind]
    mapper = ttnn.ShardTensorToMesh(mesh, dim=0)
    return ttnn.from_torch(values(kind), dtype=dtype, layout=layout, device=mesh, mesh_mapper=mapper)


def empty(mesh: Any, kind: str) -> Any:
    """Return a tensor of `kind` to receive into."""
    dtype, layout, shape = KINDS[kind]
    return ttnn.allocate_tensor_on_device(ttnn.Shape(shape), dtype, layout, mesh)


def read(mesh: Any, tensor: Any) -> torch.Tensor:
    whole = ttnn.to_torch(tensor, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0))
    return whole.to(torch.float32 if whole.is_floating_point() else torch.int64)


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except DeviceError as error:
        return str(error)
    return ""


def exact(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Every kind through the FIFO and direct, K and V style: several sends before the first receive is read."""
    x = ttnn.experimental
    same = {}
    for direct in (False, True):
        send, receive = (x.send_direct_async, x.recv_direct_async) if direct else (x.send_async, x.recv_async)
        tensors = {kind: (empty if rank else sent)(mesh, kind) for kind in KINDS}
        for tensor in tensors.values():
            (receive if rank else send)(tensor, end)
        for kind, tensor in tensors.items():
            expected = read(mesh, sent(mesh, kind))
            same[f"{kind} {'direct' if direct else 'fifo'}"] = torch.equal(read(mesh, tensor), expected)
    ttnn.synchronize_device(mesh)
    return {"same": same, "bytes": end.bytes_written, "engine": type(end._channel).__name__}


def mismatch(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 0 sends a large bfloat8_b tensor, rank 1 expects bfloat16: both are told of both."""
    x = ttnn.experimental
    if rank:
        x.recv_async(empty(mesh, "bfloat16"), end)
    else:
        x.send_async(sent(mesh, "bfloat8_b"), end)
    return {"error": error_of(lambda: ttnn.synchronize_device(mesh))}


def waiting(mesh: Any, action: Callable[[], Any] | None = None) -> str:
    """Return what the host is told that waits for all of `mesh`'s work, or for `action`."""
    return error_of(action or (lambda: ttnn.synchronize_device(mesh)))


def unreceived(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 0 sends what rank 1, which goes to a barrier, never receives."""
    if rank:
        return {"error": waiting(mesh, ttnn.distributed_context_barrier)}
    for _ in range(2):  # the FIFO holds one
        ttnn.experimental.send_async(sent(mesh, "bfloat16"), end)
    return {"error": waiting(mesh)}


def unsent(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 1 receives what rank 0, which waits for bytes, never sends."""
    if rank:
        ttnn.experimental.recv_async(empty(mesh, "bfloat16"), end)
        return {"error": waiting(mesh)}
    return {"error": waiting(mesh, lambda: ttnn.distributed_context_recv_bytes(8, 1))}


def both_receive_first(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Each rank receives before it sends."""
    ends = {"sender_rank": 1, "receiver_rank": 0}
    back = ttnn.MeshSocket(mesh, config(**ends))
    ttnn.experimental.recv_async(empty(mesh, "rows"), end if rank else back)
    ttnn.experimental.send_async(sent(mesh, "rows"), back if rank else end)
    return {"error": waiting(mesh)}


def both_make_their_sending_end_first(mesh: Any, rank: int) -> dict[str, Any]:
    ends = {"sender_rank": rank, "receiver_rank": 1 - rank}
    return {"error": waiting(mesh, lambda: ttnn.MeshSocket(mesh, config(**ends)))}


def exits(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 1 ends in the way that HOW says; rank 0 receives, sends or meets it in a barrier."""
    if rank:
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["HOW"] == "raise":
            raise ValueError("no weights")
        sys.exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # mpirun's, so that this rank can say what it saw
    if os.environ["WAIT"] == "send":
        ttnn.experimental.send_direct_async(sent(mesh, "bfloat16"), end)
    wait = ttnn.distributed_context_barrier if os.environ["WAIT"] == "barrier" else None
    error = waiting(mesh, wait)
    print("RESULT", json.dumps({"rank": 0, "exits": {"error": error}}), flush=True)
    os._exit(0)


def ring(mesh: Any, rank: int) -> dict[str, Any]:
    """Every rank passes on what it got, and adds it up: each send is posted before the receive, and fits in the FIFO."""
    ranks = int(ttnn.distributed_context_get_size())
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.DRAM, 1 << 20)

    def make(sender: int, receiver: int) -> Any:
        core = [ttnn.MeshCoreCoord(ttnn.MeshCoordinate(0, c), ttnn.CoreCoord(0, 0)) for c in range(2)]
        connections = [ttnn.SocketConnection(c, c) for c in core]
        return ttnn.MeshSocket(mesh, ttnn.SocketConfig(connections, memory, sender, receiver))

    if rank % 2 == 0:
        out, into = make(rank, after), make(before, rank)
    else:
        into, out = make(before, rank), make(rank, after)
    passed = total = ttnn.from_torch(
        torch.full((1, 1, 64, 64), rank + 1.0), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh
    )
    for _ in range(ranks - 1):
        got = ttnn.allocate_tensor_on_device(passed.spec, mesh)
        ttnn.experimental.send_async(passed, out)
        ttnn.experimental.recv_async(got, into)
        ttnn.synchronize_device(mesh)
        total, passed = ttnn.add(total, got), got
    return {"sums": read(mesh, total).unique().tolist()}


def early_exit(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 1 ends with an error of its own while rank 0 waits for it."""
    if rank:
        os._exit(3)
    ttnn.experimental.send_async(sent(mesh, "bfloat8_b"), end)
    ttnn.synchronize_device(mesh)
    return {}


def late(mesh: Any, rank: int) -> dict[str, Any]:
    """Rank 1 makes its end after rank 0 has given up: both are told, and the next socket works."""
    socket.HANDSHAKE_S = 0.2

    def make() -> Any:
        return ttnn.MeshSocket(mesh, config())

    error = error_of(make) if rank == 0 else ""
    ttnn.distributed_context_barrier()
    error = error_of(make) if rank == 1 else error
    ttnn.distributed_context_barrier()
    socket.HANDSHAKE_S = 30.0
    return {"error": error, **exact(mesh, make(), rank)}


def different_ends(mesh: Any, rank: int) -> dict[str, Any]:
    """The ranks give the socket FIFOs of different sizes."""
    return {"error": error_of(lambda: ttnn.MeshSocket(mesh, config(fifo=4096 * (rank + 1))))}


def mesh_ids(mesh: Any, rank: int) -> dict[str, Any]:
    """The ends are named by mesh id; one that no rank has is rejected."""
    wrong = error_of(lambda: ttnn.MeshSocket(mesh, config(sender_mesh_id=7, receiver_mesh_id=9)))
    return {
        "error": wrong,
        **exact(mesh, ttnn.MeshSocket(mesh, config(sender_mesh_id=7, receiver_mesh_id=8)), rank),
    }


def context(mesh: Any, rank: int) -> dict[str, Any]:
    """Bytes and integers between the ranks."""
    if rank == 0:
        ttnn.distributed_context_send_bytes(b"prefill\0", 1, tag=5)
    got = ttnn.distributed_context_recv_bytes(8, 0, tag=5).decode() if rank else ""
    short = nobody = tag = ""
    if rank == 0:
        ttnn.distributed_context_send_bytes(b"abc", 1)
        nobody = error_of(lambda: ttnn.distributed_context_send_bytes(b"abc", 5))
        tag = error_of(lambda: ttnn.distributed_context_send_bytes(b"abc", 1, -1))
    else:
        short = error_of(lambda: ttnn.distributed_context_recv_bytes(5, 0))
    return {
        "short": short,
        "nobody": nobody,
        "tag": tag,
        "got": got,
        "all": ttnn.distributed_context_allgather_int(rank + 10),
        "size": int(ttnn.distributed_context_get_size()),
    }


def within_process(mesh: Any, rank: int) -> dict[str, Any]:
    """The host waits for a receive whose send it would post later."""
    other = ttnn.open_mesh_device(ttnn.MeshShape(1, 2))
    _, into = ttnn.create_socket_pair(other, mesh, config())
    target = empty(mesh, "rows")
    ttnn.experimental.recv_async(target, into)
    return {"error": error_of(lambda: read(mesh, target))}


WITH_SOCKET: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (exact, mismatch, unreceived, unsent, both_receive_first, early_exit, exits)
}
ALONE: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        late,
        different_ends,
        mesh_ids,
        context,
        ring,
        both_make_their_sending_end_first,
        within_process,
    )
}


DEADLOCKS = (
    "unreceived",
    "unsent",
    "both_receive_first",
    "both_make_their_sending_end_first",
    "within_process",
)


def stress(mesh: Any, rank: int) -> dict[str, Any]:
    """Seeded random programs that must not deadlock: the same transfers in one order on all ranks, and barriers between.

    Every rank runs its part of one global order, so that it never waits for what comes later; it now and then synchronises,
    waits in a barrier, exchanges integers or bytes, or computes for a while.
    """
    ranks, pick = int(ttnn.distributed_context_get_size()), random.Random(int(os.environ["SEED"]))
    sockets = {}
    for sender in range(ranks):
        for receiver in range(ranks):
            if sender != receiver and rank in (sender, receiver):
                ends = {"sender_rank": sender, "receiver_rank": receiver}
                sockets[sender, receiver] = ttnn.MeshSocket(mesh, config(**ends))
    tensors = {kind: sent(mesh, kind) for kind in KINDS}
    wrong, moved = 0, 0
    for _ in range(int(os.environ["STEPS"])):
        what, kind = (
            pick.choice(["move"] * 12 + ["barrier", "gather", "bytes", "sync"]),
            pick.choice(list(KINDS)),
        )
        sender, receiver = pick.sample(range(ranks), 2)
        slow, direct, late = pick.choice(range(ranks)), pick.random() < 0.5, pick.random() < 0.3
        x = ttnn.experimental
        if what == "move" and rank == sender:
            (x.send_direct_async if direct else x.send_async)(tensors[kind], sockets[sender, receiver])
        elif what == "move" and rank == receiver:
            target = empty(mesh, kind)
            (x.recv_direct_async if direct else x.recv_async)(target, sockets[sender, receiver])
            if late:
                wrong += not torch.equal(read(mesh, target), read(mesh, tensors[kind]))
                moved += 1
        elif what == "barrier":
            ttnn.distributed_context_barrier()
        elif what == "gather":
            wrong += ttnn.distributed_context_allgather_int(rank) != list(range(ranks))
        elif what == "bytes" and rank == sender:
            ttnn.distributed_context_send_bytes(bytes(200_000), receiver, 3)
        elif what == "bytes" and rank == receiver:
            ttnn.distributed_context_recv_bytes(200_000, sender, 3)
        elif what == "sync":
            ttnn.synchronize_device(mesh)
        if rank == slow and pick.random() < 0.1:
            began = time.monotonic()
            while time.monotonic() - began < 0.15:  # longer than a deadlock takes to be found
                torch.ones(1000).sum()
        elif rank != slow:
            pick.random()
    ttnn.synchronize_device(mesh)
    return {"wrong": wrong, "moved": moved}


ALONE["stress"] = stress


def main(names: list[str]) -> None:
    if os.environ.get("ENGINE") == "MPI":
        shm.available = lambda: False
    ttnn.init_distributed_context()
    rank = int(ttnn.distributed_context_get_rank())
    os.environ["TT_MESH_ID"] = str(7 + rank)
    results = {}
    for name in names:
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
        mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 2))
        started = time.monotonic()
        if name in ALONE:
            results[name] = ALONE[name](mesh, rank)
        else:
            results[name] = WITH_SOCKET[name](mesh, ttnn.MeshSocket(mesh, config()), rank)
        results[name]["seconds"] = time.monotonic() - started
        if name in DEADLOCKS:
            continue  # the other rank may be waiting still
        with contextlib.suppress(DeviceError):
            ttnn.distributed_context_barrier()
            ttnn.close_mesh_device(mesh)
    print("RESULT", json.dumps({"rank": rank, **results}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
