"""The messages between the hub (in the server's process) and the workers (ranks): one JSON object each, checked by schema.

    worker -> hub  hello                          hub -> worker  challenge      both know the token, see hub.py
                   register                                      welcome        then, in any order:
                                                                 dropped        it is not, or no more, on the list
                   beat                 (each second, so that a rank that hangs is noticed)

    decode         reserve     <-  hub            a slot and blocks for a prompt; the answer says what is cached
                   reserved    ->
                   prefill     <-  hub            compute the rest here (ppd, or no prefill rank)
    prefill        prefill     <-  hub            compute what the decode rank lacks, and stream it there
                   first       ->                 the first token, as soon as it is known
    decode         landed      ->                 all K and V are here; what the transfer cost
                   tokens      ->                 one decode step's tokens
    either         leave       ->                 it ends
                   cancel      <-  hub            the client is gone
                   failed      ->                 this request cannot go on here
    links          open        <-  hub            (workers started by hand) a prefill worker is coming
                   opened      ->                 where it finds us
                   connect     <-  hub
                   linked      ->

Requests have numbers here, unique for the life of the hub.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import StreamError

T = TypeVar("T")

MAX_MESSAGE_BYTES = 8 << 20
BEAT_S = 1.0
LOST_S = 8.0  # without a beat

Number = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Secret = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]  # an HMAC or a session: compared, so ASCII
Role = Literal["prefill", "decode"]
assert (PREFILL, DECODE) == ("prefill", "decode")


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


class Hello(Message):
    kind: Literal["hello"] = "hello"
    nonce: Name


class Challenge(Message):
    kind: Literal["challenge"] = "challenge"
    nonce: Name
    proof: Secret


class Register(Message):
    """A worker, and what it has. `settings` must be the same on all workers: they decide the tokens.

    in_job: it is a rank of a job, with a link to every rank of the other role. prefill_ms: how long a piece of a prompt of
    so many tokens took, step_ms: a decode step; measured when it warmed up, 0 for what it does not do.
    """

    kind: Literal["register"] = "register"
    proof: Secret
    name: Name
    role: Role
    in_job: bool
    digest: Name
    settings: dict[str, str]
    slots: Count
    blocks: Count
    max_seq_len: Count
    prefill_ms: list[tuple[Count, Milliseconds]]
    step_ms: Milliseconds


class Welcome(Message):
    kind: Literal["welcome"] = "welcome"
    session: Secret


class Dropped(Message):
    """The hub does not have, or no longer has, this worker. `again`: it may register anew."""

    kind: Literal["dropped"] = "dropped"
    reason: str = Field(max_length=4000)
    again: bool = False


class State(Message):
    """What a worker shows of itself."""

    in_flight: Count = 0
    waiting: Count = 0
    blocks_in_use: Count = 0
    blocks_cached: Count = 0
    doing: str = Field(default="", max_length=64)


class Beat(Message):
    kind: Literal["beat"] = "beat"
    name: Name
    session: Secret
    state: State


class Wanted(Message):
    """A generation as a worker needs to know it. id: what clients and logs call it."""

    number: Number
    id: Name
    tokens: list[Number] = Field(min_length=1)
    max_new_tokens: int = Field(ge=1, lt=2**24)
    temperature: float = Field(ge=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, le=2**24)
    seed: int = Field(ge=0, lt=2**63)
    logprobs: int | None = Field(ge=0, le=100)
    eos_token_ids: list[Number]


class Reserve(Message):
    kind: Literal["reserve"] = "reserve"
    wanted: Wanted


class Reserved(Message):
    kind: Literal["reserved"] = "reserved"
    number: Number
    cached: Count
    waited_ms: Milliseconds


class Prefill(Message):
    """For a prefill rank `wanted` and where to: the decode rank has the first `cached` tokens. For a decode rank: go on."""

    kind: Literal["prefill"] = "prefill"
    number: Number
    wanted: Wanted | None = None
    decode: str = Field(default="", max_length=128)
    cached: Count = 0


class TokenLogprob(Message):
    logprob: float
    top: list[tuple[int, float]]


class First(Message):
    """The first token, and what it cost: `computed` tokens of the prompt, the others having been in cache."""

    kind: Literal["first"] = "first"
    number: Number
    token: Number
    logprob: TokenLogprob | None
    computed: Count
    waited_ms: Milliseconds
    prefill_ms: Milliseconds


class Landed(Message):
    """A prompt's K and V are in the decode rank's cache, and its first decode step begins; its answer may be whole already.

    id: the generation's. source: the prefill worker, the last one if there were several. tokens: those that came over the wire. prefill_ms, layers: the prefill's length, and when each layer of each chunk was
    sent and had arrived, ms since the prefill's start. hidden_ms, exposed_ms: see perf.py. handover_ms: from the prefill's
    end to now.
    """

    kind: Literal["landed"] = "landed"
    number: Number
    id: Name
    source: Name
    tokens: Count
    bytes: Count
    prefill_ms: Milliseconds
    layers: list[tuple[float, float]] = Field(max_length=4096)
    hidden_ms: Milliseconds
    exposed_ms: Milliseconds
    handover_ms: Milliseconds


class Token(Message):
    number: Number
    token: Number
    finish: str | None = Field(default=None, pattern="^(stop|length)$")
    logprob: TokenLogprob | None = None


class Tokens(Message):
    kind: Literal["tokens"] = "tokens"
    items: list[Token]
    step_ms: Milliseconds


class Cancel(Message):
    kind: Literal["cancel"] = "cancel"
    number: Number


class Leave(Message):
    """The worker ends; what it was doing has to be done elsewhere."""

    kind: Literal["leave"] = "leave"


class Failed(Message):
    """The request cannot go on here. `overload`: it would have to wait too long; `again`: it may be tried anew."""

    kind: Literal["failed"] = "failed"
    number: Number
    reason: str = Field(max_length=4000)
    overload: bool = False
    again: bool = False


class Open(Message):
    kind: Literal["open"] = "open"
    peer: Name


class Opened(Message):
    kind: Literal["opened"] = "opened"
    peer: Name
    address: Name


class Connect(Message):
    kind: Literal["connect"] = "connect"
    peer: Name
    address: Name


class Linked(Message):
    """A prefill worker has a link to this decode worker."""

    kind: Literal["linked"] = "linked"
    peer: Name


class Stop(Message):
    kind: Literal["stop"] = "stop"


ToHub = Annotated[
    Hello | Register | Beat | Reserved | First | Landed | Tokens | Failed | Opened | Linked | Leave,
    Field(discriminator="kind"),
]
ToWorker = Annotated[
    Challenge | Welcome | Dropped | Reserve | Prefill | Cancel | Open | Connect | Stop,
    Field(discriminator="kind"),
]
_TO_HUB: TypeAdapter[ToHub] = TypeAdapter(ToHub)
_TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)


def encode(message: Message) -> bytes:
    """Return the message as it travels; raises StreamError for one that is too long to be taken."""
    data = message.model_dump_json().encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise StreamError(f"a message of {len(data):,} bytes; allowed are {MAX_MESSAGE_BYTES:,}")
    return data


def to_hub(data: bytes) -> ToHub:
    """Return what a worker sent; raises StreamError where it fits no schema."""
    return _checked(_TO_HUB, data)


def to_worker(data: bytes) -> ToWorker:
    """Return what the hub sent; raises StreamError where it fits no schema."""
    return _checked(_TO_WORKER, data)


def _checked(adapter: TypeAdapter[T], data: bytes) -> T:
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        raise StreamError(f"a message {data[:80]!r} fits no schema: {str(error)[:400]}") from None
