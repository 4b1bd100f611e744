"""Logits of our model and of transformers for the same tokens, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.core import TILE, whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint
from disagg_tt.model.llama import Llama


class Ours:
    """Our model of a checkpoint, with its cache, on one mesh of 1 x `chips`."""

    def __init__(self, folder: Path, kv_dtype: str, chips: int = 2, slots: int = 1, longest: int = 512):
        checkpoint = Checkpoint.open(folder)
        self.mesh = open_mesh((1, chips))
        dtype, pages = getattr(ttnn, kv_dtype), whole_tiles(longest) // BLOCK
        loaded = weights.load(checkpoint, self.mesh, weights.weight_dtype(checkpoint.config, "bfloat16"))
        self.model = Llama(self.mesh, checkpoint.config, loaded, whole_tiles(longest), dtype)
        self.cache = PagedCache(self.mesh, checkpoint.config, slots, pages, slots * pages, dtype)
        self.rows: list[Any] = []  # each slot's page table, as prefill takes it
        for slot in range(slots):
            blocks = list(range(slot * pages, (slot + 1) * pages))
            self.cache.assign(slot, blocks)
            self.rows.append(self.cache.table_row(blocks))

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        close_mesh(self.mesh)

    def prefill(self, tokens: list[int], slot: int = 0) -> torch.Tensor:
        """Logits [positions of the last tile, vocabulary] of a prompt, whose K and V go into `slot`."""
        logits = self.model.prefill(tokens, lambda layer, k, v: self.cache.fill(layer, k, v, self.rows[slot]))
        return _values(logits)[: (len(tokens) - 1) % TILE + 1]

    def chunk(self, tokens: list[int], start: int, slot: int) -> torch.Tensor:
        """Logits as `prefill`'s, of `tokens` from `start` on, whose K and V, as the earlier ones', are in `slot`'s blocks."""
        pages = self.cache.blocks_per_slot
        blocks = list(range(slot * pages, (slot + 1) * pages))
        logits = self.model.prefill_chunk(tokens, start, self.cache, blocks, lambda layer, k, v: None)
        return _values(logits)[: (len(tokens) - 1) % TILE + 1]

    def cached(self, slot: int, tokens: int) -> torch.Tensor:
        """K and V of all layers, [layers, 2, kv_heads, tokens, head_dim], of the first `tokens` tokens of `slot`."""
        pages = self.cache.blocks_per_slot
        held = [
            torch.cat([ttnn.to_torch(chip) for chip in ttnn.get_device_tensors(pool)], dim=1)
            for pools in self.cache.layers
            for pool in pools
        ]
        each = torch.stack(held)[
            :, slot * pages : (slot + 1) * pages
        ]  # [.., pages, kv_heads, block, head_dim]
        each = each.transpose(1, 2).flatten(2, 3)[:, :, :tokens]
        return each.unflatten(0, (len(self.cache.layers), 2)).float()

    def decode(self, texts: list[list[int]], begin: list[int], steps: int) -> torch.Tensor:
        """Logits [slots, steps, vocabulary]: `steps` tokens of each text, from position `begin` on, one at a time.

        The texts up to there are in the cache.
        """
        inputs, rows = self.model.decode_inputs(len(texts)), []
        for step in range(steps):
            positions = [at + step for at in begin]
            self.model.set_decode_inputs(
                inputs, [t[p] for t, p in zip(texts, positions, strict=True)], positions
            )
            rows.append(_values(self.model.decode_step(inputs, self.cache))[: len(texts)])
        return torch.stack(rows, dim=1)


def _values(logits: Any) -> torch.Tensor:
    return ttnn.to_torch(ttnn.get_device_tensors(logits)[0])[0, 0].float()


class Theirs:
    """The checkpoint in transformers, float32."""

    def __init__(self, folder: Path):
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Logits [positions, vocabulary]."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's correlation of all logits, each position's mean taken off."""
    a, b = (x.double() - x.double().mean(dim=-1, keepdim=True) for x in (one, other))
    return float((a * b).sum() / (a.norm() * b.norm()))


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of positions with the same likeliest token."""
    return float((one.argmax(dim=-1) == other.argmax(dim=-1)).double().mean())
