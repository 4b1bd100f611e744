"""The official openai client, unmodified, against the server over a scripted backend."""

from __future__ import annotations

import asyncio

import openai
import pytest
from fake import EOS, LIMIT, MODEL, live

from disagg_tt.errors import OverloadError, PeerError
from disagg_tt.serving.generation import NewToken

SAID = "The capital of Peru is Lima."
CHAT = [{"role": "user", "content": "What is the capital of Peru?"}]


def with_client(backend, tokenizer, use, **changes):
    """Run `use(client)`, with an async client that does not try again, against a server in the same loop."""

    async def main():
        async with (
            live(backend, tokenizer, **changes) as (host, port),
            openai.AsyncOpenAI(
                base_url=f"http://{host}:{port}/v1", api_key="sk-test", max_retries=0
            ) as client,
        ):
            return await use(client)

    return asyncio.run(main())


async def take(stream, contents):
    async for chunk in stream:
        contents.append(chunk.choices[0].delta.content)


async def drain(stream):
    return [chunk async for chunk in stream]


def test_chat_whole(backend, tokenizer):
    async def use(client):
        return await client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)

    response = with_client(backend, tokenizer, use)
    choice = response.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SAID, "stop")
    (stream,) = backend.streams
    prompt = len(stream.wanted.tokens)
    assert list(stream.wanted.tokens) == tokenizer.encode_chat(CHAT)
    assert stream.wanted.max_new_tokens == LIMIT - prompt
    assert response.usage.prompt_tokens == prompt
    assert response.usage.completion_tokens == stream.played
    assert response.usage.total_tokens == prompt + stream.played
    assert response.usage.prompt_tokens_details.cached_tokens == prompt // 2
    assert response.id.startswith("chatcmpl-") and response.model == MODEL
    assert stream.closed.is_set()


def test_chat_streamed(backend, tokenizer):
    async def use(client):
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
        return await drain(stream)

    chunks = with_client(backend, tokenizer, use)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == backend.streams[0].played
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_in_every_chunk(backend, tokenizer):
    async def use(client):
        stream = await client.completions.create(
            model=MODEL, prompt="Hello", stream=True, stream_options={"include_usage": True},
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )  # fmt: skip
        return await drain(stream)

    chunks = with_client(backend, tokenizer, use)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1
    assert counts[-1] == counts[-2] == backend.streams[0].played > counts[0]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(tokenizer.encode("Hello"))}


def test_the_synchronous_client(backend, tokenizer):
    def talk(address):
        with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="x") as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).id == MODEL
            whole = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3)
            with client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, stream=True) as stream:
                return whole, list(stream)

    async def main():
        async with live(backend, tokenizer) as address:
            return await asyncio.to_thread(talk, address)

    whole, chunks = asyncio.run(main())
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert whole.usage.completion_tokens == 3


def test_n_answers_have_seeds_one_after_the_other(backend, tokenizer):
    backend.script = lambda wanted: backend.says(f"Number {wanted.sampling.seed}", wanted)

    async def use(client):
        whole = await client.chat.completions.create(model=MODEL, messages=CHAT, n=3, seed=40)
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, n=3, seed=40, stream=True)
        return whole, await drain(stream)

    whole, chunks = with_client(backend, tokenizer, use)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert (
        [choice.message.content for choice in whole.choices] == texts == [f"Number {i}" for i in (40, 41, 42)]
    )
    assert whole.usage.prompt_tokens == len(tokenizer.encode_chat(CHAT))  # once, not three times
    assert len({stream.wanted.id for stream in backend.streams}) == 6


def test_without_a_seed_answers_differ(backend, tokenizer):
    async def use(client):
        for _ in range(2):
            await client.completions.create(model=MODEL, prompt="a", n=2)

    with_client(backend, tokenizer, use)
    assert len({stream.wanted.sampling.seed for stream in backend.streams}) == 4


def test_several_prompts_of_text_or_tokens(backend, tokenizer):
    backend.script = lambda wanted: backend.says(f"{len(wanted.tokens)} tokens", wanted)

    async def use(client):
        texts = await client.completions.create(model=MODEL, prompt=["Hello", "Hello there"], n=2, seed=1)
        ids = [tokenizer.encode("Hello"), tokenizer.encode("Hello there")]
        lists = await client.completions.create(model=MODEL, prompt=ids)
        one = await client.completions.create(model=MODEL, prompt=ids[0])
        return texts, lists, one, [len(tokens) for tokens in ids]

    texts, lists, one, (a, b) = with_client(backend, tokenizer, use)
    assert [c.text for c in texts.choices] == [f"{a} tokens"] * 2 + [f"{b} tokens"] * 2
    assert [c.index for c in texts.choices] == [0, 1, 2, 3]
    assert [c.text for c in lists.choices] == [f"{a} tokens", f"{b} tokens"]
    assert [c.text for c in one.choices] == [f"{a} tokens"]
    assert texts.usage.prompt_tokens == a + b
    assert texts.usage.prompt_tokens_details.cached_tokens == a // 2 + b // 2


