"""Reading and writing the pools of a paged cache, all chips' heads together."""

from __future__ import annotations

from typing import Any

import torch

from disagg_tt.device import ttnn


def read_pool(pool: Any) -> torch.Tensor:
    """A pool of K or V as float32 [blocks, kv heads, 32, head_dim]; modifying it changes nothing."""
    shards = [ttnn.to_torch(shard) for shard in ttnn.get_device_tensors(pool)]
    return torch.cat(shards, dim=1).float().clone()


def write_pool(pool: Any, values: torch.Tensor) -> None:
    """Replace a pool's values; those read by `read_pool` come back as they were."""
    mapper = ttnn.ShardTensorToMesh(pool.device(), dim=1)
    host = ttnn.from_torch(values, dtype=pool.dtype, layout=pool.layout, mesh_mapper=mapper)
    ttnn.copy_host_to_device_tensor(host, pool)
