"""Any LlamaForCausalLM runs: small random checkpoints give transformers' logits; what cannot be split is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forward import Ours, Theirs, correlation
from runs import cli, seeded
from support import random_checkpoint, small_tokenizer, tiny_config

from disagg_tt.config import LlamaConfig, RopeScaling
from disagg_tt.errors import PlanError

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
LINEAR = RopeScaling("linear", 4.0)


def sizes(head_dim: int, heads: int, kv_heads: int, **changes) -> LlamaConfig:
    return tiny_config(head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, **changes)


CONFIGS = {
    "head_dim 32, GQA 1": sizes(32, 2, 2),
    "head_dim 64, GQA 2, tied": sizes(64, 4, 2, tie_word_embeddings=True, hidden_size=128),
    "head_dim 128, GQA 4, llama3": sizes(128, 8, 2, rope_scaling=LLAMA3, rope_theta=500000.0),
    "head_dim 32, GQA 8, linear": sizes(32, 16, 2, rope_scaling=LINEAR),
    "head_dim 64, GQA 3, tied, llama3": sizes(
        64, 6, 2, hidden_size=192, rope_scaling=LLAMA3, tie_word_embeddings=True
    ),
    "head_dim 128, GQA 6": sizes(128, 12, 2, hidden_size=192, intermediate_size=320),
    "vocabulary of 333": sizes(32, 4, 4, vocab_size=333),
    "vocabulary of 1001, tied": sizes(32, 4, 2, vocab_size=1001, tie_word_embeddings=True),
    "heads narrower than hidden": sizes(32, 4, 2, hidden_size=256, num_hidden_layers=3),
}


def compared(folder, config: LlamaConfig, kv_dtype: str, seed: int, chips: int = 2) -> tuple[float, float]:
    """Correlation with transformers of prefill's and of decode's logits: two texts of 150 and 180 tokens, 8 steps."""
    rng, steps, begin = seeded(seed), 8, [150, 180]
    texts = [[rng.randrange(config.vocab_size) for _ in range(b + steps)] for b in begin]
    theirs = Theirs(folder)
    expected = [theirs(text) for text in texts]
    with Ours(folder, kv_dtype, chips, slots=2, longest=256) as ours:
        prefilled = [
            ours.prefill(text[:b], slot) for slot, (text, b) in enumerate(zip(texts, begin, strict=True))
        ]
        decoded = ours.decode(texts, begin, steps)
    wanted = [e[b - len(p) : b] for e, b, p in zip(expected, begin, prefilled, strict=True)]
    after = torch.stack([e[b:] for e, b in zip(expected, begin, strict=True)])
    return correlation(torch.cat(prefilled), torch.cat(wanted)), correlation(decoded, after)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    config = CONFIGS[name]
    folder = random_checkpoint(tmp_path / "model", config, seed=1, dtype=torch.bfloat16)
    fits = compared(folder, config, "bfloat16", seed=2)
    print(name, fits)
    assert min(fits) >= 0.999


@pytest.mark.parametrize("chips", [1, 2, 4])
def test_chips_and_shards_change_nothing(chips, tmp_path):
    config = sizes(32, 8, 4, hidden_size=128)
    folder = random_checkpoint(tmp_path / "model", config, seed=3, shards=3, dtype=torch.bfloat16)
    assert min(compared(folder, config, "bfloat16", seed=4, chips=chips)) >= 0.999


def test_a_bfloat8_b_cache_costs_little(tmp_path):
    config = sizes(64, 4, 2, hidden_size=128)
    folder = random_checkpoint(tmp_path / "model", config, seed=5, dtype=torch.bfloat16)
    assert min(compared(folder, config, "bfloat8_b", seed=6)) >= 0.998


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_the_comparison_notices_a_missing_rope_scaling(scaling, tmp_path, monkeypatch):
    config = sizes(64, 4, 2, rope_scaling=scaling)
    folder = random_checkpoint(tmp_path / "model", config, seed=7, dtype=torch.bfloat16)
    assert min(compared(folder, config, "bfloat16", seed=8)) >= 0.999
    from disagg_tt.model import llama

    scaled = llama.cos_sin
    monkeypatch.setattr(llama, "cos_sin", lambda c, length: scaled(replace(c, rope_scaling=None), length))
    assert max(compared(folder, config, "bfloat16", seed=8)) < 0.99


REFUSED = {
    "kv heads": (
        sizes(32, 6, 3),
        "num_key_value_heads is 3, allowed on a mesh of 2 chips are multiples of 2",
    ),
    "heads": (sizes(32, 3, 3), "num_attention_heads is 3"),
    "head_dim": (sizes(48, 4, 2), "head_dim is 48, .* multiples of 32"),
    "hidden": (sizes(32, 4, 2, hidden_size=96), "hidden_size is 96, .* multiples of 64"),
    "ffn": (sizes(32, 4, 2, intermediate_size=100), "intermediate_size is 100, .* multiples of 64"),
    "too many heads": (sizes(32, 128, 2), "num_attention_heads is 128, .* are 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_size_that_cannot_be_split_is_refused(name, tmp_path):
    config, message = REFUSED[name]
    with pytest.raises(PlanError, match=message) as caught:
        Ours(random_checkpoint(tmp_path, config, seed=1), "bfloat16")
    assert caught.value.exit_code == 2


def test_two_ranks_run_a_sharded_random_checkpoint_as_one_mesh_does(tmp_path):
    config = sizes(128, 8, 2, vocab_size=333, rope_scaling=LLAMA3)
    folder = random_checkpoint(
        tmp_path / "model", config, 9, shards=3, tokenizer_from=small_tokenizer(tmp_path / "words")
    )
    flags = ["--model", str(folder), "--prompt", "What is the capital of France?", "--ignore-eos", "--json"]
    flags += ["--max-new-tokens", "24"]
    two, one = cli("generate", *flags), cli("generate", *flags, "--single-mesh")
    assert two.tokens() == one.tokens()
    assert len(set(two.tokens()[0])) > 5
