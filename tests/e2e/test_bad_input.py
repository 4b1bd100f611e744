"""Wrong input, typed as a user would: one message with the value, what is allowed and the remedy, exit code 2, nobody left.

Where it matters, in the form that starts two ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from runs import CHECKPOINT, ROOT, Result, cli, run
from support import random_checkpoint, small_tokenizer, tiny_config

from disagg_tt.__main__ import main

Capture = pytest.CaptureFixture[str]

BINDING = ROOT / "rank_bindings" / "n300x2_1p1d.yaml"
MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe"]

# What no rank is needed to see.
AT_ONCE = {
    "kv dtype": (["--kv-dtype", "float8"], "--kv-dtype is 'float8', allowed are bfloat8_b, bfloat16"),
    "weight dtype": (["--weight-dtype", "int4"], "--weight-dtype is 'int4'"),
    "overlap": (["--overlap", "never"], "--overlap is 'never', allowed are inline, queue, after"),
    "no new tokens": (["--max-new-tokens", "0"], "--max-new-tokens is 0, allowed are whole numbers from 1"),
    "batch": (["--batch", "33"], "--batch is 33, allowed are whole numbers from 1 to 32"),
    "temperature": (["--temperature", "-1"], "--temperature is -1.0"),
    "top-p": (["--top-p", "nan"], "--top-p is nan"),
    "deadline": (["--deadline-s", "0"], "--deadline-s is 0"),
    "no deadline": (
        ["--deadline-s", "1e7"],
        "--deadline-s is 10000000.0, allowed are seconds above 0 up to 604800",
    ),
    "trace to nowhere": (
        ["--trace", "nowhere/run.json"],
        "--trace is 'nowhere/run.json', in a folder that is not there",
    ),
    "no prompts file": (["--prompts-file", "nowhere.txt"], "--prompts-file is 'nowhere.txt'"),
    "no binding": (["--rank-binding", "nowhere.yaml"], "rank binding nowhere.yaml: there is no such file"),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_wrong_values(name):
    flags, message = AT_ONCE[name]
    cli("generate", *flags).refused(message)


@pytest.mark.parametrize(
    "words",
    [[], ["fly"], ["generate", "--colour"], ["generate", "--batch", "many"], ["generate", "--chat", "--raw"]],
)
def test_words_that_are_no_command_line(words):
    result = cli(*words)
    assert (result.code, result.out, result.left) == (2, "", [])
    assert "usage: disagg-tt" in result.err
    assert "error: " in result.err
    assert "Traceback" not in result.err


TWO_RANKS = (
    "none",
    "truncated",
    "too long",
)  # which two ranks find; the rest is the same code in this process


def check_refused(name: str, message: str, capsys: Capture, *flags: str) -> None:
    if name in TWO_RANKS:
        result = cli("generate", *flags)
    else:
        code = main(["generate", "--single-mesh", *flags])
        result = Result(code, *capsys.readouterr(), [])
    result.refused(message)


def copied(folder: Path) -> Path:
    """A copy of the embedded checkpoint to damage."""
    return Path(shutil.copytree(CHECKPOINT, folder / "model"))


def truncated(folder: Path) -> Path:
    model = copied(folder)
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1000)
    return model


def with_config(folder: Path, **changes: object) -> Path:
    model = copied(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def missing_shard(folder: Path) -> Path:
    words = small_tokenizer(folder / "words")
    model = random_checkpoint(folder / "model", tiny_config(), 1, shards=3, tokenizer_from=words)
    (model / "model-00002-of-00003.safetensors").unlink()
    return model


MODELS = {
    "none": (lambda folder: folder / "nowhere", "--model is '.*nowhere': no such folder"),
    "empty": (lambda folder: folder, "has no config.json: give --model the folder"),
    "truncated": (truncated, "is truncated or damaged: it should be [0-9]+ bytes long, it is [0-9]+; fetch"),
    "mis-shaped": (
        lambda folder: with_config(folder, intermediate_size=1024),
        r"mlp.gate_proj.weight has shape \[768, 256\], config.json makes it \[1024, 256\]",
    ),
    "another architecture": (
        lambda folder: with_config(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "model_type is 'qwen2', allowed is 'llama'",
    ),
    "missing shard": (missing_shard, "lacks 1 of the 3 shards .*: model-00002-of-00003.safetensors"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_that_does_not_do(name, tmp_path, capsys):
    make, message = MODELS[name]
    check_refused(name, message, capsys, "--model", str(make(tmp_path)))


PROMPTS = {
    "empty": (["--prompt", ""], "prompt 1 of 1 is empty, allowed is text"),
    "blank, second": (["--prompt", "Hello", "--prompt", " \n"], "prompt 2 of 2 is empty"),
    "too long": (
        ["--raw", "--prompt", "1 " * 3000],
        "prompt 1 of 1 has [0-9]+ tokens, allowed are 1 to 2048; shorten",
    ),
    "longer than the limit": (["--max-seq-len", "10"], "has 24 tokens, allowed are 1 to 10"),
    "limit beyond the model": (
        ["--max-seq-len", "4096"],
        "--max-seq-len is 4096; .* is 2048, use at most that",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_does_not_do(name, capsys):
    flags, message = PROMPTS[name]
    check_refused(name, message, capsys, *flags)


def test_heads_that_do_not_divide_by_the_mesh(tmp_path):
    model = random_checkpoint(
        tmp_path / "model", tiny_config(), 1, tokenizer_from=small_tokenizer(tmp_path / "words")
    )
    binding = str(ROOT / "rank_bindings" / "1x4x2_1p1d.yaml")
    result = cli("generate", "--model", str(model), "--rank-binding", binding)
    result.refused("num_key_value_heads is 2, allowed on a mesh of 4 chips are multiples of 4")


def binding_with(folder: Path, *ranks: dict) -> str:
    document = yaml.safe_load(BINDING.read_text())
    document["rank_bindings"] = [
        {**entry, **rank} for entry, rank in zip(document["rank_bindings"], ranks, strict=False)
    ]
    document["mesh_graph_desc_path"] = str(ROOT / document["mesh_graph_desc_path"])
    (folder / "binding.yaml").write_text(yaml.safe_dump(document))
    return str(folder / "binding.yaml")


BINDINGS = {
    "one rank": (({},), "allowed: one prefill rank and at least one decode"),
    "double rank": (({}, {"rank": 0}), "rank 0 appears twice"),
    "missing rank": (({}, {"rank": 2}), r"the ranks are \[0, 2\]; allowed: \[0, 1\]"),
    "unknown mesh": (({}, {"mesh_id": 5}), r"rank 1 has mesh_id 5; allowed: .*\[0, 1\]"),
    "two prefill": (({}, {"env_overrides": {"DISAGG_TT_ROLE": "prefill"}}), "'prefill', rank 1 'prefill'"),
    "too many boards": (
        ({"env_overrides": {"DISAGG_TT_ROLE": "prefill", "TT_VISIBLE_DEVICES": "0,2,3"}}, {}),
        "rank 0 sees 3 PCIe device",
    ),
}


@pytest.mark.parametrize("name", BINDINGS)
def test_a_rank_binding_that_does_not_do(name, tmp_path):
    ranks, message = BINDINGS[name]
    cli("generate", "--rank-binding", binding_with(tmp_path, *ranks)).refused(message)


@pytest.mark.parametrize("count", [1, 3])
def test_mpirun_with_the_wrong_number_of_ranks(count):
    result = run([*MPIRUN, "-n", str(count), sys.executable, "-m", "disagg_tt", "generate"])
    assert (result.code, result.left) == (2, [])
    ranks = "1 rank" if count == 1 else f"{count} ranks"
    assert f"this job has {ranks}; one prefill and one decode rank are needed" in result.err
    assert "rank_bindings/n300x2_1p1d.yaml" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("differs", ["weights", "tokenizer"])
def test_a_checkpoint_that_differs_between_the_ranks(differs, tmp_path):
    """HF_MODEL of each rank, as env_overrides may set it."""
    other = copied(tmp_path)
    if differs == "weights":
        with (other / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    else:
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    ranks = [
        {"env_overrides": {"DISAGG_TT_ROLE": role, "HF_MODEL": str(model)}}
        for role, model in (("prefill", CHECKPOINT), ("decode", other))
    ]
    cli("generate", "--rank-binding", binding_with(tmp_path, *ranks)).refused(
        "the two ranks load different checkpoints or tokenizers", "give both the same --model"
    )


@pytest.mark.parametrize(("module", "extra"), [("fastapi", "serve"), ("prometheus_client", "serve")])
def test_a_command_without_its_extra_names_it(module, extra):
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from disagg_tt.__main__ import main; sys.exit(main(['serve', '--port', '0']))"
    )
    run([sys.executable, "-c", program]).refused(
        re.escape(f"{module} is not installed; pip install 'disagg_tt[{extra}]'")
    )
