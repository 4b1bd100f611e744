"""Weights on the mesh: a Hugging Face checkpoint cut for tensor parallelism and put into device tensors.

Per chip, with C chips on the mesh (all matrices are [in, out], TILE layout):

    embedding   [1, 1, vocab, hidden / C]               bfloat16, ROW_MAJOR
    wqkv        [1, 1, hidden, (q | k | v heads) / C]    each chip holds its q heads, then its k heads, then its v heads
    wo          [1, 1, q heads / C * head_dim, hidden]   rows cut: the partial sums are reduced over the chips
    w1, w3      [1, 1, hidden, ffn / C]                  gate and up
    w2          [1, 1, ffn / C, hidden]                  down, rows cut
    lm_head     [1, 1, hidden, padded vocab / C]
    norms       [1, 1, hidden / 32, 32]                  bfloat16, ROW_MAJOR, on every chip
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from disagg_tt.config import LlamaConfig
from disagg_tt.device import ttnn
from disagg_tt.device.host import zeros
from disagg_tt.plan import default_weight_dtype

if TYPE_CHECKING:
    from disagg_tt.model.checkpoint import Checkpoint

TILE = 32


def weight_dtype(config: LlamaConfig, name: str | None) -> Any:
    """Return the ttnn dtype of the matrices: `name` if given, else bfloat16 below 1 B parameters and bfloat8_b above."""
    return getattr(ttnn, name or default_weight_dtype(config))


def padded_vocab(config: LlamaConfig, chips: int) -> int:
    """Return the vocabulary size rounded up so that each chip's share of the logits is whole tiles."""
    share = TILE * chips
    return -(-config.vocab_size // share) * share


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer's device tensors; shapes in the module's docstring."""

    attention_norm: Any
    wqkv: Any
    wo: Any
    mlp_norm: Any
    w1: Any
    w3: Any
    w2: Any


@dataclass(frozen=True)
class Weights:
    """All device tensors of a model; shapes in the module's docstring."""

    embedding: Any
    layers: tuple[LayerWeights, ...]
    norm: Any
    lm_head: Any


class _Placer:
    """Puts host matrices on the mesh, whole or cut along one axis."""

    def __init__(self, mesh: Any, dtype: Any):
        self.mesh, self.dtype = mesh, dtype

    def matrix(self, host: torch.Tensor, cut: int) -> Any:
        return self._put(host, self.dtype, ttnn.TILE_LAYOUT, ttnn.ShardTensorToMesh(self.mesh, dim=cut))

    def table(self, host: torch.Tensor) -> Any:
        return self._put(host, ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, ttnn.ShardTensorToMesh(self.mesh, dim=3))

    def norm(self, host: torch.Tensor) -> Any:
        folded = host.reshape(-1, TILE)
        return self._put(folded, ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, ttnn.ReplicateTensorToMesh(self.mesh))

    def _put(self, host: torch.Tensor, dtype: Any, layout: Any, mapper: Any) -> Any:
        return ttnn.from_torch(
            host.reshape(1, 1, *host.shape),
            dtype=dtype,
            layout=layout,
            device=self.mesh,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
            mesh_mapper=mapper,
        )


def load(
    checkpoint: Checkpoint, mesh: Any, dtype: Any, progress: Callable[[range], Iterator[int]] | None = None
) -> Weights:
    """Read `checkpoint` and place it on `mesh` with matrices of `dtype`; `progress` wraps the range of layers.

    Raises CheckpointError for a missing or mis-shaped tensor and PlanError if the model does not divide by the mesh.
    """
    config, chips = checkpoint.config, mesh.get_num_devices()
    config.check_mesh(chips)
    put = _Placer(mesh, dtype)

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(name, torch.bfloat16)

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}."
        heads = [read(f"{prefix}self_attn.{x}_proj.weight").chunk(chips) for x in "qkv"]
        wqkv = torch.cat([part for chip in zip(*heads, strict=True) for part in chip])
        return LayerWeights(
            attention_norm=put.norm(read(prefix + "input_layernorm.weight")),
            wqkv=put.matrix(wqkv.T, cut=3),
            wo=put.matrix(read(prefix + "self_attn.o_proj.weight").T, cut=2),
            mlp_norm=put.norm(read(prefix + "post_attention_layernorm.weight")),
            w1=put.matrix(read(prefix + "mlp.gate_proj.weight").T, cut=3),
            w3=put.matrix(read(prefix + "mlp.up_proj.weight").T, cut=3),
            w2=put.matrix(read(prefix + "mlp.down_proj.weight").T, cut=2),
        )

    embedding = read("model.embed_tokens.weight")
    lm_head = embedding if config.tie_word_embeddings else read("lm_head.weight")
    lm_head = torch.nn.functional.pad(lm_head, (0, 0, 0, padded_vocab(config, chips) - config.vocab_size))
    indices = range(config.num_hidden_layers)
    return Weights(
        embedding=put.table(embedding),
        layers=tuple(layer(i) for i in (progress(indices) if progress else indices)),
        norm=put.norm(read("model.norm.weight")),
        lm_head=put.matrix(lm_head.T, cut=3),
    )


def allocate(config: LlamaConfig, mesh: Any, dtype: Any) -> Weights:
    """Return weights of the right shapes, all zero: a dry run's, which needs no checkpoint."""
    chips = mesh.get_num_devices()
    config.check_mesh(chips)
    hidden, ffn = config.hidden_size, config.intermediate_size // chips
    q_width = config.num_attention_heads * config.head_dim // chips
    kv_width = config.num_key_value_heads * config.head_dim // chips

    def empty(rows: int, columns: int, kind: Any = dtype, layout: Any = ttnn.TILE_LAYOUT) -> Any:
        # Not left as it is: what memory held before may be NaN, from which no token can be chosen.
        return zeros(mesh, [1, 1, rows, columns], kind, layout)

    def norm() -> Any:
        return empty(hidden // TILE, TILE, ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT)

    return Weights(
        embedding=empty(config.vocab_size, hidden // chips, ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT),
        layers=tuple(
            LayerWeights(
                attention_norm=norm(),
                wqkv=empty(hidden, q_width + 2 * kv_width),
                wo=empty(q_width, hidden),
                mlp_norm=norm(),
                w1=empty(hidden, ffn),
                w3=empty(hidden, ffn),
                w2=empty(ffn, hidden),
            )
            for _ in range(config.num_hidden_layers)
        ),
        norm=norm(),
        lm_head=empty(hidden, padded_vocab(config, chips) // chips),
    )
