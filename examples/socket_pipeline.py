"""A pipeline over MeshSockets in plain ttnn: every rank is a stage, each chip sends its own shard to the next rank's chip.

    tt-run --rank-binding rank_bindings/n300x2_1p1d.yaml python examples/socket_pipeline.py                # hardware
    disagg-tt emulate --rank-binding rank_bindings/n300x2_1p1d.yaml examples/socket_pipeline.py            # emulator

Rank 0 makes batches, every stage computes x + x @ w with a weight of its own, and the last rank compares with torch. Any
number of ranks from two on, each with a row of chips.
"""

import torch
import ttnn

BATCHES, ROWS, WIDTH = 4, 64, 256  # rows are those of a chip


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def batch(number: int, chips: int) -> torch.Tensor:
    return random(number, chips, 1, ROWS, WIDTH)


def weight(stage: int) -> torch.Tensor:
    return random(1000 + stage, 1, 1, WIDTH, WIDTH) / WIDTH**0.5


def reference(number: int, chips: int, stages: int) -> torch.Tensor:
    """Return what the pipeline computes of a batch, in float32."""
    x = batch(number, chips).float()
    for stage in range(stages):
        x = x + x @ weight(stage).float()
    return x


def socket(mesh: ttnn.MeshDevice, sender: int, receiver: int) -> ttnn.MeshSocket:
    """Return this rank's end of a socket that joins each chip of the sender with the same chip of the receiver."""
    connections = []
    for chip in ttnn.MeshCoordinateRange(mesh.shape):
        core = ttnn.MeshCoreCoord(chip, ttnn.CoreCoord(0, 0))
        connections.append(ttnn.SocketConnection(core, core))
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, 16 * 1024)
    return ttnn.MeshSocket(
        mesh, ttnn.SocketConfig(connections, memory, sender_rank=sender, receiver_rank=receiver)
    )


def to_device(mesh: ttnn.MeshDevice, values: torch.Tensor, mapper: object) -> ttnn.Tensor:
    return ttnn.from_torch(
        values, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=mapper
    )


def main() -> None:
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    chips = len(ttnn.get_device_ids())
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, chips))
    rank, ranks = int(ttnn.distributed_context_get_rank()), int(ttnn.distributed_context_get_size())
    if ranks < 2:
        raise SystemExit("a pipeline needs two ranks or more; start it with a rank binding")

    # A socket waits for its other end for ten seconds only, so sockets come before weights and work.
    upstream = socket(mesh, rank - 1, rank) if rank > 0 else None
    downstream = socket(mesh, rank, rank + 1) if rank < ranks - 1 else None
    ttnn.distributed_context_barrier()

    w = to_device(mesh, weight(rank), ttnn.ReplicateTensorToMesh(mesh))
    for number in range(BATCHES):
        if upstream is None:
            x = to_device(mesh, batch(number, chips), ttnn.ShardTensorToMesh(mesh, dim=0))
        else:
            shape = ttnn.Shape([1, 1, ROWS, WIDTH])
            x = ttnn.allocate_tensor_on_device(
                shape, ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh, ttnn.DRAM_MEMORY_CONFIG
            )
            ttnn.experimental.recv_async(x, upstream)
        y = ttnn.add(x, ttnn.linear(x, w))
        if downstream is not None:
            ttnn.experimental.send_async(y, downstream)
            continue
        got = ttnn.to_torch(y, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=0)).float()
        expected = reference(number, chips, ranks)
        error = float((got - expected).abs().max() / expected.abs().max())
        print(f"batch {number}: {ranks} stages, largest error {error:.4f} of the largest value")
        if error > 0.02:  # a few roundings to bfloat16
            raise SystemExit(f"batch {number} differs from torch")

    ttnn.synchronize_device(mesh)
    ttnn.distributed_context_barrier()
    del upstream, downstream
    ttnn.close_mesh_device(mesh)
    ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


if __name__ == "__main__":
    main()
