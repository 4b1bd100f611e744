"""What the allocator counts: python memory_probe.py prints one JSON object of bytes over all banks of a chip.

Runs on the real runtime and on the emulator; tests compare both with disagg_tt.plan. The second part, on the real runtime
alone, runs the longest prefill with no more memory than the plan reserves for it, and with three quarters of that.
"""

import json
import sys
from dataclasses import replace
from typing import Any

from disagg_tt.cache import PagedCache
from disagg_tt.config import LLAMA_3_1_8B, LlamaConfig
from disagg_tt.device import kind, ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh
from disagg_tt.model import weights
from disagg_tt.model.llama import Llama
from disagg_tt.plan import DRAM_BANKS, TILE_BYTES, Setup, prefill_map

# Few layers: equal ones add up. The odd one has a vocabulary, widths and heads that leave every bank unequal pages.
ODD = LlamaConfig(
    vocab_size=1003,
    hidden_size=192,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
)
EIGHT_B = replace(LLAMA_3_1_8B, num_hidden_layers=2)
SETUPS = {
    "odd": Setup(ODD, 2, "bfloat16", "bfloat16", slots=3, tokens=224),
    "8b": Setup(EIGHT_B, 2, "bfloat8_b", "bfloat8_b", slots=24, tokens=8192),
    "8b in small dtypes": Setup(EIGHT_B, 2, "bfloat4_b", "bfloat8_b", slots=1, tokens=4096),
}


def used(mesh: Any) -> int:
    if kind == "emulator":
        return DRAM_BANKS * int(mesh.memory.used[ttnn.BufferType.DRAM])
    view = ttnn.get_memory_view(mesh, ttnn.BufferType.DRAM)
    assert view.num_banks == DRAM_BANKS
    return DRAM_BANKS * int(view.total_bytes_allocated_per_bank)


def capacity(mesh: Any) -> int:
    if kind == "emulator":
        return DRAM_BANKS * int(mesh.memory.limit[ttnn.BufferType.DRAM])
    return DRAM_BANKS * int(ttnn.get_memory_view(mesh, ttnn.BufferType.DRAM).total_bytes_per_bank)


def probe(mesh: Any, setup: Setup) -> dict[str, int]:
    """Return what the weights, the model's tables and the cache take."""
    config, kv_dtype = setup.config, getattr(ttnn, setup.kv_dtype)
    steps = [used(mesh)]
    loaded = weights.allocate(config, mesh, getattr(ttnn, setup.weight_dtype))
    steps.append(used(mesh))
    model = Llama(mesh, config, loaded, setup.tokens, kv_dtype)
    steps.append(used(mesh))
    pages = setup.tokens // 32
    cache = PagedCache(mesh, config, setup.slots, pages, setup.slots * pages, kv_dtype)
    steps.append(used(mesh))
    del model, cache
    names = ("weights", "rope tables", "cache")
    return dict(zip(names, (b - a for a, b in zip(steps, steps[1:], strict=False)), strict=True))


def prefill_fits(mesh: Any, model: Llama, room: int) -> bool:
    """Whether a prefill of the model's longest prompt runs when only `room` bytes are free."""
    tiles = (capacity(mesh) - used(mesh) - room) // TILE_BYTES["bfloat16"] // DRAM_BANKS * DRAM_BANKS
    shape = ttnn.Shape([1, 1, 32 * tiles, 32])
    ballast = ttnn.allocate_tensor_on_device(
        shape, ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh, ttnn.DRAM_MEMORY_CONFIG
    )
    try:
        model.greedy(model.prefill([1] * model.max_seq_len, lambda layer, k, v: None))
        ttnn.synchronize_device(mesh)
    except RuntimeError as error:
        if "Out of Memory" not in str(error):
            raise
        return False
    finally:
        ttnn.deallocate(ballast)
    return True


def main() -> None:
    mesh = open_mesh((1, 2))
    found: dict[str, Any] = {"capacity": capacity(mesh)}
    for name, setup in SETUPS.items():
        found[name] = probe(mesh, setup)
    if kind == "mock":
        setup = SETUPS["8b"]
        loaded = weights.allocate(setup.config, mesh, getattr(ttnn, setup.weight_dtype))
        model = Llama(mesh, setup.config, loaded, setup.tokens, getattr(ttnn, setup.kv_dtype))
        model.prefill(
            [1] * setup.tokens, lambda layer, k, v: None
        )  # its programs are there when memory is counted
        reserve = prefill_map(setup).dram["activations"]
        found["prefill fits"] = {
            share: prefill_fits(mesh, model, int(reserve * share)) for share in (1.0, 0.75)
        }
    close_mesh(mesh)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
