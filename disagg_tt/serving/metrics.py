"""What Prometheus scrapes, in vLLM's vocabulary under this project's prefix."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg_tt.serving.generation import Account, Backend, TransferState

PREFIX = "disagg_tt:"
LONG = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one server, in a registry of its own; the gauges ask `backend` when they are scraped."""

    def __init__(self, backend: Backend):
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(backend))
        backend.on_transfer = self.transferred
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens.", SHORT
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of an answer's tokens after the first.", SHORT
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Waiting to be served.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt.")
        self._hidden = self._histogram(
            "kv_transfer_hidden_seconds", "Transfer of K and V under the prefill.", SHORT
        )
        self._exposed = self._histogram("kv_transfer_exposed_seconds", "Transfer of K and V after it.", SHORT)
        self._handover = self._histogram(
            "kv_handover_seconds", "From the prefill's end to the decode rank's first step.", SHORT
        )
        self._bytes = self._counter("kv_bytes_transferred", "Bytes of K and V sent from prefill to decode.")
        self._prompt_tokens = self._counter(
            "prompt_tokens_by_source", "Where a prompt's K and V came from.", "source"
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in a prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self._routes = self._counter(
            "routing_decisions", "Ways that requests took, and why.", "route", "reason"
        )
        self._successes = self._counter("request_success", "Answers finished.", "finished_reason")
        self.failures = self._counter("request_failures", "Requests without a whole answer.", "kind")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LONG) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def began(self, account: Account, first_token_s: float) -> None:
        """Count an answer that has its first token, `first_token_s` after the request came."""
        self._first_token.observe(first_token_s)
        self._routes.labels(account.route, account.reason).inc()

    def finished(
        self, account: Account, finish_reason: str, *, latency_s: float, s_per_token: float | None
    ) -> None:
        """Count an answer that is complete."""
        self._successes.labels(finish_reason).inc()
        self._latency.observe(latency_s)
        if s_per_token is not None:
            self._per_token.observe(s_per_token)
        self._queue.observe(account.budget_ms.get("queue", 0) / 1000)
        self._prefill.observe(account.budget_ms.get("prefill", 0) / 1000)
        local = account.prompt_tokens - account.computed_tokens - account.transferred_tokens
        for source, tokens in (
            ("local_compute", account.computed_tokens),
            ("local_cache_hit", max(local, 0)),
            ("external_kv_transfer", account.transferred_tokens),
        ):
            self._prompt_tokens.labels(source).inc(tokens)
        self._queries.inc(account.prompt_tokens)
        self._hits.inc(account.cached_tokens)

    def transferred(self, transfer: TransferState) -> None:
        """Count K and V that have come to a decode rank."""
        self._hidden.observe(transfer["hidden_ms"] / 1000)
        self._exposed.observe(transfer["exposed_ms"] / 1000)
        self._handover.observe(transfer["handover_ms"] / 1000)
        self._bytes.inc(transfer["bytes"])

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is true at this moment, from the backend's state."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def describe(self) -> list[Metric]:
        return []  # so that registering asks the backend nothing

    def collect(self) -> Iterator[Metric]:
        state = self._backend.state()
        waiting = sum(request["phase"] == "waiting" for request in state["requests"])
        for name, text, value in (
            ("num_requests_running", "Generations on a mesh.", len(state["requests"]) - waiting),
            ("num_requests_waiting", "Generations that wait for one.", waiting),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value)
        usage = GaugeMetricFamily(
            PREFIX + "kv_cache_usage_perc", "Blocks in use, 0 to 1.", labels=["worker", "role"]
        )
        for worker in state["workers"]:
            if worker["blocks_total"]:
                usage.add_metric(
                    [worker["name"], worker["role"]], worker["blocks_used"] / worker["blocks_total"]
                )
        yield usage
