"""Ranks that die or hang at any moment, clients that leave, too many of them, and the end in the middle of work."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest
from deployment import BOUND, MODEL, Server, command, served, until
from runs import here

pytestmark = pytest.mark.timeout(900)  # a job that starts again on a loaded machine

NEW = 60
PROMPTS = {
    "short": "The capital of Peru is",
    "long": " ".join(f"Stop {n} of the line is number {n * 37 % 1000}." for n in range(110)),
}
BODY = {"model": MODEL, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected():
    """A single mesh's answers."""
    answers = here(
        prompts=(*PROMPTS.values(),), chat=False, single_mesh=True, max_new_tokens=NEW, ignore_eos=True
    )
    return dict(zip(PROMPTS, answers, strict=True))


def stream(server, prompt, came=None, new=NEW):
    """The text of a streamed answer; `came` is set at its first token."""
    text = ""
    for event in server.openai.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        text += event.choices[0].text
        if came is not None:
            came.set()
    return text


def in_background(work, *arguments) -> Future:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *arguments)
    pool.shutdown(wait=False)
    return future


# ---------------------------------------------------------------- ranks

PREFILL, DECODE = 0, 1
FAULTS = {
    "prefill-killed-idle": (PREFILL, signal.SIGKILL, None),
    "prefill-killed-while-it-computes": (PREFILL, signal.SIGKILL, "prefill"),
    "decode-killed-while-layers-come": (DECODE, signal.SIGKILL, "prefill"),
    "decode-killed-while-it-decodes": (DECODE, signal.SIGKILL, "decode"),
    "decode-stopped-while-it-decodes": (DECODE, signal.SIGSTOP, "decode"),
}


@pytest.fixture(scope="module")
def fragile():
    with served("--mode", "pd") as server:
        yield server


@pytest.mark.xdist_group("fragile")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_is_lost_and_streams_go_on_with_the_same_tokens(fragile, expected, fault, tokenizer):
    rank, number, phase = FAULTS[fault]
    fragile.ready(1, 1)
    name = "short" if phase == "decode" else "long"
    answer = None
    if phase is not None:
        answer = in_background(stream, fragile, PROMPTS[name])
        until(
            lambda: (
                any(request["phase"] == phase for request in fragile.get("/state")["requests"])
                or answer.done()
            ),
            f"phase {phase}",
        )
        assert not answer.done()
    os.kill(fragile.rank_pid(rank), number)
    until(lambda: fragile.health()["status"] == "unavailable", "the loss is noticed")
    health = fragile.health()
    if health["status"] == "unavailable":  # and the ranks are not back yet
        assert health["in_flight"] == (answer is not None)
    refusal = fragile.http.post("/v1/completions", json={**BODY, "prompt": "x"})
    if refusal.status_code != 200:  # unless the ranks are back already
        assert refusal.status_code == 503 and int(refusal.headers["retry-after"]) > 0
        assert refusal.json()["error"]["code"] == "unavailable"
    fragile.ready(1, 1)
    assert fragile.health()["status"] == "ok"
    if answer is not None:
        assert answer.result(BOUND) == expected[name].text
    assert stream(fragile, PROMPTS["short"]) == expected["short"].text
    fragile.at_rest()


# ---------------------------------------------------------------- clients


async def left_at(server, phase, prompt, n):
    """Ask for `n` answers, and leave when one of them is in `phase`; of several, when others decode already."""
    phases = {phase, "decode"} if n > 1 else {phase}
    async with httpx.AsyncClient(base_url=server.url, timeout=BOUND) as client:

        async def ask():
            body = {**BODY, "prompt": prompt, "stream": True, "n": n}
            async with client.stream("POST", "/v1/completions", json=body) as r:
                async for _ in r.aiter_lines():
                    pass

        asked = asyncio.create_task(ask())

        async def reached():
            while True:
                state = (await client.get("/state")).json()
                if phases <= {request["phase"] for request in state["requests"]}:
                    return
                assert not asked.done(), f"{phases} were not seen"

        await reached()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


# More answers than the decode rank has slots: some wait, and it takes layers only between the steps of the others.
MANY = 40
LEFT = [
    ("waiting", "pd", MANY),
    ("prefill", "pd", 1),
    ("transfer", "pd", MANY),
    ("decode", "pd", 1),
    ("waiting", "ppd", MANY),
    ("prefill", "ppd", 1),
    ("decode", "ppd", 1),
]


def left_prompt(phase, mode):
    return f"{mode} {phase}. " + "word " * 300


@pytest.fixture(scope="module")
def left_answers():
    """A single mesh's answers to the prompts whose first askers leave."""
    prompts = tuple(left_prompt(phase, mode) for phase, mode, _ in LEFT)
    answers = here(prompts=prompts, chat=False, single_mesh=True, max_new_tokens=20, ignore_eos=True)
    return {case[:2]: answer.text for case, answer in zip(LEFT, answers, strict=True)}


@pytest.mark.xdist_group("served")
@pytest.mark.parametrize(("phase", "mode", "n"), LEFT, ids=[f"{phase}-{mode}" for phase, mode, _ in LEFT])
def test_a_client_that_leaves_frees_everything_and_spoils_nothing(server, phase, mode, n, left_answers):
    server.mode(mode)
    prompt = left_prompt(phase, mode)
    asyncio.run(left_at(server, phase, prompt, n))
    server.at_rest()
    for _ in range(2):  # over the blocks that it left, and over those of the answer
        text = stream(server, prompt, new=20)
        assert text == left_answers[phase, mode]
    server.at_rest()


@pytest.mark.xdist_group("served")
def test_too_many_at_once_are_told_when_to_come_again(server):
    async def ask(client):
        response = await client.post("/v1/completions", json={**BODY, "prompt": "Hello", "n": 128})
        return response.status_code, response.headers.get("retry-after"), response.json()

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=BOUND) as client:
            asked = [asyncio.create_task(ask(client)) for _ in range(5)]
            done, rest = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            return [task.result() for task in done]

    for status, retry_after, body in asyncio.run(main()):
        assert status == 429 and int(retry_after) > 0
        assert body["error"]["code"] == "overloaded"
    server.at_rest()


# ---------------------------------------------------------------- the end


def test_a_signal_while_the_ranks_start_ends_everything():
    with command(Server, "serve", "--port", "0", "--threads", "1") as server:
        server.rank_pid(DECODE)
        assert server.stop() == 0
    assert "Traceback" not in server.log.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_in_the_middle_of_work_ends_everything(number):
    with served("--mode", "pd", number=number) as server:
        came = threading.Event()
        running = in_background(stream, server, PROMPTS["short"] * 3, came)
        coming = in_background(stream, server, PROMPTS["long"])
        assert came.wait(BOUND)
    for future in (running, coming):
        error = future.exception(BOUND)
        assert error is None or isinstance(error, (openai.APIError, httpx.HTTPError)), error
    assert "unreceived" not in server.log.text and "ERROR" not in server.log.text
