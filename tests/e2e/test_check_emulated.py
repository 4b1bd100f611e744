"""disagg-tt check on the emulator: what somebody without ttnn gets."""

from __future__ import annotations

import re

from runs import cli


def test_the_checkpoint_in_the_package_is_accepted_at_a_batch_of_any_size():
    done = cli("check", "--batch", "9", "--max-seq-len", "200", "--kv-dtype", "bfloat16")
    assert (done.code, done.left) == (0, []), done.err
    assert "dry run on the emulator" in done.out
    assert re.findall(r"(?m)^ +(\d+) tokens", done.out) == ["1", "31", "128", "200"]
    assert re.findall(r"batch +(\d+) of +224 tokens", done.out) == ["1", "3", "9"]
    assert done.out.rstrip().endswith("accepted")


def test_a_model_too_large_to_be_computed_gets_its_map_and_is_told_so():
    done = cli("check", "--model", "llama-3.1-8b")
    assert done.code == 0, done.err
    assert "28 users of 8,192 tokens" in done.out
    assert "no dry run: the emulator computes every value" in done.out
