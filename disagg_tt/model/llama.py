"""The Llama decoder in ttnn ops, tensor parallel over the chips of one mesh.

Attention heads, the MLP's inner width, the embedding's columns and the vocabulary are cut over the chips; the residual
stream [1, 1, tokens, hidden] is whole on every chip, so each layer has two all_reduces. Each op below was seen accepted
by ttnn 0.81 at Llama-3.1-8B's size for 1 to 8192 tokens and 1 to 32 slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import LlamaConfig
from disagg_tt.core import whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.host import host_tensor, to_device
from disagg_tt.model.rope import cos_sin
from disagg_tt.model.weights import TILE, LayerWeights, Weights

ROWS = 32  # decode computes one tile of rows, however many slots are in use

OnLayer = Callable[[int, Any, Any], None]
Attend = Callable[[int, Any, Any, Any], Any]  # layer, q, k, v -> attention, as q


@dataclass
class DecodeInputs:
    """What one decode step reads, kept on the device and refreshed in place, so that a trace could replay the step.

    tokens: uint32 [1, 32], one id a row. positions: int32 [slots], -1 for a free slot. rope_rows: uint32 [1, slots],
    the same with 0 for a free slot, since it indexes the cos and sin tables.
    """

    tokens: Any
    positions: Any
    rope_rows: Any


class Llama:
    """One model on one mesh. `prefill` and `decode_step` enqueue device work and return device tensors."""

    def __init__(self, mesh: Any, config: LlamaConfig, weights: Weights, max_seq_len: int, kv_dtype: Any):
        config.check_mesh(mesh.get_num_devices())
        self.mesh, self.config, self.weights = mesh, config, weights
        self.max_seq_len, self.kv_dtype = max_seq_len, kv_dtype
        chips = mesh.get_num_devices()
        self.chips = chips
        self.heads, self.kv_heads = config.num_attention_heads // chips, config.num_key_value_heads // chips
        # in float32: the chunked attention takes no other number
        self.scale = float(torch.tensor(config.head_dim**-0.5, dtype=torch.float32))
        self.grid = mesh.compute_with_storage_grid_size()
        # HiFi2 keeps all of a bfloat8_b weight's mantissa; bfloat16 weights need HiFi4.
        exact = weights.lm_head.dtype == ttnn.bfloat16
        self.precise = ttnn.WormholeComputeKernelConfig(
            math_fidelity=ttnn.MathFidelity.HiFi4 if exact else ttnn.MathFidelity.HiFi2,
            math_approx_mode=False,
            fp32_dest_acc_en=True,
            packer_l1_acc=True,
        )
        cos, sin = (table.reshape(1, 1, max_seq_len, -1) for table in cos_sin(config, max_seq_len))
        self._rope = [to_device(mesh, table, ttnn.bfloat16, ttnn.TILE_LAYOUT) for table in (cos, sin)]
        self._rope_tables = [to_device(mesh, table[0, 0], ttnn.bfloat16) for table in (cos, sin)]

    # ---------------------------------------------------------------- prefill

    def prefill(self, tokens: list[int], on_layer: OnLayer) -> Any:
        """Run a whole prompt and return the logits of its last tile, bfloat16 [1, 1, 32, vocab] in ROW_MAJOR.

        The prompt is padded to whole tiles of 32 tokens. As soon as layer i's K and V exist, and before its attention,
        `on_layer(i, k, v)` is called with [1, kv_heads / chips, padded tokens, head_dim] tensors of the cache's dtype.
        The logits of the last token are row (len(tokens) - 1) % 32.
        """
        size = 64 if len(tokens) < 2048 else 256

        def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
            on_layer(layer, k, v)
            return ttnn.transformer.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, program_config=self._attention(size),
                compute_kernel_config=self.precise,
            )  # fmt: skip

        return self._prefill(tokens, self._rope, attend)

    def prefill_chunk(
        self, tokens: list[int], start: int, cache: PagedCache, blocks: list[int], on_layer: OnLayer
    ) -> Any:
        """Run tokens start..start+len(tokens)-1 of a prompt whose earlier ones are in `cache`; return logits as `prefill`.

        `blocks` are the sequence's, in token order, those of this chunk included; the chunk's K and V are written there.
        `start` is a multiple of 32. `on_layer` is called as by `prefill`, with the chunk's K and V alone.
        """
        length = whole_tiles(len(tokens))
        size = next(s for s in (64, 32) if start % s == 0)
        row = cache.table_row(blocks)
        own = cache.table_row(blocks[start // BLOCK : (start + length) // BLOCK])
        rope = [
            ttnn.slice(table, [0, 0, start, 0], [1, 1, start + length, self.config.head_dim])
            for table in self._rope
        ]

        def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
            on_layer(layer, k, v)
            cache.fill(layer, k, v, own)
            return ttnn.transformer.chunked_scaled_dot_product_attention(
                q, *cache.layers[layer], row, start, scale=self.scale, program_config=self._attention(size),
                compute_kernel_config=self.precise,
            )  # fmt: skip

        return self._prefill(tokens, rope, attend)

    def _prefill(self, tokens: list[int], rope: list[Any], attend: Attend) -> Any:
        length = whole_tiles(len(tokens))
        ids = torch.zeros(1, 1, 1, length, dtype=torch.int64)
        ids[..., : len(tokens)] = torch.tensor(tokens)
        x = self._embed(to_device(self.mesh, ids, ttnn.uint32), length)
        for i, layer in enumerate(self.weights.layers):
            x = self._prefill_layer(i, layer, x, rope, attend)
        last = ttnn.slice(x, [0, 0, length - TILE, 0], [1, 1, length, self.config.hidden_size])
        return self._head(last)

    def _prefill_layer(self, i: int, w: LayerWeights, x: Any, rope: list[Any], attend: Attend) -> Any:
        qkv = self._matmul_wide(self._norm(x, w.attention_norm), w.wqkv)
        q, k, v = ttnn.experimental.nlp_create_qkv_heads(
            qkv, num_heads=self.heads, num_kv_heads=self.kv_heads, transpose_k_heads=False
        )
        q = ttnn.experimental.rotary_embedding_hf(q, *rope, is_decode_mode=False)
        k = ttnn.experimental.rotary_embedding_hf(k, *rope, is_decode_mode=False)
        if self.kv_dtype != ttnn.bfloat16:
            k, v = ttnn.typecast(k, self.kv_dtype), ttnn.typecast(v, self.kv_dtype)
        attention = ttnn.experimental.nlp_concat_heads(attend(i, q, k, v))
        x = ttnn.add(x, self._reduce(self._matmul_wide(attention, w.wo)))
        h = self._norm(x, w.mlp_norm)
        gate, up = self._matmul_wide(h, w.w1), self._matmul_wide(h, w.w3)
        h = ttnn.mul(gate, up, input_tensor_a_activations=[ttnn.UnaryOpType.SILU])
        return ttnn.add(x, self._reduce(self._matmul_wide(h, w.w2)))

    def _matmul_wide(self, a: Any, b: Any) -> Any:
        # The default matmul's automatic config overflows L1 at some of prefill's sizes; this one fits at all of them.
        return ttnn.experimental.minimal_matmul(a, b, dtype=ttnn.bfloat16, compute_kernel_config=self.precise)

    # ---------------------------------------------------------------- decode

    def decode_inputs(self, slots: int) -> DecodeInputs:
        """Return decode inputs for `slots` slots, all free."""
        return DecodeInputs(
            tokens=to_device(self.mesh, torch.zeros(1, ROWS, dtype=torch.int64), ttnn.uint32),
            positions=to_device(self.mesh, torch.full((slots,), -1, dtype=torch.int32), ttnn.int32),
            rope_rows=to_device(self.mesh, torch.zeros(1, slots, dtype=torch.int64), ttnn.uint32),
        )

    def set_decode_inputs(self, inputs: DecodeInputs, tokens: list[int], positions: list[int]) -> None:
        """Write each slot's next token and its position (-1: free) into `inputs`, in place."""
        ids = torch.zeros(1, ROWS, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        where = torch.tensor(positions, dtype=torch.int32)
        for values, dtype, target in (
            (ids, ttnn.uint32, inputs.tokens),
            (where, ttnn.int32, inputs.positions),
            (where.clamp(min=0)[None].to(torch.int64), ttnn.uint32, inputs.rope_rows),
        ):
            ttnn.copy_host_to_device_tensor(host_tensor(self.mesh, values, dtype), target)

    def decode_step(self, inputs: DecodeInputs, cache: PagedCache) -> Any:
        """Run one token of every slot; return logits bfloat16 [1, 1, 32, vocab] in ROW_MAJOR, row s for slot s.

        Writes each slot's K and V into `cache` at its position and advances `inputs`' positions by one. Rows of free
        slots hold nothing meaningful.
        """
        slots = cache.slots
        x = self._embed(inputs.tokens, ROWS, ttnn.L1_MEMORY_CONFIG)
        cos, sin = (self._rope_rows(table, inputs.rope_rows, slots) for table in self._rope_tables)
        for layer, pools in zip(self.weights.layers, cache.layers, strict=True):
            x = self._decode_layer(layer, x, pools, inputs.positions, cache.page_table, cos, sin, slots)
        ttnn.plus_one(inputs.positions, skip_negative_entries=True)
        ttnn.plus_one(inputs.rope_rows)
        return self._head(x)

    def _decode_layer(
        self,
        w: LayerWeights,
        x: Any,
        pools: tuple[Any, Any],
        positions: Any,
        pages: Any,
        cos: Any,
        sin: Any,
        slots: int,
    ) -> Any:
        l1 = ttnn.L1_MEMORY_CONFIG
        qkv = self._matmul_narrow(self._norm(x, w.attention_norm, l1), w.wqkv, l1)
        if slots != ROWS:
            width = qkv.shape[-1]
            qkv = ttnn.reshape(qkv, ttnn.Shape([1, 1, slots, width]), ttnn.Shape([1, 1, ROWS, width]))
        q, k, v = ttnn.experimental.nlp_create_qkv_heads_decode(
            qkv,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            memory_config=ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG,
        )
        q = ttnn.experimental.rotary_embedding_hf(q, cos, sin, is_decode_mode=True)
        k = ttnn.experimental.rotary_embedding_hf(k, cos, sin, is_decode_mode=True)
        for pool, values in zip(pools, (k, v), strict=True):
            ttnn.experimental.paged_update_cache(pool, values, update_idxs_tensor=positions, page_table=pages)
        attention = ttnn.transformer.paged_scaled_dot_product_attention_decode(
            q,
            *pools,
            page_table_tensor=pages,
            cur_pos_tensor=positions,
            scale=self.scale,
            program_config=self._attention(32),
            compute_kernel_config=self.precise,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )
        attention = ttnn.to_memory_config(attention, self._one_slot_a_core(slots))
        attention = ttnn.experimental.nlp_concat_heads_decode(
            attention, num_heads=self.heads, sub_core_grids=self._sub_core_grids(slots)
        )
        x = ttnn.add(x, self._reduce(self._matmul_narrow(attention, w.wo, l1), l1), memory_config=l1)
        h = self._norm(x, w.mlp_norm, l1)
        gate, up = self._matmul_narrow(h, w.w1, l1), self._matmul_narrow(h, w.w3, l1)
        h = ttnn.mul(gate, up, input_tensor_a_activations=[ttnn.UnaryOpType.SILU], memory_config=l1)
        return ttnn.add(x, self._reduce(self._matmul_narrow(h, w.w2, l1), l1), memory_config=l1)

    def _matmul_narrow(self, a: Any, b: Any, memory: Any = None) -> Any:
        return ttnn.linear(
            a, b, dtype=ttnn.bfloat16, memory_config=memory, compute_kernel_config=self.precise
        )

    def _attention(self, chunk: int) -> Any:
        return ttnn.SDPAProgramConfig(
            compute_with_storage_grid_size=self.grid,
            q_chunk_size=chunk,
            k_chunk_size=chunk,
            exp_approx_mode=False,
        )

    def _one_slot_a_core(self, slots: int) -> Any:
        """Return the memory config that decode's head ops want: slot s's [32, head_dim] tile rows on core s."""
        return ttnn.create_sharded_memory_config(
            (TILE, self.config.head_dim),
            core_grid=ttnn.num_cores_to_corerangeset(slots, self.grid, True),
            strategy=ttnn.ShardStrategy.HEIGHT,
            orientation=ttnn.ShardOrientation.ROW_MAJOR,
            use_height_and_width_as_shard_shape=True,
        )

    def _sub_core_grids(self, slots: int) -> Any:
        """Return what nlp_concat_heads_decode asks for when the slots' cores are not one rectangle, else None."""
        if slots <= self.grid.x or slots % self.grid.x == 0:
            return None
        return ttnn.num_cores_to_corerangeset(self.grid.x * self.grid.y, self.grid, True)

    def _rope_rows(self, table: Any, rows: Any, slots: int) -> Any:
        """Gather each slot's row of a cos or sin table: [1, slots, 1, head_dim], one slot a core."""
        gathered = ttnn.embedding(rows, table, layout=ttnn.TILE_LAYOUT)
        gathered = ttnn.transpose(ttnn.unsqueeze_to_4D(gathered), 1, 2)
        return ttnn.interleaved_to_sharded(gathered, self._one_slot_a_core(slots))

    # ---------------------------------------------------------------- both

    def _embed(self, ids: Any, rows: int, memory: Any = None) -> Any:
        columns = ttnn.embedding(ids, self.weights.embedding, layout=ttnn.TILE_LAYOUT)
        columns = ttnn.reshape(columns, ttnn.Shape([1, 1, rows, self.config.hidden_size // self.chips]))
        return self._gather(columns, memory)

    def _norm(self, x: Any, weight: Any, memory: Any = None) -> Any:
        return ttnn.rms_norm(x, epsilon=self.config.rms_norm_eps, weight=weight, memory_config=memory)

    def _head(self, x: Any) -> Any:
        logits = self._gather(self._matmul_narrow(self._norm(x, self.weights.norm), self.weights.lm_head))
        logits = ttnn.untilize(logits)
        vocab = self.config.vocab_size
        if logits.shape[-1] != vocab:
            logits = ttnn.slice(logits, [0, 0, 0, 0], [1, 1, logits.shape[-2], vocab])
        return logits

    def greedy(self, logits: Any) -> Any:
        """Return the best token of each row of `logits`: uint32 [1, 32], on the device, as decode's tokens are."""
        return ttnn.reshape(ttnn.argmax(logits, dim=3, keepdim=True), ttnn.Shape([1, ROWS]))

    def _gather(self, x: Any, memory: Any = None) -> Any:
        return x if self.chips == 1 else ttnn.all_gather(x, dim=3, cluster_axis=1, memory_config=memory)

    def _reduce(self, x: Any, memory: Any = None) -> Any:
        return x if self.chips == 1 else ttnn.all_reduce(x, cluster_axis=1, memory_config=memory)
