"""Requests of any content: either what the server can do, or a refusal in OpenAI's words; never anything else."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_tt.config import check_sampling
from disagg_tt.serving.api import ChatRequest, CompletionRequest, parse
from disagg_tt.serving.completions import SEED_END
from disagg_tt.serving.protocol import Wanted
from disagg_tt.serving.refusal import Refusal

seeded = settings(derandomize=True, database=None, deadline=None, max_examples=400)
KINDS = st.sampled_from([CompletionRequest, ChatRequest])
NAMES = sorted(
    {
        *CompletionRequest.model_fields,
        *ChatRequest.model_fields,
        *ChatRequest.without,
        *CompletionRequest.without,
    }
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "assistant", "none", "auto"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*NAMES, "role", "content", "type", "text"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
TEXT = st.text(min_size=1, max_size=4)
TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=3)
NEEDED = {
    CompletionRequest: {
        "model": st.just("m"),
        "prompt": TEXT | st.lists(TEXT, min_size=1) | TOKENS | st.lists(TOKENS, min_size=1),
    },
    ChatRequest: {
        "model": st.just("m"),
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["system", "developer", "user", "assistant"]),
                    "content": TEXT
                    | st.lists(
                        st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), min_size=1, max_size=2
                    ),
                },
                optional={"name": st.none(), "refusal": st.none()},
            ),
            min_size=1,
            max_size=3,
        ),
    },
}
PLAUSIBLE = {
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.sampled_from([0, 1, 99, 2**24]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 128),
    "stop": TEXT | st.lists(TEXT, max_size=4),
    "stream": st.booleans(),
    "max_tokens": st.integers(1, 9999),
    "ignore_eos": st.booleans(),
    "conversation_id": TEXT,
    "user": st.text(max_size=3),
    "presence_penalty": st.sampled_from([0, 0.0, None]),
    "logit_bias": st.sampled_from([{}, None]),
}


@st.composite
def requests(draw):
    """A kind and fields that are mostly right, one of them perhaps replaced by, or joined by, anything at all."""
    kind = draw(KINDS)
    fields = draw(st.fixed_dictionaries(NEEDED[kind], optional=PLAUSIBLE))
    if draw(st.booleans()):
        fields[draw(st.sampled_from(NAMES))] = draw(VALUES)
    return kind, fields


def outcome(kind, body):
    """The request, or None where it is refused, with a refusal that is fit to be sent."""
    try:
        return parse(kind, body)
    except Refusal as raised:
        refusal = raised
    assert refusal.status == 400
    sent = json.loads(refusal.response().body)["error"]
    assert set(sent) == {"message", "type", "param", "code"} and sent["type"] == "invalid_request_error"
    assert sent["message"] and len(sent["message"]) < 1000
    return None


@given(KINDS, st.binary(max_size=60))
@seeded
def test_any_bytes_are_refused(kind, body):
    assert outcome(kind, body) is None


def test_any_object_is_a_request_within_its_bounds_or_refused():
    taken = []

    @given(requests())
    @seeded
    def check(drawn):
        kind, fields = drawn
        request = outcome(kind, json.dumps(fields).encode())
        if request is None:
            return
        taken.append(kind)
        seed = (request.seed or 0) % SEED_END
        check_sampling(request.temperature, request.top_p, request.top_k, seed)
        sampled = {"top_p": float(request.top_p), "top_k": request.top_k, "seed": seed, "logprobs": None}
        Wanted(number=1, id="a", tokens=[1], max_new_tokens=1, temperature=float(request.temperature),
               eos_token_ids=[], **sampled)  # fmt: skip # or a worker could not be told of it
        assert 1 <= request.n <= 128 and all(request.stop) and request.model
        for name, value in fields.items():  # nothing that was asked for is dropped in silence
            if value is not None and name not in kind.model_fields:
                assert value in kind.without[name]
            elif value is not None and name not in ("stop", "messages", "stream_options"):
                assert getattr(request, name) == value
        if kind is ChatRequest:
            assert len(request.template_messages) == len(fields["messages"])
            assert all(isinstance(message["content"], str) for message in request.template_messages)
        else:
            assert all(request.prompts)

    check()
    assert min(taken.count(CompletionRequest), taken.count(ChatRequest)) > 50


@given(KINDS, st.sampled_from(NAMES), st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.5]))
@seeded
def test_what_is_negative_or_no_number_is_refused_by_name(kind, name, value):
    if (name, value) == ("seed", -1):
        return
    fields = {"model": "m", "prompt": "a"} if kind is CompletionRequest else {"model": "m", "messages": [{"role": "user", "content": "a"}]}  # fmt: skip
    with pytest.raises(Refusal) as refused:
        parse(kind, json.dumps({**fields, name: value}).encode())
    assert refused.value.param == name


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": []},
        {"role": "tool", "content": "a"},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": " "},
    ],
)
def test_messages_that_a_llama_cannot_read_are_refused(message):
    with pytest.raises(Refusal) as refused:
        parse(ChatRequest, json.dumps({"model": "m", "messages": [message]}).encode())
    assert refused.value.param.startswith("messages")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"ignore_eos": True, "min_tokens": 5, "stop": "x"}, "min_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 0}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"x" * 5000: 1}, "x" * 200),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(fields, param):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    with pytest.raises(Refusal) as refused:
        parse(ChatRequest, json.dumps(body).encode())
    assert refused.value.param == param
    assert len(refused.value.message) < 1000
