"""Models of Llama-3.1-8B's width with random weights: as a checkpoint, and as a rank that repeats one layer.

A layer of that width has 218 million weights, 0.9 GB in each rank of the emulator, so eight of them would need 14 GB. A
rank started as `python -m disagg_tt.bench.deep` with LAYERS_VARIABLE set computes and streams that many layers that
share the weights of the checkpoint's only one: the arithmetic and the traffic of the deep model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from disagg_tt.config import LLAMA_3_1_8B, LlamaConfig, Options
from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.watchdog import Watchdog

LAYERS_VARIABLE = "DISAGG_TT_BENCH_LAYERS"
DEVIATION = 0.02  # of a weight, as Llama's own initialisation


def wide_config(layers: int, vocab_size: int) -> LlamaConfig:
    """Return Llama-3.1-8B's config with fewer layers, a small tied vocabulary and short positions."""
    return replace(
        LLAMA_3_1_8B,
        num_hidden_layers=layers,
        vocab_size=vocab_size,
        rope_scaling=None,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(1,),
    )


def write_wide(folder: Path, layers: int, seed: int = 0) -> Path:
    """Write a checkpoint of `layers` random layers of 8B width, bfloat16, with the packaged tokenizer, into `folder`."""
    import torch
    from safetensors.torch import save_file

    embedded = find_checkpoint(None)
    vocab_size = json.loads((embedded / "config.json").read_text())["vocab_size"]
    config = wide_config(layers, vocab_size)
    generator = torch.Generator().manual_seed(seed)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, DEVIATION, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight(shape) for name, shape in config.weight_shapes()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = asdict(config)
    sizes["eos_token_id"] = list(sizes.pop("eos_token_ids"))
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps({**about, **sizes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder / name)
    return folder


def repeat_layer(layers: int) -> None:
    """From now on, runs of this process have `layers` layers, all of them the checkpoint's first."""
    from disagg_tt import run

    class DeepRun(run.Run):
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            shared = model.weights.layers[:1] * layers
            model.weights = replace(model.weights, layers=shared)
            return model

    read = run.read_run

    def read_deep_run(options: Options, emit: run.Emit, watchdog: Watchdog) -> run.Run:
        deep = DeepRun(**vars(read(options, emit, watchdog)))
        deep.config = replace(deep.config, num_hidden_layers=layers)
        return deep

    # `disagg_tt` reads its run in one place: replaced there, all else is the program as it is
    run.read_run = read_deep_run


def main() -> int:
    """Be a rank of `disagg-tt` with one layer repeated."""
    from disagg_tt.__main__ import main as program

    repeat_layer(int(os.environ[LAYERS_VARIABLE]))
    return program()


if __name__ == "__main__":
    sys.exit(main())
