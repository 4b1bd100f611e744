"""A proxy, and workers that people start: they join and leave while it runs, are dropped when they die, and find it again."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from contextlib import ExitStack

import pytest
from deployment import MODEL, Deployed, Server, command, until
from runs import here

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("by-hand")]

NEW = 24
PROMPTS = [f"{n}. The capital of Peru is Lima. The capital of France is" for n in range(8)]
SERVER = ("proxy", "--port", "0", "--max-seq-len", "512", "--mode", "pd")


@pytest.fixture(scope="module")
def expected():
    answers = here(prompts=(*PROMPTS,), chat=False, single_mesh=True, max_new_tokens=NEW, ignore_eos=True)
    return {prompt: answer.text for prompt, answer in zip(PROMPTS, answers, strict=True)}


def proxy(hub="tcp://127.0.0.1:*", **env):
    return command(Server, *SERVER, "--hub", hub, **env)


def worker(server, role, name, transport="tcp", *flags, **env):
    words = ("worker", "--role", role, "--name", name, "--proxy", server.hub, "--transport", transport)
    return command(Deployed, *words, "--threads", "1", "--max-seq-len", "512", *flags, **env)


def linked(*workers):
    """Wait until the log of each prefill worker says that it is linked."""
    for running, peer in workers:
        running.log.wait_for(f"linked with {peer}")


def ask(server, prompt):
    """Return the answer's text and its route."""
    response = server.openai.completions.with_raw_response.create(
        model=MODEL, prompt=prompt, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True}
    )
    return response.parse().choices[0].text, response.headers["x-route"]


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
def test_two_workers_over_nixl_give_one_meshs_tokens(expected):
    with (
        proxy() as server,
        worker(server, "decode", "d", "nixl") as d,
        worker(server, "prefill", "p", "nixl") as p,
    ):
        server.ready(1, 1)
        linked((p, "d"))
        for prompt in PROMPTS[:2]:
            assert ask(server, prompt) == (expected[prompt], "pd")
        server.at_rest()
        assert p.stop() == 0 and d.stop() == 0 and server.stop() == 0
        assert "Traceback" not in server.log.text + d.log.text + p.log.text


def test_workers_join_serve_leave_and_die(expected):
    with ExitStack() as closing:
        server = closing.enter_context(proxy())
        assert server.http.get("/health").status_code == 503
        one = closing.enter_context(worker(server, "decode", "one"))
        p = closing.enter_context(worker(server, "prefill", "p"))
        server.ready(1, 1)
        linked((p, "one"))
        assert ask(server, PROMPTS[0]) == (expected[PROMPTS[0]], "pd")
        server.at_rest()

        other = closing.enter_context(worker(server, "decode", "other"))
        server.ready(1, 2)
        linked((p, "other"))
        running = server.openai.completions.create(
            model=MODEL, prompt=PROMPTS[1], max_tokens=400, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = next(running).choices[0].text
        decode = {"one": one, "other": other}
        (request,) = server.get("/state")["requests"]
        assert (
            decode.pop(request["decode_worker"]).stop(signal.SIGTERM) == 0
        )  # its requests begin anew elsewhere
        ((left, staying),) = decode.items()
        for event in running:
            text += event.choices[0].text
        assert text[:20] == expected[PROMPTS[1]][:20] and running.response.status_code == 200
        assert server.health()["workers"] == {"prefill": 1, "decode": 1}
        assert ask(server, PROMPTS[2]) == (expected[PROMPTS[2]], "pd")

        os.kill(p.running.process.pid, signal.SIGKILL)
        until(lambda: server.health()["status"] == "degraded", "the loss of the prefill worker")
        assert ask(server, PROMPTS[3]) == (expected[PROMPTS[3]], "local")
        server.at_rest()

        p = closing.enter_context(worker(server, "prefill", "p"))
        server.ready(1, 1)
        linked((p, left))
        assert ask(server, PROMPTS[4]) == (expected[PROMPTS[4]], "pd")
        assert p.stop(signal.SIGINT) == 0 and staying.stop() == 0
        assert server.health()["status"] == "unavailable"
        assert server.stop() == 0
        assert "Traceback" not in server.log.text + one.log.text + other.log.text + p.log.text


def test_workers_find_their_proxy_again_or_end(expected):
    with ExitStack() as closing:
        server = closing.enter_context(proxy())
        flags = ("--deadline-s", "60")
        decode = closing.enter_context(worker(server, "decode", "d", "tcp", *flags))
        short = closing.enter_context(worker(server, "prefill", "short", "tcp", "--deadline-s", "1"))
        server.ready(1, 1)
        assert ask(server, PROMPTS[0])[0] == expected[PROMPTS[0]]
        os.kill(server.running.process.pid, signal.SIGKILL)
        assert short.wait() == 1
        assert re.search(r"the hub at \S+ did not answer within 1 s", short.log.text)
        again = closing.enter_context(proxy(server.hub))
        again.ready(0, 1)
        assert ask(again, PROMPTS[5]) == (expected[PROMPTS[5]], "local")
        assert decode.stop() == 0 and again.stop() == 0
        server.close()


def test_who_does_not_fit_is_refused_and_told_why():
    with ExitStack() as closing:
        server = closing.enter_context(proxy(DISAGG_TT_TOKEN="right"))
        right = closing.enter_context(worker(server, "decode", "right", DISAGG_TT_TOKEN="right"))
        server.ready(0, 1)
        wrong = closing.enter_context(worker(server, "decode", "w", DISAGG_TT_TOKEN="wrong"))
        other = closing.enter_context(
            worker(server, "decode", "o", "tcp", "--kv-dtype", "bfloat16", DISAGG_TT_TOKEN="right")
        )
        assert wrong.wait() == 1 and re.search("disagg-tt: .* does not know the token", wrong.log.text)
        assert other.wait() == 1 and re.search("disagg-tt: .*o has settings .*same model", other.log.text)
        assert "o has settings" in server.log.text
        assert list(server.health()["workers"].values()) == [0, 1]
        assert right.stop() == 0 and server.stop() == 0
