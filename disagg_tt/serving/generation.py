"""What passes between the HTTP server and what generates: one generation asked for, and the tokens that come of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from disagg_tt.tokens import Logprob, Sampling


@dataclass(frozen=True)
class Generation:
    """One answer that is wanted. The text, its stop strings and its stream are the server's; this is tokens only.

    id: unique among those in flight. tokens: the prompt, at least one. max_new_tokens: at least 1; with the prompt within
    the model's limit. logprobs: how many alternatives to report a token (0: the token's own alone), None for no
    logprobs. eos_token_ids: the tokens that end it, none with ignore_eos. conversation: the client's name for
    the conversation, if it gave one. arrived_at: when the request came, s of time.monotonic(), for its time budget.
    """

    id: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    conversation: str | None = None
    arrived_at: float = 0.0


@dataclass(frozen=True)
class NewToken:
    """One token of an answer, in order. finish_reason: None, "stop" (an EOS token, which this then is) or "length"."""

    token: int
    finish_reason: str | None = None
    logprob: Logprob | None = None


@dataclass
class Account:
    """What a generation cost; filled in as it goes, complete when its last token is out.

    route: "pd", "ppd" or "local" (no prefill worker), with the router's reason, one of few (it is a metric's label). The prompt's tokens by source add up to
    its length: computed (this request's prefill), local_cache (found on the decode mesh), transferred (of those computed
    or cached on the prefill mesh, the ones that came over the wire are counted here and not as computed).
    budget_ms: parts of the time to the first token, in ms, by name ("queue" and "prefill" among them), in the order in
    which they happened; they add up to ttft_ms; both known with the first token.
    """

    route: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    transferred_tokens: int = 0
    restarts: int = 0
    ttft_ms: float = 0.0
    budget_ms: dict[str, float] = field(default_factory=dict)


class Stream(Protocol):
    """The tokens of one generation, and its account. Leaving the iteration early, or `aclose`, cancels it everywhere."""

    account: Account

    def __aiter__(self) -> AsyncIterator[NewToken]: ...
    async def aclose(self) -> None: ...


class WorkerState(TypedDict):
    """One worker as the page shows it.

    role: "prefill", "decode" or "both". status: "starting", "idle", "busy" or "lost". running, waiting: requests. Slots are
    0 of 0 on a worker that does not decode. blocks_used: referenced by a request; blocks_cached: kept for reuse alone.
    """

    name: str
    role: str
    status: str
    running: int
    waiting: int
    slots_used: int
    slots_total: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int


class RequestState(TypedDict):
    """One generation in flight. phase: "waiting", "prefill", "transfer" or "decode". Workers: "" while there is none."""

    id: str
    conversation: str | None
    phase: str
    route: str
    prefill_worker: str
    decode_worker: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    age_ms: float


class LayerSpan(TypedDict):
    """When one layer's K and V were sent and had arrived, in ms since their prefill's start."""

    sent_ms: float
    arrived_ms: float


class TransferState(TypedDict):
    """One finished transfer. request: the generation's id. age_ms: since its prefill's start; prefill_ms: how long that took.

    layers: in order. tokens, bytes: what travelled. hidden_ms: transfer under the prefill; exposed_ms: after it.
    handover_ms: from the prefill's end to the decode rank's first step.
    """

    request: str
    source: str
    target: str
    age_ms: float
    prefill_ms: float
    layers: list[LayerSpan]
    tokens: int
    bytes: int
    hidden_ms: float
    exposed_ms: float
    handover_ms: float


class State(TypedDict):
    """The deployment at this moment, as JSON: `GET /state`, the page and the gauges of /metrics. transfers: newest first, some 8."""

    mode: str
    workers: list[WorkerState]
    requests: list[RequestState]
    transfers: list[TransferState]


class Backend(Protocol):
    """What the HTTP server stands on; frontend.Frontend is the real one, tests may have another.

    Errors of a generation, raised by `generate` or while its tokens are awaited (errors.py): OverloadError (429 or 503
    with Retry-After), PeerError or another DisaggError for a generation that failed (500, or an error event in a stream).
    """

    mode: str  # "pd", "ppd" or "auto"
    on_transfer: Callable[[TransferState], None]  # called with each that has ended

    def generate(self, wanted: Generation) -> Stream:
        """Begin `wanted`; raises OverloadError at once when it cannot even wait."""
        ...

    def health(self) -> dict[str, Any]:
        """Return {"status": "ok" | "degraded" | "unavailable", ...}: the workers by role and state; no secrets."""
        ...

    def state(self) -> State:
        """Return what the page shows: workers, what is in flight, slots and blocks in use, the last transfers."""
        ...

    def trace(self) -> dict[str, Any]:
        """Return the last requests as a timeline in Chrome's trace format: each one's time budget, transfer and decoding."""
        ...

    def conversations(self) -> list[dict[str, Any]]:
        """Return what the router knows of conversations: id, turns, tokens, decode worker, last use."""
        ...

    def clear_conversations(self) -> int:
        """Forget all conversations; return how many there were. What is cached on the meshes stays usable."""
        ...
