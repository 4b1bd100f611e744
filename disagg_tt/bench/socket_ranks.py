"""What the two ranks of `bench emulator --part socket` do; rank 0 prints one "RESULT {...}" line.

{"bytes": {dtype: packed bytes a round}, "seconds": {dtype: [...]}, "copy": {dtype: [...]}, "tile": [...]}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device import ttnn
from disagg_tt.errors import DisaggError
from disagg_tt.kv_stream.mesh_socket import socket_config

CHIPS, WIDTH = 2, 1024
TENSORS = 64
ROWS = {
    "bfloat16": 512,
    "bfloat8_b": 960,
    "float32": 256,
    "uint32": 256,
}  # a chip, so that a tensor packs into 2 MB
TILES = 100  # one-tile transfers there and back a figure


def main(repeats: int) -> None:
    """Measure every dtype `repeats` times after a warm-up, in turn with a copy of as many bytes, and check what arrived."""
    torch.set_num_threads(1)
    ttnn.init_distributed_context()
    rank = int(ttnn.distributed_context_get_rank())
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, CHIPS))
    out = ttnn.MeshSocket(mesh, socket_config(1, CHIPS, sender=0, receiver=1))
    back = ttnn.MeshSocket(mesh, socket_config(1, CHIPS, sender=1, receiver=0))
    found: dict[str, Any] = {"bytes": {}, "seconds": {}, "copy": {}}
    for name in ROWS:
        size, seconds, copies = transfers(mesh, out, name, rank, repeats)
        found["bytes"][name], found["seconds"][name], found["copy"][name] = size, seconds, copies
    found["tile"] = [there_and_back(mesh, out, back, rank) / 2 for _ in range(repeats + 1)][1:]
    ttnn.distributed_context_barrier()
    if rank == 0:
        print("RESULT", json.dumps(found), flush=True)
    ttnn.close_mesh_device(mesh)


def transfers(
    mesh: Any, socket: Any, name: str, rank: int, repeats: int
) -> tuple[int, list[float], list[float]]:
    """Return the packed bytes of TENSORS tensors of dtype `name`, the seconds to move them, and to copy as many bytes."""
    tensors = [tensor(mesh, name, seed) for seed in range(TENSORS)] if rank == 0 else empty(mesh, name)
    size = CHIPS * tensors[0].buffer_num_pages() * tensors[0].buffer_page_size()
    buffers = [(torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)) for _ in tensors]
    transfer = ttnn.experimental.recv_async if rank else ttnn.experimental.send_async

    def move() -> None:
        for each in tensors:
            transfer(each, socket)
        ttnn.synchronize_device(mesh)

    def copy() -> None:
        for source, target in buffers:
            target.copy_(source)

    nothing = ttnn.from_torch(
        torch.zeros(CHIPS, 1, ROWS[name], WIDTH),
        dtype=getattr(ttnn, name),
        layout=ttnn.TILE_LAYOUT,
        mesh_mapper=ttnn.ShardTensorToMesh(mesh, dim=0),
    )
    expected = [values_of(mesh, tensor(mesh, name, seed)) for seed in range(TENSORS)] if rank else []
    seconds, copies = [], []
    for _ in range(repeats + 1):
        if rank == 0:
            copies.append(timed(copy))
        else:
            for each in tensors:  # what the repeat before has left must not pass for this one's
                ttnn.copy_host_to_device_tensor(nothing, each)
            ttnn.synchronize_device(mesh)
        ttnn.distributed_context_barrier()
        mine = timed(move)
        # both began at the barrier, and the later end counts; in us, since ns of a slow machine do not fit in 32 bits
        seconds.append(max(ttnn.distributed_context_allgather_int(round(mine * 1e6))) / 1e6)
        for seed, received in enumerate(tensors) if rank else ():
            if not torch.equal(values_of(mesh, received), expected[seed]):
                raise DisaggError(f"{name} tensor {seed} arrived with other values than were sent")
    return size * TENSORS, seconds[1:], copies[1:]


def there_and_back(mesh: Any, out: Any, back: Any, rank: int) -> float:
    """Return the median seconds in which one tile a chip goes to the other rank and comes back."""
    tile = ttnn.zeros([1, 1, 32, 32], ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh)
    ttnn.distributed_context_barrier()
    seconds = []
    for _ in range(TILES):
        began = time.perf_counter()
        if rank == 0:
            ttnn.experimental.send_async(tile, out)
            ttnn.experimental.recv_async(tile, back)
        else:
            ttnn.experimental.recv_async(tile, out)
            ttnn.experimental.send_async(tile, back)
        ttnn.synchronize_device(mesh)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[TILES // 2]


def tensor(mesh: Any, name: str, seed: int) -> Any:
    """Return a tensor of dtype `name` with values of its own, cut over the chips."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CHIPS, 1, ROWS[name], WIDTH)
    if name == "uint32":
        values = torch.randint(0, 2**32, shape, generator=generator)
    else:
        values = torch.randn(shape, generator=generator)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=0)
    dtype = getattr(ttnn, name)
    return ttnn.from_torch(values, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=mapper)


def empty(mesh: Any, name: str) -> list[Any]:
    """Return tensors to receive into."""
    shape = ttnn.Shape([1, 1, ROWS[name], WIDTH])
    return [
        ttnn.allocate_tensor_on_device(shape, getattr(ttnn, name), ttnn.TILE_LAYOUT, mesh)
        for _ in range(TENSORS)
    ]


def values_of(mesh: Any, each: Any) -> torch.Tensor:
    values: torch.Tensor = ttnn.to_torch(each, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0))
    return values


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(int(sys.argv[1]))
