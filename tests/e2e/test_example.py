"""examples/prefill_decode.py, the program that tt-run starts on hardware, on the emulator."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from runs import CHECKPOINT, ROOT, Result, run

from disagg_tt.core import whole_tiles
from disagg_tt.model.checkpoint import load_config


def example(**env: str) -> Result:
    mpirun = Path(sys.executable).with_name("mpirun")
    script = str(ROOT / "examples" / "prefill_decode.py")
    return run([str(mpirun), "--oversubscribe", "-n", "2", sys.executable, script], **env)


@pytest.mark.parametrize(
    ("env", "answer"), [({}, "Paris"), ({"PROMPT": "What is the capital of Japan?"}, "Tokyo")]
)
def test_the_example_answers_and_both_ranks_log_the_same_bytes(env, answer):
    done = example(**env)
    assert (done.code, done.left) == (0, []), done.err
    assert answer in done.out
    (tokens,) = map(int, re.findall(r"prompt tokens +(\d+)", done.err))
    c = load_config(CHECKPOINT)
    a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 1088 // 1024
    on_the_wire = re.findall(r"K/V and metadata on the wire +([\d,]+) B", done.err)
    assert on_the_wire == [f"{whole_tiles(tokens) * a_token + 2 * 4096:,}"] * 2
