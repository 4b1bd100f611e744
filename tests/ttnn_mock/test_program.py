"""The whole program on the real runtime with a mock cluster of two N300: two ranks under tt-run, and in one process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import CHECKPOINT, ROOT, Result, cli, run

from disagg_tt.core import whole_tiles
from disagg_tt.device import mock
from disagg_tt.model.checkpoint import load_config

CONFIG = load_config(CHECKPOINT)
BYTES_A_TILE = {"bfloat8_b": 1088, "bfloat16": 2048}
METADATA = 2 * 4096  # one uint32 tile from each chip
SCRIPTED = "values read back from the device are garbage and replaced by scripted ones"

Generate = Callable[..., Result]


def wire_bytes(tokens: int, kv_dtype: str = "bfloat8_b") -> int:
    values = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * whole_tiles(tokens)
    return values * BYTES_A_TILE[kv_dtype] // 1024 + METADATA


@pytest.fixture
def generate(mock_environment: dict[str, str]) -> Generate:
    """Run `disagg-tt generate` with these flags on the mock cluster."""
    return lambda *flags: cli("generate", *flags, DISAGG_TT_DEVICE="ttnn", **mock_environment)


def perf_bytes(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"K/V and metadata on the wire +([\d,]+) B", text)]


def test_two_ranks_answer_under_tt_run_and_say_that_values_are_scripted(generate):
    done = generate("--prompt", "Hello", "--raw", "--max-new-tokens", "6", "--ignore-eos")
    assert (done.code, done.left) == (0, [])
    for role in ("prefill 0", "decode 1"):
        assert f"[{role}] mock cluster: {SCRIPTED}" in done.err
        assert f"[{role}] device layer: mock" in done.err
    assert perf_bytes(done.err) == [wire_bytes(1)]


@pytest.mark.parametrize(
    ("flags", "kv_dtype"),
    [
        (["--overlap", "inline"], "bfloat8_b"),
        (["--overlap", "after", "--kv-dtype", "bfloat16"], "bfloat16"),
        (["--overlap", "inline", "--fifo"], "bfloat8_b"),
    ],
)
def test_each_way_of_streaming_puts_exactly_the_prompts_whole_tiles_on_the_wire(generate, flags, kv_dtype):
    prompts = ["--prompt", "one", "--prompt", "word " * 40, "--prompt", "long " * 400]
    answers = generate("--json", "--max-new-tokens", "5", "--ignore-eos", *prompts, *flags).answers()
    assert len({whole_tiles(answer["prompt_tokens"]) for answer in answers}) == 3
    for answer in answers:
        wanted = wire_bytes(answer["prompt_tokens"], kv_dtype)
        assert (answer["perf"]["kv_bytes"], answer["perf"]["kv_bytes_sent"]) == (wanted, wanted)
        assert len(answer["tokens"]) == 5
        assert answer["finish_reason"] == "length"


def test_a_second_command_queue_is_refused_before_anything_starts(generate):
    generate("--overlap", "queue").refused("--overlap queue", "use inline or after")


@pytest.mark.parametrize("flag", ["--one-process", "--single-mesh"])
def test_one_process_runs_the_same_calls_without_mpi(generate, flag):
    prompts = ["--prompt", "one", "--prompt", "word " * 40]
    done = generate("--json", flag, "--max-new-tokens", "4", "--ignore-eos", *prompts)
    answers = done.answers()
    assert [len(answer["tokens"]) for answer in answers] == [4, 4]
    assert SCRIPTED in done.err
    for answer in answers:
        streamed = wire_bytes(answer["prompt_tokens"]) if flag == "--one-process" else None
        assert answer["perf"].get("kv_bytes") == streamed


def test_weights_are_read_from_the_cache_at_the_second_start(generate, tmp_path):
    flags = ("--prompt", "one", "--max-new-tokens", "2", "--ignore-eos", "--weight-cache", str(tmp_path))
    for most in (4 * 7 + 3, 0):  # the checkpoint's tensors, of which both ranks may write any first
        done = generate(*flags)
        assert (done.code, done.left) == (0, []), done.err
        converted = [int(n) for n in re.findall(r"(\d+) tensors converted", done.err)]
        assert len(converted) == 2 and max(converted) <= most
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 4 * 7 + 3


def test_the_example_runs_under_tt_run(mock_environment, tmp_path):
    mapping = mock.write_rank_mapping(tmp_path)
    programs = Path(sys.executable).parent  # tt-run looks for mpirun on the PATH
    command = [
        str(programs / "tt-run"),
        *("--rank-binding", str(ROOT / "rank_bindings" / "n300x2_1p1d.yaml")),
        *("--mock-cluster-rank-binding", str(mapping)),
        *("--mpi-args", "--oversubscribe"),
        *(sys.executable, str(ROOT / "examples" / "prefill_decode.py")),
    ]
    # tt-run looks for the descriptor, which the binding names by a relative path, from the folder that it starts in.
    done = run(
        ["env", "-C", str(ROOT), *command],
        DISAGG_TT_DEVICE="ttnn",
        PROMPT="What is the capital of Japan?",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        **mock_environment,
    )
    assert (done.code, done.left) == (0, []), done.err
    (tokens,) = map(int, re.findall(r"prompt tokens +(\d+)", done.err))
    assert perf_bytes(done.err) == [wire_bytes(tokens)] * 2
    assert done.err.count(SCRIPTED) == 2


def test_under_tt_run_alone_the_ranks_find_ttnns_own_files(mock_environment, tmp_path):
    """tt-run names the folder that it is called from as ttnn's root. The wheel's has all but the compiler."""
    mapping = mock.write_rank_mapping(tmp_path)
    programs = Path(sys.executable).parent
    unset = {"TT_METAL_RUNTIME_ROOT", "TT_METAL_HOME"}
    done = run(
        [
            *("env", "-C", str(ROOT), *(f"--unset={name}" for name in unset), str(programs / "tt-run")),
            *("--rank-binding", str(ROOT / "rank_bindings" / "n300x2_1p1d.yaml")),
            *("--mock-cluster-rank-binding", str(mapping)),
            *("--mpi-args", "--oversubscribe"),
            *(sys.executable, str(ROOT / "examples" / "prefill_decode.py")),
        ],
        DISAGG_TT_DEVICE="ttnn",
        PROMPT="What is the capital of Japan?",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        **{name: value for name, value in mock_environment.items() if name not in unset},
    )
    assert done.code == 0 or "sfpi not found" in done.err, done.err
