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
    from disagg_tt.model.weight_cache import WeightCache

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


Host = Callable[[], torch.Tensor]  # reads and cuts a matrix, where it has to be


class _Placer:
    """Puts host matrices on the mesh, whole or cut along one axis; from and into the cache if there is one."""

    def __init__(self, mesh: Any, dtype: Any, cache: WeightCache | None):
        self.mesh, self.dtype, self.cache = mesh, dtype, cache

    def matrix(self, name: str, host: Host, cut: int) -> Any:
        return self._put(name, host, self.dtype, ttnn.TILE_LAYOUT, ttnn.ShardTensorToMesh(self.mesh, dim=cut))

    def table(self, name: str, host: Host) -> Any:
        mapper = ttnn.ShardTensorToMesh(self.mesh, dim=3)
        return self._put(name, host, ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, mapper)

    def norm(self, name: str, host: Host) -> Any:
        mapper = ttnn.ReplicateTensorToMesh(self.mesh)
        return self._put(name, lambda: host().reshape(-1, TILE), ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT, mapper)

    def _put(self, name: str, host: Host, dtype: Any, layout: Any, mapper: Any) -> Any:
        def converted(device: Any) -> Any:
            matrix = host()
            return ttnn.from_torch(
                matrix.reshape(1, 1, *matrix.shape),
                dtype=dtype,
                layout=layout,
                device=device,
                memory_config=ttnn.DRAM_MEMORY_CONFIG,
                mesh_mapper=mapper,
            )

        if self.cache is None:
            return converted(self.mesh)
        return self.cache.tensor(name, lambda: converted(None))


def load(
    checkpoint: Checkpoint,
    mesh: Any,
    dtype: Any,
    progress: Callable[[range], Iterator[int]] | None = None,
    cache: WeightCache | None = None,
) -> Weights:
    """Read `checkpoint` and place it on `mesh` with matrices of `dtype`; `progress` wraps the range of layers.

    What is in `cache` is not read. Raises CheckpointError for a missing or mis-shaped tensor and PlanError if the model
    does not divide by the mesh.
    """
    config, chips = checkpoint.config, mesh.get_num_devices()
    config.check_mesh(chips)
    put = _Placer(mesh, dtype, cache)

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(name, torch.bfloat16)

    def wqkv(prefix: str) -> torch.Tensor:
        heads = [read(f"{prefix}self_attn.{x}_proj.weight").chunk(chips) for x in "qkv"]
        return torch.cat([part for chip in zip(*heads, strict=True) for part in chip]).T

    def lm_head() -> torch.Tensor:
        rows = padded_vocab(config, chips) - config.vocab_size
        return torch.nn.functional.pad(read("lm_head.weight"), (0, 0, 0, rows)).T

    def layer(i: int) -> LayerWeights:
        theirs, ours = f"model.layers.{i}.", f"layer-{i}-"

        def norm(name: str, source: str) -> Any:
            return put.norm(ours + name, lambda: read(theirs + source))

        def matrix(name: str, source: str, cut: int) -> Any:
            return put.matrix(ours + name, lambda: read(theirs + source).T, cut)

        return LayerWeights(
            attention_norm=norm("attention_norm", "input_layernorm.weight"),
            wqkv=put.matrix(ours + "wqkv", lambda: wqkv(theirs), cut=3),
            wo=matrix("wo", "self_attn.o_proj.weight", cut=2),
            mlp_norm=norm("mlp_norm", "post_attention_layernorm.weight"),
            w1=matrix("w1", "mlp.gate_proj.weight", cut=3),
            w3=matrix("w3", "mlp.up_proj.weight", cut=3),
            w2=matrix("w2", "mlp.down_proj.weight", cut=2),
        )

    indices = range(config.num_hidden_layers)
    return Weights(
        embedding=put.table("embedding", lambda: read("model.embed_tokens.weight")),
        layers=tuple(layer(i) for i in (progress(indices) if progress else indices)),
        norm=put.norm("norm", lambda: read("model.norm.weight")),
        lm_head=put.matrix("lm_head", lm_head, cut=3),
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
