"""Proof by content: what the prompt said is in the answer, through two ranks; a damaged cache shows in the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from caches import read_pool, write_pool
from data import Case, capital_cases, chat_recall_case, fox_cases, recall_case
from runs import CHECKPOINT, here, prompts_file, seeded, two_ranks
from tokenizers import Tokenizer

from disagg_tt.core import TILE
from disagg_tt.device import ttnn
from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver


class Counting:
    """The checkpoint's tokenizer as data.py calls it."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


TOKENIZER = Counting()


def held_out(chat: bool, seed: int) -> list[Case]:
    """The fox (raw), capitals in wordings never seen, and facts told far back in the prompt."""
    rng = seeded(seed)
    recall = chat_recall_case if chat else recall_case
    cases = [] if chat else fox_cases(rng, [4, 500, 1500], TOKENIZER)
    for length in (0, 500):
        cases += rng.sample(capital_cases(rng, "chat" if chat else "raw", length, TOKENIZER), 2)
    for kind in ("name", "colour", "code"):
        cases += [recall(rng, kind, length, TOKENIZER) for length in (500, 1500)]
    return cases


@pytest.mark.parametrize(("kv_dtype", "form"), [("bfloat8_b", "raw"), ("bfloat16", "chat")])
def test_two_ranks_recall_what_the_prompt_said(kv_dtype, form, tmp_path):
    cases = held_out(form == "chat", seed=5)
    flags = [f"--{form}", "--kv-dtype", kv_dtype, "--max-new-tokens", "40"]
    answers = two_ranks(
        *flags, "--prompts-file", prompts_file(tmp_path, [case.prompt for case in cases])
    ).answers()
    assert [(a["text"], a["finish_reason"]) for a in answers] == [(case.answer, "stop") for case in cases]
    assert max(a["prompt_tokens"] for a in answers) > 1400


# ---------------------------------------------------------------- the same check fails when the cache is damaged


def page_of(case: Case) -> int:
    """The page of the prompt that holds the first digit of the code asked for."""
    before = case.prompt[: case.prompt.index(case.answer.strip(" ."))]
    return len(TOKENIZER.encode(before)) // TILE


def code_cases(count: int = 3, seed: int = 11) -> list[Case]:
    """Prompts of 20 codes in 500 tokens, whose code asked for is told once and not on the last two, partly filled pages."""
    rng, cases = seeded(seed), []
    while len(cases) < count:
        case = recall_case(rng, "code", 500, TOKENIZER)
        if (
            case.prompt.count(case.answer.strip(" .")) == 1
            and page_of(case) < len(TOKENIZER.encode(case.prompt)) // TILE - 2
        ):
            cases.append(case)
    return cases


def answers_with(
    damage: Callable[[torch.Tensor, torch.Tensor, int, int, int], None], cases: list[Case], monkeypatch
) -> list[str]:
    """The answers when each stream's end is followed by `damage(k, v, layer, page, other page)`, in place, in every layer.

    k and v are a layer's pools, [blocks, kv heads, 32, head_dim]; `page` holds the code and `other` does not.
    """
    finish = MeshSocketReceiver.finish

    def damaged(self: MeshSocketReceiver):
        metadata = finish(self)
        case = cases[metadata.request]
        pages = metadata.sequence_length // TILE
        page = page_of(case)
        rows = ttnn.to_torch(ttnn.get_device_tensors(self._row)[0])[0].tolist()
        for layer, pools in enumerate(self._cache.layers):
            k, v = map(read_pool, pools)
            damage(k, v, layer, rows[page], rows[(page + pages // 2) % (pages - 1)])
            for pool, values in zip(pools, (k, v), strict=True):
                write_pool(pool, values)
        return metadata

    monkeypatch.setattr(MeshSocketReceiver, "finish", damaged)
    return [a.text for a in here(prompts=tuple(c.prompt for c in cases), chat=False, one_process=True)]


def none(k, v, layer, page, other):
    pass


def page_lost(k, v, layer, page, other):
    k[page], v[page] = 0, 0


def page_overwritten(k, v, layer, page, other):
    k[page], v[page] = k[other], v[other]


def values_swapped(k, v, layer, page, other):
    v[[page, other]] = v[[other, page]]


def keys_swapped(k, v, layer, page, other):
    k[[page, other]] = k[[other, page]]


def values_of_one_layer_lost(k, v, layer, page, other):
    if layer == 1:
        v[:] = 0


def whole_pages_swapped(k, v, layer, page, other):
    for pool in (k, v):
        pool[[page, other]] = pool[[other, page]]


@pytest.mark.parametrize("damage", [none, whole_pages_swapped])
def test_an_undamaged_cache_answers_right(damage, monkeypatch):
    """K holds its position already, so two full pages that trade places in both K and V are no damage.

    Such a fault is looked for in the cache itself: test_cache_content.py.
    """
    cases = code_cases()
    assert answers_with(damage, cases, monkeypatch) == [case.answer for case in cases]


@pytest.mark.parametrize(
    "damage", [page_lost, page_overwritten, values_swapped, keys_swapped, values_of_one_layer_lost]
)
def test_a_damaged_cache_answers_wrong(damage, monkeypatch):
    cases = code_cases()
    answers = answers_with(damage, cases, monkeypatch)
    assert [a for a, case in zip(answers, cases, strict=True) if a == case.answer] == []
