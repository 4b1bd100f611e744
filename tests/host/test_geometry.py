"""How much K and V a model makes, counted as papers count and as it travels."""

from __future__ import annotations

import json

import pytest

from disagg_tt.errors import InputError
from disagg_tt.geometry import GEOMETRIES, MIB, Geometry

LLAMA, DEEPSEEK = GEOMETRIES["llama-3.1-8b"], GEOMETRIES["deepseek-v3"]


@pytest.mark.parametrize(("tokens", "mib"), [(1024, 34.3), (163_840, 5490)])
def test_deepseek_v3_counted_at_one_byte_an_element(tokens, mib):
    assert DEEPSEEK.counted_bytes(tokens) == 61 * 576 * tokens
    assert DEEPSEEK.counted_bytes(tokens) / MIB == pytest.approx(mib, abs=0.05)


def test_deepseek_v3_travels_in_tiles_of_1088_bytes():
    assert DEEPSEEK.block_bytes == 18 * 1088
    assert DEEPSEEK.layer_bytes(1024) == 32 * 18 * 1088 == 626_688
    assert DEEPSEEK.total_bytes(1024) == 61 * 626_688


def test_llama_3_1_8b_is_128_kib_a_token_in_bfloat16():
    assert LLAMA.counted_bytes(1) == 128 * 1024
    assert LLAMA.total_bytes(1024) == LLAMA.counted_bytes(1024) == 1024 * 128 * 1024
    assert LLAMA.layer_bytes(1024) == 4 * MIB


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (31, 1), (32, 1), (33, 2), (1024, 32)])
def test_whole_blocks_travel_and_exact_tokens_are_counted(tokens, blocks):
    assert LLAMA.blocks(tokens) == blocks
    assert LLAMA.layer_bytes(tokens) == 2 * blocks * LLAMA.block_bytes == blocks * 32 * 2 * 8 * 128 * 2
    assert LLAMA.counted_bytes(tokens) == tokens * 128 * 1024


@pytest.mark.parametrize("tokens", [0, -1, (1 << 20) + 1])
def test_a_number_of_tokens_that_no_sequence_has(tokens):
    for count in (LLAMA.blocks, LLAMA.layer_bytes, LLAMA.counted_bytes):
        with pytest.raises(InputError, match=f"{tokens:,} tokens; allowed: 1 to 1,048,576"):
            count(tokens)


def test_one_from_json_text_or_a_file(tmp_path):
    text = json.dumps(
        {"layers": 2, "tensors": 2, "heads": 4, "head_dim": 64, "dtype": "bfloat8_b", "block": 64}
    )
    given = Geometry.named(text)
    assert given == Geometry("custom", 2, 2, 4, 64, "bfloat8_b", 64)
    assert given.block_bytes == 4 * 2 * 2 * 1088
    file = tmp_path / "mine.json"
    file.write_text(text)
    assert Geometry.named(str(file)) == given


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-9", "'gpt-9' is unknown; allowed: llama-3.1-8b, deepseek-v3, a JSON file"),
        ("{", "cannot be used"),
        ('{"layers": 2}', "cannot be used.*missing"),
        ('{"layers": 2, "tensors": 2, "heads": 4, "head_dim": 64, "dtype": "bfloat16", "size": 1}', "unexpected.*'size'"),
        ('{"layers": 0, "tensors": 2, "heads": 4, "head_dim": 64, "dtype": "bfloat16"}', "layers is 0; allowed: 1 to"),
        ('{"layers": true, "tensors": 2, "heads": 4, "head_dim": 64, "dtype": "bfloat16"}', "layers is True"),
        ('{"layers": 2, "tensors": 2, "heads": 4, "head_dim": 65, "dtype": "bfloat16"}', "head_dim is 65.*multiple of 32"),
        ('{"layers": 2, "tensors": 2, "heads": 4, "head_dim": 64, "dtype": "int3"}', "dtype is 'int3'; allowed: bfloat8_b"),
    ],
)  # fmt: skip
def test_a_geometry_that_is_none(name, message):
    with pytest.raises(InputError, match=message):
        Geometry.named(name)