def test_a_stop_string_ends_the_answer_on_the_meshes_too(backend, tokenizer):
    never = asyncio.Event()
    backend.script = lambda wanted: [*backend.says("One two three four", wanted)[:-1], never]

    async def use(client):
        whole = await client.completions.create(model=MODEL, prompt="a", stop=" three", max_tokens=50)
        stream = await client.completions.create(
            model=MODEL, prompt="a", stop=[" three"], max_tokens=50, stream=True
        )
        return whole, await drain(stream)

    whole, chunks = with_client(backend, tokenizer, use)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("One two", "stop")
    assert "".join(chunk.choices[0].text for chunk in chunks) == "One two"
    assert all(stream.closed.is_set() for stream in backend.streams)


def test_a_character_of_several_tokens_comes_whole(backend, tokenizer):
    text = "日本語 😀 ü"
    backend.script = lambda wanted: backend.says(text, wanted)

    async def use(client):
        return await drain(await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True))

    pieces = [chunk.choices[0].delta.content or "" for chunk in with_client(backend, tokenizer, use)]
    assert "".join(pieces) == text and len(pieces) > 3
    assert backend.streams[0].played > len(text)  # several tokens a character


def test_an_answer_of_eos_alone_is_empty_and_not_an_error(backend, tokenizer):
    backend.script = lambda wanted: [NewToken(EOS, "stop")]

    async def use(client):
        whole = await client.chat.completions.create(model=MODEL, messages=CHAT)
        return whole, await drain(await client.completions.create(model=MODEL, prompt="a", stream=True))

    whole, chunks = with_client(backend, tokenizer, use)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "stop")
    assert [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks] == [("", "stop")]


def test_logprobs_in_both_forms(backend, tokenizer):
    async def use(client):
        chat = await client.chat.completions.create(model=MODEL, messages=CHAT, logprobs=True, top_logprobs=2)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, logprobs=True, top_logprobs=2, stream=True
        )
        text = await client.completions.create(model=MODEL, prompt="a", logprobs=2, max_tokens=50)
        none = await client.completions.create(model=MODEL, prompt="a")
        return chat, await drain(stream), text, none

    chat, chunks, text, none = with_client(backend, tokenizer, use)
    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content) == SAID
    assert content[0].logprob == -0.5 and [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[0].token == content[0].token
    assert bytes(content[0].bytes).decode() == content[0].token
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == content
    assert text.choices[0].logprobs.tokens == [token.token for token in content]
    assert text.choices[0].logprobs.text_offset[1] == len(content[0].token)
    assert text.choices[0].logprobs.top_logprobs[0][content[0].token] == -0.5
    assert none.choices[0].logprobs is None and backend.streams[-1].wanted.logprobs is None


@pytest.mark.parametrize(
    ("settings", "error", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"n": "two"}, openai.BadRequestError, "n", "invalid_type"),
        ({"n": 129}, openai.BadRequestError, "n", "invalid_value"),
        ({"extra_body": {"magic": 1}}, openai.BadRequestError, "magic", "unknown_parameter"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty", "unsupported_value"),
        ({"echo": True}, openai.BadRequestError, "echo", "unsupported_value"),
        ({"prompt": ""}, openai.BadRequestError, "prompt", "invalid_value"),
        ({"prompt": []}, openai.BadRequestError, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 65, "n": 2}, openai.BadRequestError, "prompt", "invalid_value"),
        ({"prompt": [5000]}, openai.BadRequestError, "prompt", "invalid_value"),
        ({"prompt": [7] * LIMIT}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"prompt": "word " * 10_000}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"max_tokens": LIMIT}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(backend, tokenizer, settings, error, param, code):
    async def use(client):
        with pytest.raises(error) as raised:
            await client.completions.create(**{"model": MODEL, "prompt": "Hello", **settings})
        return raised.value

    raised = with_client(backend, tokenizer, use)
    assert (raised.param, raised.code) == (param, code)
    assert backend.streams == []


