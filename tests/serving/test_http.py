"""The server beneath the API: clients who leave, stall or send rubbish, and what else it tells."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket

import httpx
import pytest
from fake import MODEL, FakeBackend, live, served

from disagg_tt.errors import InputError, OverloadError, PeerError
from disagg_tt.serving import web
from disagg_tt.serving.answers import Answers
from disagg_tt.serving.generation import Account, Generation, NewToken
from disagg_tt.serving.metrics import Metrics
from disagg_tt.serving.server import create_app
from disagg_tt.serving.web import Patience, listen, serving

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": MODEL, "prompt": "Hello"}


def run(coroutine):
    return asyncio.run(coroutine)


def asgi(backend, tokenizer, use, **changes):
    """Run `use(client)` against the application, without a socket."""

    async def main():
        transport = httpx.ASGITransport(create_app(backend, tokenizer, served(**changes)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await use(client)

    return run(main())


def post(path, body, **headers):
    """The bytes of a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# Bad input


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b'"\xff\xfe"', None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b'{"model": "tiny-llama", "prompt": "\\ud800"}', None, "invalid_json"),
        (b'{"model": "tiny-llama", "prompt": "a", "temperature": NaN}', "temperature", "invalid_value"),
        (b'{"model": "tiny-llama", "prompt": "a", "top_p": Infinity}', "top_p", "invalid_value"),
        (b'{"model": "tiny-llama", "prompt": "a", "presence_penalty": NaN}', "presence_penalty", "unsupported_value"),
        (b'{"model": "tiny-llama", "prompt": "a", "seed": 1e400}', "seed", "invalid_type"),
        (b'{"model": "tiny-llama", "prompt": "a", "max_tokens": 1.5}', "max_tokens", "invalid_type"),
        (b'{"model": "tiny-llama", "prompt": "a", "stream": 1}', "stream", "invalid_type"),
        (b'{"model": "tiny-llama", "prompt": [1, "a"]}', "prompt[1]", "invalid_type"),
        (b'{"model": "tiny-llama", "prompt": [-1]}', "prompt[0]", "invalid_value"),
        (b'{"model": "tiny-llama", "prompt": "a", "stop": [""]}', "stop[0]", "invalid_value"),
        (b'{"model": "tiny-llama", "prompt": "a", "": 1}', None, "unknown_parameter"),
        (b'{"prompt": "a"}', "model", "missing_required_parameter"),
        (b'{"model": null, "prompt": "a"}', "model", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_rubbish_is_refused_with_openais_error_object(backend, tokenizer, body, param, code):
    async def use(client):
        return await client.post("/v1/completions", content=body)

    response = asgi(backend, tokenizer, use)
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"] or None, error["code"]) == ("invalid_request_error", param, code)
    assert backend.streams == []


def test_a_chat_that_the_template_refuses_is_the_clients_mistake_and_names_no_path(backend, tokenizer):
    class Refusing(type(tokenizer)):
        def __init__(self):
            self.__dict__ = {**tokenizer.__dict__}

        @property
        def _template(self):
            raise InputError("/secret/folder has no chat template")

    async def use(client):
        return await client.post("/v1/chat/completions", json=CHAT)

    response = asgi(backend, Refusing(), use)
    assert response.status_code == 400 and "secret" not in response.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused_while_it_comes(backend, tokenizer, chunked):
    sent = 0

    async def endless():
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 16
            yield bytes(1 << 16)

    async def use(client):
        content = endless() if chunked else bytes(200_000)
        return await client.post("/v1/completions", content=content)

    response = asgi(backend, tokenizer, use, max_body_bytes=100_000)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert sent <= 1 << 18


def test_a_body_that_does_not_end_is_given_up(backend, tokenizer):
    async def main():
        async with live(backend, tokenizer, body_timeout_s=0.05) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert (await reader.readline()).split()[1] == b"408"
            writer.close()

    run(main())


def test_unknown_paths_and_methods_give_the_error_object_too(backend, tokenizer):
    async def use(client):
        return await client.get("/v1/nothing"), await client.get("/v1/completions")

    nothing, wrong = asgi(backend, tokenizer, use)
    assert (nothing.status_code, wrong.status_code) == (404, 405)
    assert nothing.json()["error"]["code"] == wrong.json()["error"]["code"] == "unknown_url"


# Clients who leave, stall or wait


async def gone_after(backend, tokenizer, path, request, received, script):
    """Send `request`, leave when `received` has been received, and return when all is closed on the backend."""
    backend.script = script
    async with live(backend, tokenizer) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(post(path, request))
        await backend.began.wait()
        if received:
            await reader.readuntil(received)
        writer.transport.abort()
        await asyncio.gather(*(stream.closed.wait() for stream in backend.streams))
        async with httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
            while 'failures_total{kind="client_gone"} 1.0' not in (
                text := (await client.get("/metrics")).text
            ):
                assert 'client_gone"} 2.0' not in text
            assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_before_the_first_token_ends_the_generation(backend, tokenizer, path, stream, n):
    request = {**(CHAT if "chat" in path else TEXT), "stream": stream, "n": n}
    run(gone_after(backend, tokenizer, path, request, b"", lambda wanted: [asyncio.Event()]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_between_tokens_ends_the_generation(backend, tokenizer, stream):
    def script(wanted):
        return [*backend.says("Some words", wanted)[:2], asyncio.Event()]

    request = {**TEXT, "stream": stream}
    run(gone_after(backend, tokenizer, "/v1/completions", request, b"\n\n" if stream else b"", script))


class Deaf:
    """A stream that loses the first cancellation, as asyncio.wait_for can before Python 3.12, and goes on for ever."""

    def __init__(self):
        self.account, self.given, self.closed = Account(), 0, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.given += 1
        if self.given > 1:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        return NewToken(5)

    async def aclose(self):
        self.closed = True


def test_an_answer_whose_cancellation_is_lost_ends_all_the_same(backend, tokenizer):
    stream = Deaf()
    backend.generate = lambda wanted: stream

    async def main():
        wanted = Generation("a", (1,), 10**6)
        answers = Answers(backend, [wanted], tokenizer, [], Metrics(backend))
        await answers.begin()
        while stream.given < 2:
            await asyncio.sleep(0)
        await asyncio.wait_for(answers.close(), 30)
        assert stream.closed and stream.given == 2

    run(main())


def test_a_client_that_leaves_while_its_body_is_read_begins_nothing(backend, tokenizer):
    async def main():
        async with live(backend, tokenizer) as address:
            _, writer = await asyncio.open_connection(*address)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
            writer.close()
            async with httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
                while 'kind="client_gone"} 1.0' not in (await client.get("/metrics")).text:
                    pass

    run(main())
    assert backend.streams == []


def endless(backend):
    """A script that never ends."""

    def script(wanted):
        word = backend.says("word word", wanted)[0]
        while True:
            yield word

    return script


def test_a_reader_that_stalls_stops_the_taking_of_tokens_and_is_cut_off(backend, tokenizer):
    backend.script = endless(backend)

    async def main():
        listener = listen("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # else the kernel takes megabytes
        app = create_app(backend, tokenizer, served(max_seq_len=10**9))
        async with serving(app, listener, Patience(stalled=0.2, closing=0.5)):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(listener.getsockname())
                client.sendall(post("/v1/completions", {**TEXT, "stream": True, "max_tokens": 10**8}))
                await backend.began.wait()
                await backend.streams[0].closed.wait()

    run(main())
    assert backend.streams[0].played < 10_000  # what the kernel's buffers and the server's 64 KiB hold


def test_a_reader_that_is_slow_and_does_read_is_not_cut_off(backend, tokenizer, monkeypatch):
    backend.script = endless(backend)
    looked = []  # when the limit for a stalled client had passed
    has_read = web._PatientProtocol._has_read
    monkeypatch.setattr(
        web._PatientProtocol,
        "_has_read",
        lambda self, before: (looked.append(before), has_read(self, before)),
    )

    async def main():
        listener = listen("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        app = create_app(backend, tokenizer, served(max_seq_len=10**9))
        async with serving(app, listener, Patience(stalled=0.5, closing=0.5)):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, listener.getsockname())
                await loop.sock_sendall(
                    client, post("/v1/completions", {**TEXT, "stream": True, "max_tokens": 10**8})
                )
                while len(looked) < 3:
                    assert await loop.sock_recv(client, 256), "it was cut off"
                    await asyncio.sleep(0.005)  # so that 64 KiB take more than the limit

    run(main())


def test_what_comes_while_a_client_reads_slowly_goes_out_in_one_write_and_is_bounded(backend, tokenizer):
    said = " ".join(map(str, range(60)))
    backend.script = lambda wanted: backend.says(said, wanted)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

    async def main():
        read = asyncio.Event()
        bodies = []
        request = [
            {"type": "http.request", "body": json.dumps({**TEXT, "stream": True, "max_tokens": 400}).encode()}
        ]

        async def receive():
            return request.pop() if request else await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                bodies.append(message.get("body", b""))
                await read.wait()

        app = asyncio.create_task(create_app(backend, tokenizer, served())(scope, receive, send))
        await backend.began.wait()
        ahead, (stream,) = -1, backend.streams
        while not bodies or ahead < stream.played:  # until it stands still
            ahead = stream.played
            for _ in range(20):
                await asyncio.sleep(0)
        read.set()
        await app
        return ahead, bodies, stream.played

    ahead, bodies, played = run(main())
    chunks = [json.loads(event[6:]) for event in b"".join(bodies).decode().split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == said
    assert ahead < 40 < played  # AHEAD, and what the first writes took
    assert bodies[1].count(b"data: ") > 10


def test_thousands_of_idle_and_half_sent_connections_hinder_nobody_and_are_cut_off(backend, tokenizer):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = min(3000, (hard - 200) // 2)  # both ends are in this process

    async def main():
        async with live(backend, tokenizer, Patience(headers=4.0, idle=4.0, closing=0.5)) as address:
            idle = [await asyncio.open_connection(*address) for _ in range(connections)]
            for _, writer in idle[::2]:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHos")
            async with httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
                responses = await asyncio.gather(
                    *(client.post("/v1/completions", json=TEXT) for _ in range(20))
                )
            assert {response.status_code for response in responses} == {200}

            async def trickle(writer):
                while not writer.is_closing():
                    writer.write(b"x")
                    await asyncio.sleep(0.05)

            slow = asyncio.create_task(trickle(idle[0][1]))  # bytes, but never whole headers
            for reader, writer in idle:
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
                writer.transport.abort()
            await slow

    run(main())


# The server itself


def test_a_port_in_use_is_an_error_of_the_users_before_anything_starts():
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=f"port {port}.*--port"):
        listen("127.0.0.1", port)
    with pytest.raises(InputError, match="no address"):
        listen("not a host", 0)
    with pytest.raises(InputError, match="99999"):
        listen("127.0.0.1", 99999)
    taken.close()


def test_stopping_ends_what_is_in_flight_and_frees_the_port(backend, tokenizer):
    backend.script = lambda wanted: [*backend.says("Some words", wanted)[:2], asyncio.Event()]

    async def main():
        listener = listen("127.0.0.1", 0)
        address = listener.getsockname()
        async with serving(create_app(backend, tokenizer, served()), listener, Patience(closing=0.1)):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(post("/v1/completions", {**TEXT, "stream": True}))
            await reader.readuntil(b"\n\n")
        (stream,) = backend.streams
        assert stream.closed.is_set()
        assert b"[DONE]" not in await reader.read()
        writer.close()
        listen("127.0.0.1", address[1]).close()

    run(main())


def test_a_stream_ends_with_done_once_and_only_if_whole(backend, tokenizer):
    async def use(client):
        good = await client.post("/v1/completions", json={**TEXT, "stream": True})
        backend.script = lambda wanted: [*backend.says("Some words", wanted)[:2], PeerError("died")]
        bad = await client.post("/v1/completions", json={**TEXT, "stream": True})
        return good, bad

    good, bad = asgi(backend, tokenizer, use)
    assert good.headers["content-type"].startswith("text/event-stream")
    assert good.text.count("data: [DONE]\n\n") == 1 and good.text.endswith("data: [DONE]\n\n")
    assert "[DONE]" not in bad.text
    assert json.loads(bad.text.split("data: ")[-1])["error"]["type"] == "server_error"


@pytest.mark.parametrize(("given", "echoed"), [("my-id-1", True), ("x" * 129, False), ("a b", False)])
def test_the_request_id_is_echoed_or_made(backend, tokenizer, given, echoed):
    async def use(client):
        return await client.get("/health", headers={"X-Request-Id": given}), await client.get("/v1/nothing")

    with_id, without = asgi(backend, tokenizer, use)
    assert (with_id.headers["x-request-id"] == given) == echoed
    assert len(without.headers["x-request-id"]) == 32


def test_the_api_key_guards_all_but_health_and_the_page(backend, tokenizer):
    async def use(client):
        opened = [(await client.get(path)).status_code for path in ("/health", "/", "/page.js", "/page.css")]
        closed = [
            (await client.request(method, path)).status_code
            for method, path in (
                ("GET", "/metrics"), ("GET", "/state"), ("GET", "/mode"), ("POST", "/mode/pd"), ("GET", "/v1/models"),
                ("POST", "/v1/completions"), ("GET", "/conversations"), ("POST", "/conversations/clear"), ("GET", "/trace"), ("GET", "/x"),
            )
        ]  # fmt: skip
        key = {"Authorization": "Bearer s3crét".encode()}
        return opened, closed, (await client.get("/state", headers=key)).status_code

    opened, closed, with_key = asgi(backend, tokenizer, use, api_key="s3crét")
    assert (set(opened), set(closed), with_key) == ({200}, {401}, 200)


def test_pages_of_other_sites_are_refused(backend, tokenizer):
    async def use(client):
        own = await client.post("/mode/pd", headers={"Origin": "http://server"})
        other = await client.post("/mode/ppd", headers={"Origin": "http://evil.example"})
        return own.status_code, other.status_code

    assert asgi(backend, tokenizer, use) == (200, 403)
    assert backend.mode == "pd"


def test_modes_conversations_state_and_health(backend, tokenizer):
    async def use(client):
        assert (await client.get("/mode")).json() == {"mode": "auto"}
        assert (await client.post("/mode/ppd")).json() == {"mode": "ppd"}
        wrong = await client.post("/mode/fast")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "mode")
        assert (await client.get("/conversations")).json() == {"conversations": backend.conversations()}
        assert (await client.post("/conversations/clear")).json() == {"cleared": 1}
        assert (await client.get("/state")).json() == backend.state()
        assert (await client.get("/trace")).json() == backend.trace()
        for backend.status, status in (("ok", 200), ("degraded", 200), ("unavailable", 503)):
            response = await client.get("/health")
            assert (response.status_code, response.json()["status"]) == (status, backend.status)

    asgi(backend, tokenizer, use)
    assert backend.mode == "ppd"


def test_metrics_account_for_every_request(backend, tokenizer):
    async def use(client):
        await client.post("/v1/completions", json={**TEXT, "max_tokens": 4})
        await client.post("/v1/completions", json={**TEXT, "temperature": -1})
        backend.refusal = OverloadError("full", retry_after_s=1)
        await client.post("/v1/completions", json=TEXT)
        backend.on_transfer(backend.state()["transfers"][0])
        return (await client.get("/metrics")).text

    lines = dict(line.rsplit(" ", 1) for line in asgi(backend, tokenizer, use).splitlines() if line[0] != "#")
    prompt = len(tokenizer.encode("Hello"))
    expected = {
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 3,
        "request_time_per_output_token_seconds_count": 1,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_sum": 0.00125,
        "request_prefill_time_seconds_sum": 0.0105,
        "kv_transfer_hidden_seconds_sum": 0.018,
        "kv_transfer_exposed_seconds_sum": 0.004,
        "kv_handover_seconds_sum": 0.006,
        "kv_bytes_transferred_total": 393216,
        'prompt_tokens_by_source_total{source="local_compute"}': 0,
        'prompt_tokens_by_source_total{source="local_cache_hit"}': prompt // 2,
        'prompt_tokens_by_source_total{source="external_kv_transfer"}': prompt - prompt // 2,
        "generation_tokens_total": 4,
        "prefix_cache_queries_total": prompt,
        "prefix_cache_hits_total": prompt // 2,
        'routing_decisions_total{reason="first turn",route="pd"}': 1,
        'request_success_total{finished_reason="length"}': 1,
        'request_failures_total{kind="invalid_value"}': 1,
        'request_failures_total{kind="overloaded"}': 1,
        "num_requests_running": 0,
        "num_requests_waiting": 1,
        'kv_cache_usage_perc{role="prefill",worker="prefill-0"}': 0.25,
    }
    assert {name: float(lines[f"disagg_tt:{name}"]) for name in expected} == expected


def test_two_servers_in_one_process_share_no_metrics(tokenizer):
    for _ in range(2):
        backend = FakeBackend(tokenizer)
        backend.script = lambda wanted: [NewToken(7, "length")]

        async def use(client):
            await client.post("/v1/completions", json=TEXT)
            return (await client.get("/metrics")).text

        assert "disagg_tt:generation_tokens_total 1.0" in asgi(backend, tokenizer, use)
