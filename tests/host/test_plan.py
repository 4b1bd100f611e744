"""The memory map is arithmetic: figures known from the real allocator, and limits that are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_tt.config import LLAMA_3_1_8B, LlamaConfig
from disagg_tt.errors import InputError, PlanError
from disagg_tt.plan import (
    DRAM_BYTES,
    Setup,
    cache_bytes,
    cache_tokens,
    decode_map,
    default_weight_dtype,
    fits,
    most_slots,
    most_tokens,
    plan,
    prefill_map,
    rows_bytes,
)

WEIGHTS = ("embedding", "layers", "lm_head", "norms")
EIGHT_B = Setup(LLAMA_3_1_8B, 2, "bfloat8_b", "bfloat8_b", slots=24, tokens=8192)
SMALL = LlamaConfig(
    vocab_size=500,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)


def weights(setup: Setup) -> int:
    return sum(decode_map(setup).dram[item] for item in WEIGHTS)


def test_the_8b_figures_are_those_of_the_real_allocator():
    assert weights(EIGHT_B) == 12 * 376_142_528
    assert decode_map(EIGHT_B).dram["rope tables"] == 12 * 701_952
    three = decode_map(replace(EIGHT_B, slots=3)).dram
    assert three["K/V cache"] + three["page table"] == 12 * 71_304_192


def test_a_users_cache_is_34816_bytes_a_token_but_for_whole_pages_a_bank():
    one, two = (cache_bytes(EIGHT_B, users * 256) for users in (9, 18))
    assert two - one == 9 * 8192 * 34_816
    assert 0 <= cache_bytes(EIGHT_B, 256) - 8192 * 34_816 < 64 * 12 * 1088


@pytest.mark.parametrize(
    ("changes", "gigabytes"),
    [({"weight_dtype": "bfloat8_b"}, 4.51), ({"weight_dtype": "bfloat16"}, 8.03), ({"chips": 4}, 2.26)],
)
def test_weights_take_what_was_measured(changes, gigabytes):
    assert weights(replace(EIGHT_B, **changes)) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_bfloat16_cache_takes_2048_bytes_where_bfloat8_b_takes_1088():
    wide = replace(EIGHT_B, kv_dtype="bfloat16")
    assert cache_bytes(wide, 300) * 1088 == cache_bytes(EIGHT_B, 300) * 2048


def test_32_slots_of_4096_tokens_fit_and_32_of_8192_do_not():
    assert all(chip.left > 0 for chip in plan(replace(EIGHT_B, slots=32, tokens=4096)))
    assert not fits(replace(EIGHT_B, slots=32))
    with pytest.raises(PlanError, match="a decode chip needs"):
        plan(replace(EIGHT_B, slots=32))


def test_the_error_gives_the_numbers_and_remedies_that_work_and_are_the_mildest():
    setup = replace(EIGHT_B, slots=32)
    chip = decode_map(setup)
    with pytest.raises(PlanError) as caught:
        plan(setup)
    message = str(caught.value)
    for number in (chip.used, DRAM_BYTES, -chip.left):
        assert f"{number:,} B" in message
    slots, tokens = most_slots(setup), most_tokens(setup)
    assert f"--batch {slots}, or --max-seq-len {tokens}" in message
    for value, step, name in ((slots, 1, "slots"), (tokens, 32, "tokens")):
        assert fits(replace(setup, **{name: value}))
        assert not fits(replace(setup, **{name: value + step}))


def test_a_cache_of_bfloat16_that_does_not_fit_is_answered_with_bfloat8_b():
    setup = replace(EIGHT_B, kv_dtype="bfloat16", slots=20)
    assert fits(replace(setup, kv_dtype="bfloat8_b"))
    with pytest.raises(PlanError, match="--kv-dtype bfloat8_b"):
        plan(setup)


def test_a_model_too_large_for_any_cache_has_no_remedy_but_chips():
    huge = replace(LLAMA_3_1_8B, num_hidden_layers=320)
    with pytest.raises(
        PlanError, match=r"a prefill chip needs .* use a mesh of more chips or a smaller model"
    ):
        plan(Setup(huge, 2, "bfloat8_b", "bfloat8_b", 1, 32))


def test_cache_tokens_fill_what_is_left_to_the_last_block():
    tokens = cache_tokens(EIGHT_B)
    chip = decode_map(EIGHT_B)
    room = chip.left + chip.dram["K/V cache"]
    assert cache_bytes(EIGHT_B, tokens // 32) <= room < cache_bytes(EIGHT_B, tokens // 32 + 1)


def test_only_the_decode_chip_has_a_cache_and_a_fifo_and_only_late_sends_keep_a_prompt():
    prefill, decode = prefill_map(EIGHT_B), decode_map(EIGHT_B)
    assert "K/V cache" not in prefill.dram
    assert decode.l1_socket - prefill.l1_socket == 8192
    for overlap in ("queue", "after"):
        late = prefill_map(replace(EIGHT_B, overlap=overlap))
        assert late.used - prefill.used == cache_bytes(EIGHT_B, 256)


def test_weights_are_bfloat16_below_a_billion_parameters():
    assert (default_weight_dtype(SMALL), default_weight_dtype(LLAMA_3_1_8B)) == ("bfloat16", "bfloat8_b")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slots": 33}, InputError, "--batch is 33"),
        ({"slots": 0}, InputError, "--batch is 0"),
        ({"kv_dtype": "float8"}, InputError, "--kv-dtype is 'float8'"),
        ({"weight_dtype": "int8"}, InputError, "--weight-dtype is 'int8'"),
        ({"tokens": 100}, InputError, "multiples of 32"),
        ({"chips": 3}, PlanError, "3 chips"),
    ],
)
def test_what_no_plan_can_have_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        replace(EIGHT_B, **changes)


@pytest.mark.parametrize("tokens", [32, 224, 2048, 8192])
@pytest.mark.parametrize("kv_dtype", ["bfloat8_b", "bfloat16"])
def test_most_slots_is_where_decode_stops_to_fit(tokens, kv_dtype):
    setup = replace(EIGHT_B, tokens=tokens, kv_dtype=kv_dtype)
    room = decode_map(setup)
    most = most_slots(setup)
    pages = [rows_bytes(n, tokens // 32 * 4) for n in (setup.slots, most, most + 1)]
    free = room.left + room.dram["K/V cache"] + pages[0]
    taken = [
        cache_bytes(setup, n * tokens // 32) + rows
        for n, rows in zip((most, most + 1), pages[1:], strict=True)
    ]
    assert taken[0] <= free < taken[1]
