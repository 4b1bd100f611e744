"""Helpers that tests and benchmarks share: small checkpoints with random weights, and a small tokenizer."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from disagg_tt.config import LlamaConfig

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? It is Paris.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語の文章です。",
    "😀😃 emoji 🇫🇷",
]


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of 2 layers that splits over 2 chips; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_ids": (4,),
    }
    return LlamaConfig(**{**fields, **changes})


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The config.json, as transformers 4 wrote it, that `LlamaConfig.from_hf` reads back as `config`."""
    raw = asdict(config)
    eos_ids, scaling = raw.pop("eos_token_ids"), raw.pop("rope_scaling")
    if scaling is not None:
        scaling["rope_type"] = scaling.pop("kind")
        if scaling["rope_type"] == "linear":
            scaling = {"rope_type": "linear", "factor": scaling["factor"]}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **raw,
        "rope_scaling": scaling,
        "eos_token_id": list(eos_ids) if len(eos_ids) != 1 else eos_ids[0],
    }


def random_checkpoint(
    path: Path,
    config: LlamaConfig,
    seed: int,
    shards: int = 1,
    tokenizer_from: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write config.json and random weights in safetensors, in several with an index if shards > 1, to `path`.

    Matrices are normal with deviation 1/sqrt(inputs), embeddings 1, norms near 1, so that activations keep
    their size through any number of layers. Equal arguments give equal files.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(config), indent=2))
    generator = torch.Generator().manual_seed(seed)
    shapes = list(config.weight_shapes())
    size = -(-len(shapes) // shards)
    weight_map = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        for name, shape in shapes[shard * size : (shard + 1) * size]:
            noise = torch.randn(shape, generator=generator)
            if len(shape) == 1:
                noise = 1 + 0.1 * noise
            elif "embed_tokens" not in name:
                noise *= shape[1] ** -0.5
            tensors[name] = noise.to(dtype)
            weight_map[name] = file
        save_file(tensors, path / file, metadata={"format": "pt"})
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if tokenizer_from is not None and (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, path / name)
    return path


def small_tokenizer(path: Path, vocab_size: int = 320, template: str | None = CHAT_TEMPLATE) -> Path:
    """Train a byte-level BPE tokenizer on a few sentences and write its two files into the folder `path`.

    Ids 0..4 are `SPECIAL`; BOS goes in front of raw text, as in Llama 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[4],
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
