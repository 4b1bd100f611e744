"""disagg-tt check: Llama-3.1-8B's size accepted by the real runtime on two ranks, and plans that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import Result, cli

from disagg_tt.config import LLAMA_3_1_8B, MAX_BATCH
from disagg_tt.core import whole_tiles
from disagg_tt.plan import Setup, cache_tokens, most_slots, most_tokens
from tests.support import random_checkpoint, tiny_config

pytestmark = pytest.mark.xdist_group("check")  # one worker runs the 8B check, all cases read its output

LENGTHS = (1, 31, 128, 1000, 2048, 8192)
LARGEST = Setup(LLAMA_3_1_8B, 2, "bfloat8_b", "bfloat8_b", slots=MAX_BATCH, tokens=8192)


def check(*words: str, **env: str) -> Result:
    """Run `check` where no variable says which device to use."""
    unset = {"DISAGG_TT_DEVICE": "", "TT_METAL_MOCK_CLUSTER_DESC_PATH": ""}
    return cli("check", *words, **{**unset, **env})


@pytest.fixture(scope="module")
def eight_b() -> Result:
    done = check("--model", "llama-3.1-8b")
    assert done.code == 0, done.err[-4000:]
    return done


def rows(out: str, pattern: str) -> list[tuple[str, ...]]:
    return re.findall(rf"(?m)^ +{pattern} +[\d.]+ +([\d,]+)$", out)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_real_runtime_accepts_prefill_and_streaming_of_every_length(eight_b):
    found = {number(n): number(b) for n, _, b in rows(eight_b.out, r"([\d,]+) tokens(, median of 6)?")}
    c = LLAMA_3_1_8B
    a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 1088 // 1024
    assert found == {n: whole_tiles(n) * a_token + 2 * 4096 for n in LENGTHS}
    assert eight_b.out.rstrip().endswith("accepted")
    assert eight_b.left == []


def test_the_real_runtime_accepts_decode_of_every_batch_in_a_cache_that_fits(eight_b):
    found = [
        tuple(map(number, row)) for row in rows(eight_b.out, r"batch +(\d+) of +([\d,]+) tokens, median of 5")
    ]
    slots, tokens = most_slots(LARGEST), most_tokens(LARGEST)
    wanted = [(1, 8192), (3, 8192), (slots, 8192), (32, tokens)]
    assert found == [(batch, length, batch * length // 32) for batch, length in wanted]


def test_the_output_says_what_the_times_mean_and_how_much_fits(eight_b):
    assert "dry run on the real ttnn runtime with a mock cluster: no card is present" in eight_b.out
    room = f"room for {cache_tokens(LARGEST):,} cache tokens: {most_slots(LARGEST)} users of 8,192 tokens"
    assert room in eight_b.out
    for label in (
        "prefill and 64 sends",
        "2,048 tokens, median of 6",
        "decode step",
        "batch  1 of  8,192 tokens",
    ):
        assert label in eight_b.out
    assert re.search(r"^  layers +3,708\.7 +3,708\.7$", eight_b.out, re.MULTILINE)


def test_a_batch_whose_slots_cores_make_no_rectangle_is_accepted():
    """nlp_concat_heads_decode refuses 9 of 8 x 7 cores unless it is told which cores it may use."""
    done = check("--batch", "9", "--max-seq-len", "64")
    assert done.code == 0, done.err[-4000:]
    assert [row[0] for row in rows(done.out, r"batch +(\d+) of +64 tokens, median of 5")] == ["1", "3", "9"]


def test_a_folder_needs_no_weights(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "model", tiny_config(max_position_embeddings=256), seed=0)
    (folder / "model.safetensors").unlink()
    done = check("--model", str(folder), "--kv-dtype", "bfloat16", "--batch", "2")
    assert done.code == 0, done.err[-4000:]
    assert [number(row[0]) for row in rows(done.out, r"([\d,]+) tokens(, median of \d)?")] == [
        1,
        31,
        128,
        256,
    ]


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers_and_starts_nothing():
    done = check("--model", "llama-3.1-8b", "--batch", "32")
    done.refused(
        "32 slots of 8192 tokens",
        r"a decode chip needs 13,7\d\d,\d{3},\d{3} B of DRAM and has 12,872,318,208 B",
        f"--batch {most_slots(LARGEST)}",
        f"--max-seq-len {most_tokens(LARGEST)}",
    )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--max-seq-len", "4096"], ["--max-seq-len is 4096", "1 to 2048"]),
        (["--max-seq-len", "0"], ["--max-seq-len is 0"]),
        (["--batch", "33"], ["--batch is 33", "1 to 32"]),
        (["--kv-dtype", "float8"], ["--kv-dtype is 'float8'", "bfloat8_b, bfloat16"]),
        (["--weight-dtype", "int4"], ["--weight-dtype is 'int4'"]),
        (["--model", "no-such-model"], ["--model is 'no-such-model'"]),
        (["--rank-binding", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_a_wrong_flag_is_refused(flags, parts):
    check(*flags, "--map-only").refused(*parts)


def test_map_only_prints_the_map_and_runs_nothing():
    done = check("--model", "llama-3.1-8b", "--map-only", "--batch", "4")
    assert done.code == 0, done.err
    assert "4 slots of 8,192 tokens" in done.out
    assert "dry run" not in done.out


def test_what_the_runtime_rejects_is_told_with_the_place_and_ends_both_ranks(tmp_path: Path):
    """head_dim 96 splits and tiles, yet rotary_embedding_hf wants 32 or a multiple of 64."""
    config = tiny_config(head_dim=96, max_position_embeddings=64)
    folder = random_checkpoint(tmp_path / "model", config, seed=0)
    done = check("--model", str(folder), "--batch", "1")
    assert done.code != 0
    assert done.left == []
    assert re.search(r"disagg-tt: not accepted, \w+ rank \d: .*, in llama\.py:\d+: TT_FATAL", done.err), (
        done.err
    )
    assert "accepted" not in done.out
