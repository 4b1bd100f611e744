"""What clients of `disagg-tt serve` get is what one mesh answers, token for token, in every mode and from everybody at once."""

from __future__ import annotations

import asyncio
import time

import pytest
import verify_serving
from deployment import BOUND, MODEL
from runs import here

from disagg_tt.blocks import BLOCK

pytestmark = [pytest.mark.xdist_group("served"), pytest.mark.timeout(400)]

MODES = ("pd", "ppd", "auto")
NEW = 12
TEXTS = ["The capital of Peru is", "Mary's favourite colour is blue. " * 9 + "Mary's favourite colour is"]
CHATS = [
    [{"role": "user", "content": "What is the capital of Peru?"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def one_mesh():
    """A single mesh's answers to TEXTS and CHATS, greedy and sampled."""
    prompts = [*TEXTS, *CHATS]
    return {
        name: verify_serving.single_mesh(prompts, max_new_tokens=NEW, **options)
        for name, options in {"greedy": {}, "sampled": SAMPLED}.items()
    }


@pytest.fixture(params=MODES)
def mode(request, server):
    server.mode(request.param)
    yield request.param
    server.at_rest()


def ask(server, prompt, **options):
    """Complete a text, or answer a chat; return the text, the reason of its end, and the usage."""
    options = {"model": MODEL, "max_tokens": NEW, "temperature": 0, **options}
    if isinstance(prompt, str):
        response = server.openai.completions.create(prompt=prompt, **options)
        texts = [choice.text for choice in response.choices]
    else:
        response = server.openai.chat.completions.create(messages=prompt, **options)
        texts = [choice.message.content for choice in response.choices]
    return texts, [choice.finish_reason for choice in response.choices], response.usage


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_answers_are_those_of_one_mesh(server, mode, one_mesh, sampling):
    options = SAMPLED if sampling == "sampled" else {}
    for prompt, expected in zip([*TEXTS, *CHATS], one_mesh[sampling], strict=True):
        texts, reasons, usage = ask(server, prompt, **options)
        assert (texts, reasons) == ([expected.text], [expected.finish_reason])
        assert usage.completion_tokens == len(expected.tokens)
        assert usage.prompt_tokens == expected.prompt_tokens


def test_token_by_token_with_log_probabilities(server, mode, one_mesh, tokenizer):
    expected = one_mesh["greedy"][1]
    response = server.openai.completions.create(
        model=MODEL, prompt=TEXTS[1], max_tokens=NEW, temperature=0, logprobs=3
    )
    found = response.choices[0].logprobs
    shown = expected.tokens[: -1 if expected.finish_reason == "stop" else None]  # an EOS token is not text
    assert found.tokens == [tokenizer.token_text(token) for token in shown]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert max(top, key=top.get) == token and top[token] == logprob
        assert len(top) == 3 and sum(2.72**value for value in top.values()) <= 1.01


def test_the_trace_has_each_requests_time_budget_and_transfer(server, mode):
    response = server.http.post(
        "/v1/completions", json={"model": MODEL, "prompt": f"{mode} 1 2 3 4 5 6", "max_tokens": 4}
    )
    events = server.get("/trace")["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 0]
    mine = [e for e in spans if e["tid"] == spans[-1]["tid"]]
    budget = dict(part.split("=") for part in response.headers["x-time-budget"].split(","))
    assert [e["name"] for e in mine] == [*budget, "decode"]
    assert [round(e["dur"] / 1e3, 3) for e in mine[:-1]] == [max(float(ms), 0) for ms in budget.values()]
    assert mine[0]["args"]["route"] == response.headers["x-route"]
    sent = [e for e in events if e["ph"] == "X" and e["pid"] == 1 and e["tid"] == mine[0]["tid"]]
    assert len(sent) == (4 if response.headers["x-route"] == "pd" else 0)  # the checkpoint's layers


def test_an_answer_of_one_token_accounts_for_its_transfer(server):
    """Its answer is whole before its K and V have landed."""
    server.mode("pd")
    before = bytes_moved(server)
    response = server.openai.completions.create(model=MODEL, prompt="one token: 1 2 3 4", max_tokens=1)
    transfer = transfer_of(server, response)
    assert transfer["tokens"] == response.usage.prompt_tokens
    assert bytes_moved(server) - before == transfer["bytes"] > 0


def transfer_of(server, response):
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        for transfer in server.get("/state")["transfers"]:
            if transfer["request"] == f"{response.id}-0":
                return transfer
        time.sleep(0.02)
    raise AssertionError(f"the transfer of {response.id} is not shown")


def bytes_moved(server):
    lines = server.http.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith("disagg_tt:kv_bytes_transferred_total")
    )


def test_layers_are_in_the_decode_ranks_cache_while_the_next_are_computed(server):
    """Each layer's arrival is its own time, not that of the prompt. A busy machine may delay one prompt, not ten."""
    server.mode("pd")
    for number in range(10):
        prompt = f"layers {number}: " + "word " * 200
        response = server.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
        layers = transfer_of(server, response)["layers"]
        assert all(span["sent_ms"] < span["arrived_ms"] for span in layers)
        if layers[0]["arrived_ms"] < layers[-1]["sent_ms"]:
            return
    pytest.fail(f"no layer arrived before the last was sent: {layers}")


def test_several_choices_of_one_prompt(server, mode):
    options = {"temperature": 1.5, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    together, _, usage = ask(server, TEXTS[0], n=3, seed=11, **options)
    assert usage.completion_tokens == 3 * 6
    alone = [ask(server, TEXTS[0], seed=11 + choice, **options)[0][0] for choice in range(3)]
    assert together == alone and len(set(together)) > 1


def test_a_stop_string_ends_the_answer_and_frees_all(server, mode, one_mesh):
    text = one_mesh["greedy"][1].text
    stop = text[len(text) // 2 :][:3]
    texts, reasons, _ = ask(server, TEXTS[1], stop=[stop])
    assert texts == [text[: text.index(stop)]] and reasons == ["stop"]


@pytest.fixture(scope="module")
def first_turns(tokenizer):
    """For each mode, the tokens of a prompt of its own and of a single mesh's answer to it."""
    texts = [f"{mode}: " + "one two three four five six seven eight nine ten. " * 3 for mode in MODES]
    answers = here(prompts=(*texts,), chat=False, single_mesh=True, max_new_tokens=40, ignore_eos=True)
    return {m: (tokenizer.encode(t), a.tokens) for m, t, a in zip(MODES, texts, answers, strict=True)}


def test_what_is_cached_is_counted_to_the_token(server, mode, first_turns, tokenizer):
    """A second turn finds the whole blocks of the first one's prompt, and on the decode rank those of its answer."""

    def cached(tokens, new):
        response = server.openai.completions.create(
            model=MODEL, prompt=tokens, max_tokens=new, temperature=0, extra_body={"ignore_eos": True}
        )
        server.at_rest()
        return response.usage.prompt_tokens_details.cached_tokens

    prompt, answer = first_turns[mode]
    known = {c["id"]: c["turns"] for c in server.get("/conversations")["conversations"]}
    assert cached(prompt, len(answer)) == 0
    of_prompt = len(prompt) // BLOCK * BLOCK
    of_both = len(prompt + answer[:-1]) // BLOCK * BLOCK  # the last token was never fed
    assert 0 < of_prompt < of_both
    second = cached([*prompt, *answer, *tokenizer.encode(" And then?")], 5)
    # auto: nothing, where the first was computed on the decode rank and the second is on the prefill rank
    assert second in {"pd": (of_prompt,), "ppd": (of_both,), "auto": (0, of_prompt, of_both)}[mode]
    conversations = server.get("/conversations")["conversations"]
    assert [c["turns"] for c in conversations if c["id"] not in known] == [2]
    found = cached(prompt[:of_prompt], 1)
    assert found == of_prompt - BLOCK or (mode, found) == ("auto", 0)  # the last token is always computed


def test_conversations_at_once_with_cancellations_in_changing_modes(server, tokenizer):
    """examples/verify_serving.py, small."""
    seed = 7
    print(f"seed {seed}")
    run = verify_serving.Run(server.url, NEW, seed)
    asyncio.run(run.converse(8, 3))
    server.at_rest()
    answers = verify_serving.reference(run)
    counts, differing = verify_serving.compare(run, answers, tokenizer)
    assert counts["answers"] == 8 * 3 and counts["left"] > 0
    assert differing == []


def test_a_changed_answer_is_noticed(one_mesh, tokenizer):
    """The comparison of examples/verify_serving.py can fail."""
    expected = one_mesh["greedy"][1]
    usage = {"completion_tokens": len(expected.tokens), "prompt_tokens": expected.prompt_tokens}
    run = verify_serving.Run("", NEW, 0)
    for text in (expected.text, expected.text[:-1] + "~"):
        run.asked.append(verify_serving.Asked("", text, True, expected.finish_reason, usage))
    run.asked.append(verify_serving.Asked("", expected.text[:2] + "~", False))
    counts, differing = verify_serving.compare(run, [expected] * 3, tokenizer)
    assert [number for number, _ in differing] == [1, 2]
    assert len(expected.tokens) < counts["tokens_compared"] <= 2 * len(expected.tokens)
