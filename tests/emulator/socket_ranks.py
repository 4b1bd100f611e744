"""What two ranks do in test_socket.py, started by mpirun: `python socket_ranks.py SCENARIO`, one "RESULT {...}" line a rank."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import socket
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
    return {"same": same, "bytes": end.bytes_written}


def mismatch(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 0 sends a large bfloat8_b tensor, rank 1 expects bfloat16: both are told of both."""
    x = ttnn.experimental
    if rank:
        x.recv_async(empty(mesh, "bfloat16"), end)
    else:
        x.send_async(sent(mesh, "bfloat8_b"), end)
    return {"error": error_of(lambda: ttnn.synchronize_device(mesh))}


def unreceived(mesh: Any, end: Any, rank: int) -> dict[str, Any]:
    """Rank 0 sends what rank 1 never receives, and gives up after a second."""
    if rank:
        return {}
    patience = os.environ[PATIENCE]
    os.environ[PATIENCE] = "1"
    ttnn.experimental.send_async(sent(mesh, "bfloat16"), end)
    error = error_of(lambda: ttnn.synchronize_device(mesh))
    os.environ[PATIENCE] = patience
    return {"error": error}


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
    return {
        "got": got,
        "all": ttnn.distributed_context_allgather_int(rank + 10),
        "size": int(ttnn.distributed_context_get_size()),
    }


WITH_SOCKET: dict[str, Callable[..., dict[str, Any]]] = {
    "exact": exact, "mismatch": mismatch, "unreceived": unreceived, "early_exit": early_exit,
}  # fmt: skip
ALONE = {"late": late, "different_ends": different_ends, "mesh_ids": mesh_ids, "context": context}


def main(names: list[str]) -> None:
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
        ttnn.distributed_context_barrier()
        with contextlib.suppress(DeviceError):
            ttnn.close_mesh_device(mesh)
    print("RESULT", json.dumps({"rank": rank, **results}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
