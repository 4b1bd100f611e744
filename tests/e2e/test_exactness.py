"""The tokens of two ranks are those of one mesh, exactly; so are those of every other way to run the same thing.

A share of what examples/verify_exactness.py compares in full.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from forward import Ours
from runs import ROOT, here, prompts_file, tokens_here, two_ranks
from verify_exactness import prompts

from disagg_tt.model.checkpoint import find_checkpoint

SEED = 20
BINDINGS = ("1x1x2", "n300x2", "1x4x2", "2x2x2")


@functools.cache
def some_prompts(count: int = 8, longest: int = 800, chat: bool = False) -> tuple:
    print(f"seed {SEED}")
    entries = prompts(count, longest, chat, SEED)
    return tuple(entry.get("prompt") or entry["messages"] for entry in entries)


@pytest.mark.parametrize(
    ("kv_dtype", "batch", "way"),
    [
        ("bfloat8_b", 1, []),
        ("bfloat8_b", 32, ["--fifo"]),
        ("bfloat16", 32, ["--overlap", "queue"]),
        ("bfloat16", 1, ["--overlap", "after"]),
    ],
)
def test_two_ranks_equal_one_mesh_however_k_and_v_leave(kv_dtype, batch, way, tmp_path):
    texts = some_prompts(longest=1500)
    flags = ["--raw", "--ignore-eos", "--max-new-tokens", "12", "--kv-dtype", kv_dtype, "--batch", str(batch)]
    result = two_ranks(*flags, *way, "--prompts-file", prompts_file(tmp_path, texts))
    expected = here(
        prompts=texts,
        chat=False,
        ignore_eos=True,
        max_new_tokens=12,
        kv_dtype=kv_dtype,
        batch=batch,
        single_mesh=True,
    )
    assert result.tokens() == [answer.tokens for answer in expected]
    assert {len(tokens) for tokens in result.tokens()} == {12}
    assert [a["prompt_tokens"] for a in result.answers()] == [a.prompt_tokens for a in expected]
    assert len({tuple(tokens) for tokens in result.tokens()}) == len(texts)  # the prompts matter
    assert result.left == []


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of a few prompts, chats among them, on one mesh."""
    return tokens_here(
        prompts=some_prompts(6, 300, chat=True), max_new_tokens=16, ignore_eos=True, single_mesh=True
    )


@pytest.mark.parametrize("way", ["single_mesh", "one_process"])
def test_a_replayed_trace_equals_the_step_itself(way, expected):
    prompts = some_prompts(6, 300, chat=True)
    found = tokens_here(
        prompts=prompts, max_new_tokens=16, ignore_eos=True, enable_trace=True, batch=4, **{way: True}
    )
    assert found == expected


@pytest.mark.parametrize("overlap", ["inline", "queue", "after"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "fifo"])
def test_one_process_equals_one_mesh_however_k_and_v_leave(overlap, direct, expected):
    found = tokens_here(
        prompts=some_prompts(6, 300, chat=True),
        max_new_tokens=16,
        ignore_eos=True,
        one_process=True,
        overlap=overlap,
        direct=direct,
    )
    assert found == expected


@pytest.mark.parametrize("binding", [b for b in BINDINGS if b != "n300x2"])
def test_two_ranks_on_other_meshes_equal_one_such_mesh(binding, tmp_path):
    texts = [
        "What is the capital of France?",
        "What is the capital of Peru?",
        "My name is Bob. What is my name?",
    ]
    flags = [
        "--rank-binding",
        str(ROOT / f"rank_bindings/{binding}_1p1d.yaml"),
        "--prompts-file",
        prompts_file(tmp_path, texts),
    ]
    two = two_ranks(*flags).answers()
    one = here(prompts=tuple(texts), single_mesh=True, rank_binding=flags[1])
    assert [a["tokens"] for a in two] == [a.tokens for a in one]
    assert [a["text"] for a in two] == [
        "The capital of France is Paris.",
        "The capital of Peru is Lima.",
        "Your name is Bob.",
    ]


def test_one_process_on_one_chip_each_equals_one_chip():
    both = {
        "prompts": some_prompts(4, 100),
        "rank_binding": str(ROOT / "rank_bindings/1x1x2_1p1d.yaml"),
        "ignore_eos": True,
    }
    assert tokens_here(one_process=True, **both) == tokens_here(single_mesh=True, **both)


def test_sampling_depends_on_the_seed_alone(tmp_path):
    texts = some_prompts(3, 100)
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "max_new_tokens": 24}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    runs = {
        seed: tokens_here(prompts=texts, chat=False, seed=seed, single_mesh=True, **settings)
        for seed in (0, 1, 2)  # 0 is what is taken when none is given
    }
    for seed, tokens in runs.items():
        assert tokens == tokens_here(prompts=texts, chat=False, seed=seed, one_process=True, **settings)
    file = prompts_file(tmp_path, texts)
    assert two_ranks("--raw", "--prompts-file", file, *flags, "--seed", "2").tokens() == runs[2]
    greedy = tokens_here(prompts=texts, chat=False, max_new_tokens=24, single_mesh=True)
    assert len({str(tokens) for tokens in (*runs.values(), greedy)}) == 4


def test_prompts_in_one_batch_are_answered_as_each_alone():
    texts = some_prompts(8, 400, chat=True)
    together = here(prompts=texts, one_process=True)
    alone = [here(prompts=(text,), one_process=True)[0] for text in texts]
    assert [a.text for a in together] == [a.text for a in alone]


# Elsewhere a few in a million roundings may differ: the order of sums is the CPU's library's (docs/serving.md).
@pytest.mark.parametrize("kv_dtype", ["bfloat8_b", "bfloat16"])
def test_a_tokens_k_v_and_logits_are_the_same_bits_read_whole_in_chunks_or_one_at_a_time(kv_dtype):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    text = [rng.randrange(5, 2000) for _ in range(700)]
    cuts, begin, steps = (0, 96, 128, 416, 640, 700), 225, 130
    with Ours(find_checkpoint(None), kv_dtype, slots=4, longest=768) as ours:
        whole = ours.prefill(text, slot=0)
        in_chunks = [ours.chunk(text[a:b], a, slot=1) for a, b in itertools.pairwise(cuts)][-1]
        for slot, start in ((2, begin), (3, begin - 100)):  # of different length, in one batch
            ours.prefill(text[:start], slot=slot)
        one_at_a_time = ours.decode([text] * 4, [699 - steps, 699 - steps, begin, begin - 100], steps)
        known = ours.cached(0, 700)
        assert torch.equal(ours.cached(1, 700), known)
        assert torch.equal(ours.cached(2, begin + steps), known[..., : begin + steps, :])
        assert torch.equal(ours.cached(3, begin - 100 + steps), known[..., : begin - 100 + steps, :])
        assert torch.equal(in_chunks[-1], whole[-1])
        assert torch.equal(one_at_a_time[0], one_at_a_time[1])
        assert torch.equal(ours.prefill(text[: begin + steps])[-1], one_at_a_time[2, -1])


def test_more_prompts_than_slots_take_turns():
    texts = tuple(f"What is the capital of {c}?" for c in ("France", "Peru", "Japan", "Egypt", "Norway"))
    answers = here(prompts=texts, batch=2, one_process=True)
    cities = ("Paris", "Lima", "Tokyo", "Cairo", "Oslo")
    assert [a.text.rstrip(".").split()[-1] for a in answers] == list(cities)
