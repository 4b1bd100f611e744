"""Deployments of several prefill and decode ranks, and of one mesh: every pair of ranks serves, conversations stay put."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from deployment import MODEL, served
from runs import ROOT, here

pytestmark = pytest.mark.timeout(600)

NEW = 8
ROUNDS = 12  # of four questions at once, in which every pair of ranks must have its turn
COUNTRIES = ["Peru", "France", "Japan", "Kenya"]
BINDINGS = {"n300x3_2p1d": (2, 1), "n300x3_1p2d": (1, 2), "n300x4_2p2d": (2, 2)}


def prompt(country, number):
    return f"{number}. The capital of {country} is"


@pytest.fixture(scope="module")
def expected():
    """A single mesh's answers to all that is asked here."""
    prompts = [prompt(country, number) for number in range(ROUNDS) for country in COUNTRIES]
    answers = here(
        prompts=(*prompts,), chat=False, single_mesh=True, max_new_tokens=NEW, ignore_eos=True, batch=32
    )
    return {asked: answer.text for asked, answer in zip(prompts, answers, strict=True)}


def ask(server, text, **extra):
    """Return the answer's text and its route."""
    response = server.openai.completions.with_raw_response.create(
        model=MODEL, prompt=text, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True, **extra}
    )
    return response.parse().choices[0].text, response.headers["x-route"]


@pytest.mark.parametrize("binding", BINDINGS)
def test_every_prefill_rank_serves_every_decode_rank(binding, expected):
    prefill, decode = BINDINGS[binding]
    pairs = {
        (f"prefill-{p}", f"decode-{d}") for p in range(prefill) for d in range(prefill, prefill + decode)
    }
    path = str(ROOT / f"rank_bindings/{binding}.yaml")
    with served("--rank-binding", path, "--mode", "pd", prefill=prefill, decode=decode) as server:
        seen = set()
        with ThreadPoolExecutor(len(COUNTRIES)) as pool:
            for number in range(ROUNDS):
                prompts = [prompt(country, number) for country in COUNTRIES]
                for text, (answer, route) in zip(
                    prompts, pool.map(lambda p: ask(server, p), prompts), strict=True
                ):
                    assert (answer, route) == (expected[text], "pd")
                server.at_rest()
                seen |= {(t["source"], t["target"]) for t in server.get("/state")["transfers"]}
                if seen == pairs:
                    break
        assert seen == pairs

        server.mode("ppd")
        history, ranks = "A long story. " * 12, []
        for _ in range(3):
            answer, _ = ask(server, history, conversation_id="mine")
            history += answer + " And then?"
            server.at_rest()
            ranks += [
                c["decode_worker"] for c in server.get("/conversations")["conversations"] if c["id"] == "mine"
            ]
        assert len(ranks) == 3 and len(set(ranks)) == 1
    assert "Traceback" not in server.log.text


def budget(server, prompt):
    """The parts of an answer's time to its first token, ms."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
    header = server.http.post("/v1/completions", json=body).headers["x-time-budget"]
    return {name: float(ms) for name, ms in (part.split("=") for part in header.split(","))}


def test_one_mesh_serves_alone(expected):
    with served("--rank-binding", str(ROOT / "rank_bindings/n300x1_1d.yaml"), prefill=0, decode=1) as server:
        assert server.health()["status"] == "ok"
        for country in COUNTRIES:
            assert ask(server, prompt(country, 0)) == (expected[prompt(country, 0)], "local")
        server.at_rest()
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            words = [f"{n} is a number. " * 40 for n in range(4)]
            budgets = list(pool.map(lambda text: budget(server, text), words))
        elapsed_ms = (time.monotonic() - began) * 1e3
        # one rank computes one prompt at a time: what waits for its turn is no prefill
        assert 0 < sum(parts["prefill"] for parts in budgets) <= elapsed_ms
    assert re.search(r"local \(no prefill rank", server.log.text)