def test_what_clients_send_by_habit_is_accepted(backend, tokenizer):
    async def use(client):
        chat = await client.chat.completions.create(
            model=MODEL, messages=CHAT, frequency_penalty=0, presence_penalty=0.0, n=1, logit_bias={}, tools=[],
            response_format={"type": "text"}, parallel_tool_calls=True, tool_choice="none", user="me", store=False,
            max_completion_tokens=20, extra_body={"conversation_id": "c7", "top_k": 5, "ignore_eos": True, "min_tokens": 20},
        )  # fmt: skip
        turns = [
            *CHAT,
            chat.choices[0].message,
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ]
        await client.chat.completions.create(model=MODEL, messages=turns)
        await client.completions.create(
            model=MODEL, prompt="a", best_of=1, echo=False, suffix=None, logit_bias=None
        )

    with_client(backend, tokenizer, use)
    first = backend.streams[0].wanted
    assert (first.conversation, first.sampling.top_k, first.max_new_tokens) == ("c7", 5, 20)
    assert first.eos_token_ids == frozenset()
    assert "And?" in tokenizer.decode(backend.streams[1].wanted.tokens)


def test_overload_says_when_to_come_again(backend, tokenizer):
    async def use(client):
        backend.refusal = OverloadError("the queue is full", retry_after_s=2.2)
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model=MODEL, prompt="a", stream=True)
        backend.refusal = OverloadError("no worker", retry_after_s=0, unavailable=True)
        with pytest.raises(openai.InternalServerError) as away:
            await client.completions.create(model=MODEL, prompt="a")
        return full.value, away.value

    full, away = with_client(backend, tokenizer, use)
    assert (full.status_code, full.response.headers["retry-after"]) == (429, "3")
    assert (away.status_code, away.response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "error", [PeerError("the decode rank died"), ZeroDivisionError("secret"), asyncio.CancelledError()]
)
def test_a_failure_before_the_first_token_is_an_error_status(backend, tokenizer, streamed, error):
    backend.script = lambda wanted: [error]

    async def use(client):
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model=MODEL, messages=CHAT, stream=streamed)
        return raised.value

    raised = with_client(backend, tokenizer, use)
    assert raised.status_code == 500
    assert ("the decode rank died" in raised.message) == isinstance(error, PeerError)
    assert "secret" not in raised.message


@pytest.mark.parametrize("ending", ["failure", "no reason"])
def test_a_failure_in_a_stream_is_raised_by_the_client(backend, tokenizer, ending):
    failure = [PeerError("the decode rank died")] if ending == "failure" else []
    backend.script = lambda wanted: [*backend.says(SAID, wanted)[:3], *failure]

    async def use(client):
        with pytest.raises(openai.InternalServerError):  # not streamed: nothing has been sent yet
            await client.chat.completions.create(model=MODEL, messages=CHAT)
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        got = []
        with pytest.raises(openai.APIError) as raised:
            await take(stream, got)
        return got, raised.value

    got, raised = with_client(backend, tokenizer, use)
    assert "".join(got) and SAID.startswith("".join(got))
    assert raised.code == "generation_failed"
    assert all(stream.closed.is_set() for stream in backend.streams)


def test_one_failed_answer_of_several_fails_the_request_and_ends_the_others(backend, tokenizer):
    never = asyncio.Event()
    backend.script = lambda wanted: [PeerError("died")] if wanted.id.endswith("-1") else [never]

    async def use(client):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=CHAT, n=3)

    with_client(backend, tokenizer, use)
    assert len(backend.streams) == 3 and all(stream.closed.is_set() for stream in backend.streams)


def test_the_api_key_is_asked_for(backend, tokenizer):
    async def use(client):
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-wrong").chat.completions.create(model=MODEL, messages=CHAT)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-wrong").models.list()
        return await client.chat.completions.create(model=MODEL, messages=CHAT)

    assert with_client(backend, tokenizer, use, api_key="sk-test").choices[0].message.content == SAID


def test_the_time_budget_adds_up_to_the_time_to_the_first_token(backend, tokenizer):
    async def use(client):
        whole = await client.chat.completions.with_raw_response.create(model=MODEL, messages=CHAT)
        streamed = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=CHAT, stream=True
        )
        return whole.headers, streamed.headers

    for headers in with_client(backend, tokenizer, use):
        parts = dict(part.split("=") for part in headers["x-time-budget"].split(","))
        assert list(parts) == ["queue", "prefill", "sample"]
        assert sum(map(float, parts.values())) == float(headers["x-ttft-ms"]) == 12.0
        assert headers["x-route"] == "pd"
