"""What a benchmark of serving stands on: servers that it starts, and a client that times every token of an answer."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from disagg_tt.errors import PeerError
from disagg_tt.processes import tied
from disagg_tt.prompt import Tokenizer
from disagg_tt.serving.metrics import PREFIX

START_S, STOP_S = 300.0, 60.0
PATIENCE_S = 600.0  # for one answer: a benchmark is watched by whoever started it
POLL_S = 0.1
clock = time.perf_counter


@dataclass(frozen=True)
class Reply:
    """One answer as its client saw it.

    sent_at, arrived_at: when the request was sent and each chunk with text came, s of `clock`. tokens: of the
    answer. id: the completion's. route: the way that its prompt took.
    budget_ms: what the server says its time to the first token went to.
    """

    sent_at: float
    arrived_at: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    text: str
    id: str
    route: str
    budget_ms: dict[str, float]

    @property
    def ttft_ms(self) -> float:
        """From the request to the first token."""
        return (self.arrived_at[0] - self.sent_at) * 1e3

    @property
    def e2el_ms(self) -> float:
        """From the request to the last token."""
        return (self.arrived_at[-1] - self.sent_at) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of a token after the first; None where there is but one."""
        return (self.e2el_ms - self.ttft_ms) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """Times between two chunks."""
        return [
            (b - a) * 1e3 for a, b in zip(self.arrived_at, self.arrived_at[1:], strict=False)
        ]  # of n there are n - 1


class Client:
    """Requests to one server. `limit`: tokens that a prompt and its answer may have together."""

    def __init__(self, http: httpx.AsyncClient, model: str, limit: int):
        self._http, self.model, self.limit = http, model, limit

    async def complete(self, tokens: Sequence[int], max_tokens: int) -> Reply:
        """Have exactly `max_tokens` tokens generated, greedily; raises PeerError where that fails."""
        body = {
            "model": self.model,
            "prompt": list(tokens),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_at, events, pending = clock(), [], b""
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise PeerError(f"HTTP {response.status_code}: {(await response.aread())[:500]!r}")
                async for data in response.aiter_raw():
                    now = clock()
                    *whole, pending = (pending + data).split(b"\n\n")
                    events += [(now, event) for event in whole]
        except httpx.HTTPError as error:
            raise PeerError(f"a completion was cut: {error!r}") from error
        # read when all is there, so that reading one answer delays no clock of another's
        return _reply(sent_at, events, response.headers)

    async def metrics(self) -> dict[str, float]:
        """Return the server's counters, by name less the prefix, labels in braces: `routing_decisions_total{pd,mode pd}`."""
        from prometheus_client.parser import text_string_to_metric_families

        text = (await self._http.get("/metrics")).raise_for_status().text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""
                found[sample.name.removeprefix(PREFIX) + labels] = sample.value
        return found

    async def transfers(self) -> dict[str, dict[str, Any]]:
        """Return the last transfers by the request that they were of."""
        state = (await self._http.get("/state")).raise_for_status().json()
        return {each["request"]: each for each in state["transfers"]}

    async def set_mode(self, mode: str) -> None:
        """Have requests from now on routed so."""
        (await self._http.post(f"/mode/{mode}")).raise_for_status()


def _reply(sent_at: float, events: Sequence[tuple[float, bytes]], headers: Mapping[str, str]) -> Reply:
    arrived_at, text, id, usage = [], "", "", None
    for at, event in events:
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise PeerError(f"the stream ended with {chunk['error']}")
        usage = chunk.get("usage") or usage
        id = chunk["id"]
        if chunk["choices"]:
            arrived_at.append(at)
            text += chunk["choices"][0]["text"]
    if usage is None:
        raise PeerError("the stream ended without its usage")
    budget = (part.partition("=") for part in headers.get("x-time-budget", "").split(",") if part)
    return Reply(
        sent_at,
        tuple(arrived_at),
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
        text,
        id,
        headers.get("x-route", ""),
        {name: float(ms) for name, _, ms in budget},
    )


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Client]:
    """A client of the server at `url`; raises PeerError where none answers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False) as http:
        try:
            (model,) = (await http.get("/v1/models")).raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise PeerError(f"--url {url}: no server answers there ({error!r})") from error
        yield Client(http, model["id"], model["max_model_len"])


# ---------------------------------------------------------------- prompts and arrivals


class Prompts:
    """Prompts that no cache has seen: random token ids of the model's vocabulary, none of them special."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._random = tokenizer, random.Random(seed)
        self._bos = tokenizer.encode("")
        # those that are text by themselves, so that an answer's text comes back as the tokens that it was
        ids = range(tokenizer.vocab_size)
        self._ids = [i for i in ids if tokenizer.encode(tokenizer.decode([i]))[len(self._bos) :] == [i]]

    def new(self, tokens: int) -> list[int]:
        """Return a prompt of so many tokens, the tokenizer's BOS among them."""
        return [*self._bos, *self.words(tokens)][:tokens]

    def words(self, tokens: int) -> list[int]:
        """Return so many tokens to go on with."""
        return self._random.choices(self._ids, k=tokens)

    def of_text(self, text: str, tokens: int) -> list[int]:
        """Return an answer's text as so many tokens, as a client does who was sent no tokens; too few are added to."""
        ids = self._tokenizer.encode(text)[len(self._bos) :][:tokens]
        return ids + self.words(tokens - len(ids))


def arrivals(count: int, rate: float, generator: random.Random) -> list[float]:
    """Return when each of `count` requests is sent, s from the first: a Poisson process; at `rate` inf all at once."""
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += generator.expovariate(rate) if rate != float("inf") else 0.0
    return times


# ---------------------------------------------------------------- servers


@contextmanager
def servers(flags: Mapping[str, Sequence[str]], ranks: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """Run `disagg-tt serve` with each entry's flags at once; yield their urls when `ranks` of each serve.

    Raises PeerError for one that does not come up; ends them all.
    """
    started: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    with tempfile.TemporaryDirectory(prefix="disagg-tt-bench-") as folder:
        try:
            for name, words in flags.items():
                log: IO[bytes] = (Path(folder) / f"{len(started)}.log").open("w+b")
                command = [sys.executable, "-m", "disagg_tt", "serve", "--port", "0", *words]
                process = subprocess.Popen(
                    tied(command, signal.SIGTERM),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                started[name] = process, log
            yield {name: _url(process, log, ranks[name]) for name, (process, log) in started.items()}
        finally:
            for process, _ in started.values():
                process.terminate()
            for process, log in started.values():
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()  # its ranks end with it
                    process.wait()
                log.close()


def _url(process: subprocess.Popen[bytes], log: IO[bytes], ranks: int) -> str:
    """Return where a server is, once `ranks` ranks serve."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        said = Path(str(log.name)).read_text(errors="replace")
        if said.count(" joined: ") >= ranks:
            return said.split("HTTP at ", 1)[1].split()[0]
        time.sleep(POLL_S)
    said = Path(str(log.name)).read_text(errors="replace")
    raise PeerError(f"a server did not come up (exit code {process.poll()}): {said[-2000:]}")


async def sleep_until(at: float) -> None:
    """Sleep until `at`, s of `clock`."""
    if (left := at - clock()) > 0:
        await asyncio.sleep(left)
