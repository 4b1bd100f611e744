"""One decoder layer of Llama-3.1-8B's width on the emulator, against the same layer in plain float32 torch.

A layer's time is that of a model of three layers less that of a model of one, halved, on both sides: what comes before
and after the layers falls out. All layers share one layer's weights. Both sides compute with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from disagg_tt.bench.deep import DEVIATION, write_wide
from disagg_tt.bench.measure import in_turn
from disagg_tt.bench.table import Row
from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import LlamaConfig
from disagg_tt.core import whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint
from disagg_tt.model.llama import Llama

PREFILL = 512  # tokens
CONTEXT = 512  # tokens of each slot before the decode step
BATCHES = (32, 1)
DEPTHS = (1, 3)
GOAL = "<= 1.3"


class TorchLayer:
    """A Llama decoder layer written out in torch, float32, with weights of the right shapes: x [batch, tokens, hidden]."""

    def __init__(self, config: LlamaConfig):
        c = self.config = config
        generator = torch.Generator().manual_seed(0)
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def weight(out: int, into: int) -> torch.Tensor:
            return torch.empty(out, into).normal_(0.0, DEVIATION, generator=generator)

        self.q, self.k, self.v = (
            weight(q, c.hidden_size),
            weight(kv, c.hidden_size),
            weight(kv, c.hidden_size),
        )
        self.o = weight(c.hidden_size, q)
        self.gate, self.up = (weight(c.intermediate_size, c.hidden_size) for _ in range(2))
        self.down = weight(c.hidden_size, c.intermediate_size)
        self.norm = torch.ones(c.hidden_size)

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Prefill when there is no `cache`; else decode one token a row at the last position of K and V, which it writes.

        cos, sin: [tokens, head_dim]. cache: K and V, each [batch, kv_heads, positions, head_dim].
        """
        c, (batch, tokens, _) = self.config, x.shape
        h = functional.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps)
        q, k, v = (
            functional.linear(h, w).view(batch, tokens, -1, c.head_dim).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if cache is not None:
            for pool, new in zip(cache, (k, v), strict=True):
                pool[:, :, -1:] = new
            k, v = cache
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + functional.linear(attention.transpose(1, 2).reshape(batch, tokens, -1), self.o)
        h = functional.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps)
        h = functional.silu(functional.linear(h, self.gate)) * functional.linear(h, self.up)
        return x + functional.linear(h, self.down)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _torch_sides(config: LlamaConfig) -> dict[str, Callable[[int], float]]:
    """Return name -> function of a number of layers that returns the seconds they take in torch."""
    layer = TorchLayer(config)
    cos, sin = (torch.rand(PREFILL, config.head_dim) for _ in range(2))

    def prefill(depth: int) -> float:
        x = torch.randn(1, PREFILL, config.hidden_size)
        return _seconds(lambda: _repeat(layer, depth, x, cos, sin))

    def decode(batch: int) -> Callable[[int], float]:
        shape = (batch, config.num_key_value_heads, CONTEXT + 1, config.head_dim)
        cache = torch.randn(shape), torch.randn(shape)
        x = torch.randn(batch, 1, config.hidden_size)
        return lambda depth: _seconds(lambda: _repeat(layer, depth, x, cos[:1], sin[:1], cache))

    return {"prefill": prefill, **{f"decode {batch}": decode(batch) for batch in BATCHES}}


def _repeat(layer: TorchLayer, depth: int, x: torch.Tensor, *rest: Any) -> None:
    for _ in range(depth):
        x = layer(x, *rest)


def _our_sides(checkpoint: Checkpoint, mesh: Any) -> dict[str, Callable[[int], float]]:
    """The same on the mesh, with the weights of the checkpoint's only layer."""
    config, loaded = checkpoint.config, weights.load(checkpoint, mesh, ttnn.bfloat16)
    length = whole_tiles(CONTEXT + 1)
    llama = Llama(mesh, config, loaded, length, ttnn.bfloat16)

    def deepen(depth: int) -> None:
        llama.weights = replace(loaded, layers=loaded.layers * depth)

    def prefill(depth: int) -> float:
        deepen(depth)
        return _seconds(lambda: _done(mesh, lambda: llama.prefill([1] * PREFILL, lambda i, k, v: None)))

    def decode(batch: int) -> Callable[[int], float]:
        pages = length // BLOCK
        cache = PagedCache(mesh, config, batch, pages, batch * pages, ttnn.bfloat16)
        for slot in range(batch):
            cache.assign(slot, list(range(slot * pages, (slot + 1) * pages)))
        inputs, pools = llama.decode_inputs(batch), cache.layers

        def step(depth: int) -> float:
            deepen(depth)
            cache.layers = pools * depth
            llama.set_decode_inputs(inputs, [1] * batch, [CONTEXT] * batch)
            return _seconds(lambda: _done(mesh, lambda: llama.decode_step(inputs, cache)))

        return step

    return {"prefill": prefill, **{f"decode {batch}": decode(batch) for batch in BATCHES}}


def _done(mesh: Any, work: Callable[[], Any]) -> None:
    work()
    ttnn.synchronize_device(mesh)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def layer(folder: Path, threads: int, repeats: int) -> list[Row]:
    """Measure a layer on both sides, `repeats` times in turn; a checkpoint of 0.5 GB is written into `folder`."""
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(write_wide(folder, 1))
    with torch.no_grad():
        mesh = open_mesh((1, 2))
        try:
            ours = _our_sides(checkpoint, mesh)
            return [
                _row(name, ours[name], theirs, threads, repeats)
                for name, theirs in _torch_sides(checkpoint.config).items()
            ]
        finally:
            close_mesh(mesh)


def _row(
    name: str, ours: Callable[[int], float], theirs: Callable[[int], float], threads: int, repeats: int
) -> Row:
    few, many = DEPTHS

    def of_a_layer(side: Callable[[int], float]) -> Callable[[], list[float]]:
        return lambda: [(side(many) - side(few)) / (many - few) * 1e3]

    for depth in (*DEPTHS, *DEPTHS):  # warm-up
        ours(depth), theirs(depth)
    found = in_turn(repeats, {"ours": of_a_layer(ours), "torch": of_a_layer(theirs)})
    stage, _, batch = name.partition(" ")
    what = (
        f"prefill, {PREFILL} tokens" if stage == "prefill" else f"decode, batch {batch}, at {CONTEXT} tokens"
    )
    goal = "" if batch == "1" else GOAL
    return Row("layer of 8B width", f"{what}, {threads} threads", found["ours"], found["torch"], "ms", goal)
