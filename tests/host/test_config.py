"""LlamaConfig reads what transformers writes and refuses the rest; Options refuse a value by its flag."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import hf_config, tiny_config

from disagg_tt.config import (
    DEFAULT_PROMPT,
    LLAMA_3_1_8B,
    LlamaConfig,
    Options,
    RopeScaling,
    resolve_prompts,
)
from disagg_tt.errors import CheckpointError, InputError, PlanError

RAW = hf_config(tiny_config())


def test_a_config_saved_by_transformers_is_read_with_the_same_values(tmp_path: Path) -> None:
    from transformers import LlamaConfig as Reference

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    cases: list[dict[str, Any]] = [
        {},
        {"num_key_value_heads": 8, "rope_parameters": llama3, "eos_token_id": [5, 7]},
        {"head_dim": 64, "tie_word_embeddings": True, "bos_token_id": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ]
    for changes in cases:
        reference = Reference(**changes)
        reference.save_pretrained(tmp_path)
        config = LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "tie_word_embeddings",
            "max_position_embeddings",
            "bos_token_id",
        ):
            assert getattr(config, name) == getattr(reference, name), name
        rope: Any = reference.rope_parameters
        assert config.rope_theta == rope["rope_theta"]
        assert (config.rope_scaling.kind if config.rope_scaling else "default") == rope["rope_type"]
        assert config.eos_token_ids == tuple(changes.get("eos_token_id", [2]))


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    from transformers import LlamaConfig as Reference

    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig.from_hf({"model_type": "llama", **sizes})
    reference: Any = Reference(**sizes)
    for name in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "bos_token_id",
    ):
        assert getattr(config, name) == getattr(reference, name), name
    assert config.eos_token_ids == (reference.eos_token_id,)
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.rope_scaling is None


def test_the_published_config_of_llama_3_1_8b_is_the_constant() -> None:
    raw = {**hf_config(LLAMA_3_1_8B), "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    del raw["head_dim"]
    assert LlamaConfig.from_hf(raw) == LLAMA_3_1_8B
    assert LLAMA_3_1_8B.parameters == 8_030_261_248


def test_old_and_new_forms_of_rope_scaling_mean_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = LlamaConfig.from_hf({**RAW, "rope_theta": 5e5, "rope_scaling": scaling})
    new = {key: value for key, value in RAW.items() if key not in ("rope_theta", "rope_scaling")}
    assert old == LlamaConfig.from_hf({**new, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    linear = LlamaConfig.from_hf({**RAW, "rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling is not None and (linear.rope_scaling.kind, linear.rope_scaling.factor) == (
        "linear",
        2,
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": None, "architectures": None}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "4",
        ),
        ({"rope_scaling": "llama3"}, "llama3"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "inf"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -64}, "-64"),
        ({"hidden_size": "64"}, "'64'"),
        ({"hidden_size": True}, "True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "1024"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 66, "head_dim": None}, "66"),
        ({"head_dim": 33}, "33"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "</s>"),
    ],
)
def test_a_config_that_cannot_run_is_refused_with_the_value(changes: dict[str, object], word: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json|token") as error:
        LlamaConfig.from_hf({**RAW, **changes})
    assert word in str(error.value)
    assert error.value.exit_code == 2


def test_a_random_config_survives_the_way_through_config_json() -> None:
    seed = 11
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(50):
        kv_heads, head_dim = rng.choice([1, 2, 4]), rng.choice([32, 64, 128])
        heads = kv_heads * rng.randint(1, 8)
        config = tiny_config(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=32 * rng.randint(1, 8),
            vocab_size=rng.randint(1, 9999),
            rope_theta=rng.uniform(1, 1e6),
            tie_word_embeddings=rng.random() < 0.5,
            eos_token_ids=tuple(range(rng.randint(0, 3))),
            rope_scaling=rng.choice(
                [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)]
            ),
        )
        assert LlamaConfig.from_hf(json.loads(json.dumps(hf_config(config)))) == config


def test_a_mesh_must_divide_heads_and_tiles() -> None:
    for chips in (1, 2, 4, 8):
        LLAMA_3_1_8B.check_mesh(chips)
    tiny_config(vocab_size=321).check_mesh(2)
    for config, chips, word in (
        (LLAMA_3_1_8B, 16, "num_key_value_heads is 8"),
        (LLAMA_3_1_8B, 0, "0 chips"),
        (tiny_config(num_attention_heads=5, num_key_value_heads=1), 2, "num_attention_heads is 5"),
        (tiny_config(head_dim=48), 2, "head_dim is 48"),
        (tiny_config(hidden_size=96), 2, "multiples of 64"),
        (tiny_config(intermediate_size=160), 2, "intermediate_size is 160"),
        (tiny_config(num_attention_heads=66), 2, "num_attention_heads is 66"),
    ):
        with pytest.raises(PlanError) as error:
            config.check_mesh(chips)
        assert word in str(error.value)


def test_parameters_count_a_tied_embedding_once() -> None:
    config = tiny_config()
    assert config.parameters - replace(config, tie_word_embeddings=True).parameters == 320 * 64


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("kv_dtype", "float8"),
        ("weight_dtype", "int8"),
        ("overlap", "both"),
        ("batch", 0),
        ("batch", 33),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_seq_len", -1),
        ("threads", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("deadline_s", 0.0),
        ("deadline_s", float("nan")),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_flag_and_value(flag: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        Options(**{flag: value})  # type: ignore[arg-type]
    assert "--" + flag.replace("_", "-") in str(error.value)
    assert (repr(list(value)) if isinstance(value, tuple) else repr(value)) in str(error.value)
    assert "allowed" in str(error.value)


@pytest.mark.parametrize(
    "prompts", [(), (3,), ([],), ([{"role": "user"}],), ([{"role": 1, "content": "a"}],), (["a"],)]
)
def test_prompts_that_are_neither_text_nor_messages_are_refused(prompts: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        Options(prompts=prompts)  # type: ignore[arg-type]


def test_the_flag_wins_over_the_variable_and_the_variable_over_the_default() -> None:
    assert resolve_prompts(None, None, {}) == (DEFAULT_PROMPT,)
    assert resolve_prompts([], None, {"PROMPT": ""}) == (DEFAULT_PROMPT,)
    assert resolve_prompts(None, None, {"PROMPT": "From the variable"}) == ("From the variable",)
    assert resolve_prompts(["a", "b"], None, {"PROMPT": "c"}) == ("a", "b")
    assert resolve_prompts([""], None, {"PROMPT": "c"}) == ("",), (
        "an empty --prompt is an error later, not the default"
    )


def test_a_file_adds_to_the_flags_and_wins_over_the_variable(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\ufefffirst\r\n\n  \n sécond \n", encoding="utf-8")
    messages = [{"role": "user", "content": "Hi"}]
    jsonl.write_text(
        json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False)
        + "\n\n"
        + json.dumps({"messages": messages, "id": 3})
        + "\n",
        encoding="utf-8",
    )
    assert resolve_prompts(None, str(text), {"PROMPT": "c"}) == ("first", " sécond ")
    assert resolve_prompts(["flag"], str(jsonl), {}) == ("flag", "a\u2028b", messages)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"prompt": 3}',
        '{"prompt": []}',
        '{"messages": "Hi"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"prompt": "a", "messages": []}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        resolve_prompts(None, str(file), {})
    assert f"{file}, line 3" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_prompts_file_that_is_missing_empty_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("none.txt", "empty.txt", "binary.txt", ""):
        with pytest.raises(InputError) as error:
            resolve_prompts(None, str(tmp_path / name), {})
        assert str(tmp_path / name) in str(error.value)
