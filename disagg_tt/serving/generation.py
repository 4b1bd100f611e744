"""What passes between the HTTP server and what generates: one generation asked for, and the tokens that come of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

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

    route: "pd", "ppd" or "local" (no prefill worker), with the router's reason. The prompt's tokens by source add up to
    its length: computed (this request's prefill), local_cache (found on the decode mesh), transferred (of those computed
    or cached on the prefill mesh, the ones that came over the wire are counted here and not as computed).
    budget_ms: parts of the time to the first token, in ms, by name, in the order in which they happened; they add up to
    ttft_ms. transfer: hidden and exposed ms, bytes, and the handover (prefill's end to the decode rank's first step), ms.
    """

    route: str = ""
    reason: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    transferred_tokens: int = 0
    restarts: int = 0
    ttft_ms: float = 0.0
    budget_ms: dict[str, float] = field(default_factory=dict)
    transfer: dict[str, float] = field(default_factory=dict)


class Stream(Protocol):
    """The tokens of one generation, and its account. Leaving the iteration early, or `aclose`, cancels it everywhere."""

    account: Account

    def __aiter__(self) -> AsyncIterator[NewToken]: ...
    async def aclose(self) -> None: ...


class Backend(Protocol):
    """What the HTTP server stands on; frontend.Frontend is the real one, tests may have another.

    Errors of a generation, raised by `generate` or while its tokens are awaited (errors.py): OverloadError (429 or 503
    with Retry-After), PeerError or another DisaggError for a generation that failed (500, or an error event in a stream).
    """

    mode: str  # "pd", "ppd" or "auto"

    def generate(self, wanted: Generation) -> Stream:
        """Begin `wanted`; raises OverloadError at once when it cannot even wait."""
        ...

    def health(self) -> dict[str, Any]:
        """Return {"status": "ok" | "degraded" | "unavailable", ...}: the workers by role and state; no secrets."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what the page shows: workers, what is in flight, slots and blocks in use, the last transfers."""
        ...

    def conversations(self) -> list[dict[str, Any]]:
        """Return what the router knows of conversations: id, turns, tokens, decode worker, last use."""
        ...

    def clear_conversations(self) -> int:
        """Forget all conversations; return how many there were. What is cached on the meshes stays usable."""
        ...
