"""The model's device calls, logged: prefill, K/V over a socket pair, decode, on two 1x2 meshes of this process.

python tests/ttnn_mock/logged_program.py FOLDER writes FOLDER/MODEL-KVDTYPE-STAGE.jsonl for each case of `CASES`. Which
device it runs on is DISAGG_TT_DEVICE's matter. Weights are allocated and stay undefined: only specs are compared, and the
emulator computes nothing from undefined values.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import LlamaConfig
from disagg_tt.core import whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.calls import log_calls
from disagg_tt.device.host import read, to_device
from disagg_tt.device.mesh import close_mesh
from disagg_tt.kv_stream.mesh_socket import socket_config
from disagg_tt.model import weights
from disagg_tt.model.llama import ROWS, DecodeInputs, Llama

MODELS = {
    "embedded": LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, bos_token_id=0, eos_token_ids=(1,),
    ),
    "8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, bos_token_id=0, eos_token_ids=(1,),
    ),
}  # fmt: skip
KV_DTYPES = ("bfloat8_b", "bfloat16")
PROMPTS = (1, 31, 100, 1000)
CHUNKS = ((0, 512), (512, 488), (96, 1))  # first token, tokens
SLOTS = (1, 3, 9, 32)
CASES = [
    f"{model}-{dtype}-{stage}"
    for model in MODELS
    for dtype in KV_DTYPES
    for stage in [
        *(f"prefill{n}" for n in PROMPTS),
        *(f"chunk{first}" for first, _ in CHUNKS),
        *(f"decode{n}" for n in SLOTS),
    ]
]


def prefill(model: Llama, cache: PagedCache, tokens: int, sockets: Any, direct: bool) -> None:
    """Prefill `tokens` tokens; each layer's K and V cross the socket into slot 0 of `cache`, the metadata follow."""
    sender, receiver = sockets
    send = ttnn.experimental.send_direct_async if direct else ttnn.experimental.send_async
    receive = ttnn.experimental.recv_direct_async if direct else ttnn.experimental.recv_async
    heads, dim = model.kv_heads, model.config.head_dim
    spec = ttnn.TensorSpec(ttnn.Shape([1, heads, whole_tiles(tokens), dim]), model.kv_dtype, ttnn.TILE_LAYOUT)
    staging = [ttnn.allocate_tensor_on_device(spec, cache.mesh) for _ in range(2)]
    blocks = list(range(-(-tokens // BLOCK)))
    cache.assign(0, blocks)
    row = cache.table_row(blocks)

    def on_layer(layer: int, k: Any, v: Any) -> None:
        for tensor, target in zip((k, v), staging, strict=True):
            send(tensor, sender)
            receive(target, receiver)
        cache.fill(layer, *staging, row)

    logits = model.prefill(list(range(tokens)), on_layer)
    read(model.greedy(logits), lambda: torch.zeros(1, ROWS, dtype=torch.int64))
    tile = to_device(model.mesh, torch.zeros(1, 1, 32, 32, dtype=torch.int64), ttnn.uint32, ttnn.TILE_LAYOUT)
    place = ttnn.TensorSpec(ttnn.Shape([1, 1, 32, 32]), ttnn.uint32, ttnn.TILE_LAYOUT)
    received = ttnn.allocate_tensor_on_device(place, cache.mesh)
    send(tile, sender)
    receive(received, receiver)
    read(received, lambda: torch.zeros(1, 1, 32, 32))


def chunk(model: Llama, cache: PagedCache, first: int, tokens: int) -> None:
    """Prefill `tokens` tokens from `first` on over what is in slot 0's blocks of `cache`, as a serving rank does."""
    blocks = list(range(-(-(first + tokens) // BLOCK)))
    logits = model.prefill_chunk(list(range(tokens)), first, cache, blocks, lambda layer, k, v: None)
    read(model.greedy(logits), lambda: torch.zeros(1, ROWS, dtype=torch.int64))


def decode(model: Llama, cache: PagedCache) -> None:
    """Make decode's inputs and run one step, its last slot free when there are several; read the greedy tokens."""
    slots = cache.slots
    inputs: DecodeInputs = model.decode_inputs(slots)
    positions = list(range(slots))
    if slots > 1:
        positions[-1] = -1
    model.set_decode_inputs(inputs, [5] * slots, positions)
    ttnn.copy(model.greedy(model.decode_step(inputs, cache)), inputs.tokens)
    read(inputs.tokens, lambda: torch.zeros(1, ROWS, dtype=torch.int64))


def undefined(mesh: Any, shape: list[int], dtype: Any, layout: Any) -> Any:
    """Return a device tensor to which nothing is written."""
    return ttnn.allocate_tensor_on_device(ttnn.Shape(shape), dtype, layout, mesh, ttnn.DRAM_MEMORY_CONFIG)


def run(folder: Path) -> None:
    weights.zeros = undefined
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    dispatch = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)  # what a mock cluster needs
    parent = ttnn.open_mesh_device(ttnn.MeshShape(2, 2), dispatch_core_config=dispatch)
    ours, theirs = (
        parent.create_submesh(ttnn.MeshShape(1, 2), ttnn.MeshCoordinate(row, 0)) for row in range(2)
    )
    sockets = ttnn.create_socket_pair(ours, theirs, socket_config(1, 2))
    for name, config in MODELS.items():
        dtype = weights.weight_dtype(config, None)
        meshes = {mesh: weights.allocate(config, mesh, dtype) for mesh in (ours, theirs)}
        for kv in KV_DTYPES:
            kv_dtype = getattr(ttnn, kv)
            models = [
                Llama(m, config, w, config.max_position_embeddings, kv_dtype) for m, w in meshes.items()
            ]
            blocks = config.max_position_embeddings // BLOCK
            for tokens in PROMPTS:
                with log_calls(ttnn, folder / f"{name}-{kv}-prefill{tokens}.jsonl"):
                    cache = PagedCache(theirs, config, 1, blocks, blocks, kv_dtype)
                    prefill(models[0], cache, tokens, sockets, direct=tokens != PROMPTS[1])
            for first, tokens in CHUNKS:
                with log_calls(ttnn, folder / f"{name}-{kv}-chunk{first}.jsonl"):
                    chunk(models[1], PagedCache(theirs, config, 1, blocks, blocks, kv_dtype), first, tokens)
            for slots in SLOTS:
                with log_calls(ttnn, folder / f"{name}-{kv}-decode{slots}.jsonl"):
                    decode(models[1], PagedCache(theirs, config, slots, 4, 4 * slots, kv_dtype))
    for mesh in (ours, theirs):
        ttnn.synchronize_device(mesh)
    close_mesh(parent)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
