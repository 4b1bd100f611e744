"""The paged K/V cache: one pair of block pools a layer, and the page table that says whose blocks are whose.

K and V pools are [blocks, kv_heads / chips, 32, head_dim] on each chip, TILE layout. The page table is int32
[slots, blocks per slot]: row s lists, in order, the blocks that hold slot s's tokens.
"""

from typing import Any

import torch

from disagg_tt.blocks import BLOCK as BLOCK  # users of the cache find it here
from disagg_tt.config import LlamaConfig
from disagg_tt.device import ttnn
from disagg_tt.device.host import host_tensor, to_device, zeros


class PagedCache:
    """Device tensors of the cache of one decode mesh."""

    def __init__(
        self, mesh: Any, config: LlamaConfig, slots: int, blocks_per_slot: int, blocks: int, dtype: Any
    ):
        """Allocate zeroed pools of `blocks` blocks a layer and a page table for `slots` x `blocks_per_slot`."""
        self.mesh, self.slots, self.blocks_per_slot, self.dtype = mesh, slots, blocks_per_slot, dtype
        self.blocks = blocks
        shape = [blocks, config.num_key_value_heads // mesh.get_num_devices(), BLOCK, config.head_dim]
        self.layers = tuple(
            (zeros(mesh, shape, dtype), zeros(mesh, shape, dtype)) for _ in range(config.num_hidden_layers)
        )
        self._rows = torch.zeros(slots, blocks_per_slot, dtype=torch.int32)
        self.page_table = to_device(mesh, self._rows, ttnn.int32)

    def assign(self, slot: int, blocks: list[int]) -> None:
        """Make `blocks` the pages of `slot`, in token order; modifies the page table on the device in place."""
        self._rows[slot] = 0
        self._rows[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        ttnn.copy_host_to_device_tensor(host_tensor(self.mesh, self._rows, ttnn.int32), self.page_table)

    def table_row(self, blocks: list[int]) -> Any:
        """Return a page table of one row on the device, int32 [1, blocks per slot]: `blocks` in token order, then zeros."""
        row = torch.zeros(1, self.blocks_per_slot, dtype=torch.int32)
        row[0, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return to_device(self.mesh, row, ttnn.int32)

    def fill(self, layer: int, k: Any, v: Any, row: Any) -> None:
        """Write K and V, each [1, kv_heads / chips, tokens, head_dim] of the cache's dtype, to the blocks of `row`, in order."""
        for pool, values in zip(self.layers[layer], (k, v), strict=True):
            ttnn.experimental.paged_fill_cache(pool, values, row, batch_idx=0)
