"""The requests of OpenAI's API that this server takes: every parameter checked, and none ignored that would matter.

A parameter that this server does not have is accepted at the value that means "without it", which clients like to send,
and refused by name at any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from disagg_tt.config import Message
from disagg_tt.serving.refusal import Refusal, refusal_of_invalid

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # of one request: prompts times n
NewTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]

WITHOUT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
}
WITHOUT_IN_COMPLETIONS = {**WITHOUT, "best_of": (1,), "echo": (False,), "suffix": ("",)}
WITHOUT_IN_CHAT = {
    **WITHOUT,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
WITHOUT_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompt_kind(prompt: object) -> str:
    if not isinstance(prompt, list):
        return "<text>"
    kinds: dict[type, str] = {str: "<texts>", list: "<lists of tokens>"}
    return kinds.get(type(prompt[0]), "<tokens>") if prompt else "<tokens>"


def _content_kind(content: object) -> str:
    return "<parts>" if isinstance(content, list) else "<text>"


# A tag says which of a union's kinds is meant, so that an error names what is wrong with that one. In < >: see refusal.py.
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1), Tag("<texts>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[list[Tokens], Field(min_length=1), Tag("<lists of tokens>")],
    Discriminator(_prompt_kind),
]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Model):
    """include_usage: a last chunk says what the request used; with continuous_usage_stats every chunk does, so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Model):
    """What both kinds of request have in common."""

    without: ClassVar[Mapping[str, tuple[Any, ...]]] = WITHOUT

    model: str = Field(min_length=1, max_length=512)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**24)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(max_length=16),
        BeforeValidator(_one_or_many),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    conversation_id: str | None = Field(None, min_length=1, max_length=512)
    user: str | None = None  # this and the next two are labels for OpenAI's own bookkeeping
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("only allowed when stream is true")
        return options

    @field_validator("min_tokens")
    @classmethod
    def _met_anyhow(cls, count: int, info: ValidationInfo) -> int:
        if count and (not info.data.get("ignore_eos") or info.data.get("stop")):
            raise ValueError(
                "above 0 it is only allowed with ignore_eos and without stop, where it is always met"
            )
        return count

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return (
            self.usage_in_stream
            and self.stream_options is not None
            and self.stream_options.continuous_usage_stats
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    without = WITHOUT_IN_COMPLETIONS

    prompt: Prompt
    max_tokens: NewTokens = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, prompt: Any, info: ValidationInfo) -> Any:
        many = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        if many * info.data.get("n", 1) > MAX_CHOICES:
            raise ValueError(f"prompts times n may be {MAX_CHOICES} at most")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(_Model):
    """A part of a message; text is the only kind that a Llama reads."""

    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<parts>")],
        Discriminator(_content_kind),
    ]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_not_there(cls, message: object) -> object:
        return _without(message, WITHOUT_IN_MESSAGE, "messages") if isinstance(message, dict) else message

    @property
    def text(self) -> str:
        """The content as one text, its parts a line each."""
        return (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    without = WITHOUT_IN_CHAT

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @field_validator("max_completion_tokens")
    @classmethod
    def _not_both(cls, count: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") is not None:
            raise ValueError("not allowed together with max_tokens")
        return count

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, count: int, info: ValidationInfo) -> int:
        if count and not info.data.get("logprobs"):
            raise ValueError("only allowed when logprobs is true")
        return count

    @field_validator("messages")
    @classmethod
    def _some_text(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if not any(message.text.strip() for message in messages):
            raise ValueError("all messages are empty; at least one must have text")
        return messages

    @property
    def template_messages(self) -> list[Message]:
        """The messages as a chat template takes them; of developer, OpenAI's newer word, templates do not know."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: bytes) -> R:
    """Return the request in `body`; raises Refusal (400) naming the parameter. Null is as good as absent."""
    try:
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise Refusal(400, f"The body is not valid JSON in UTF-8: {error}.", "invalid_json") from error
    if not isinstance(fields, dict):
        raise Refusal(
            400, f"The body is a JSON {type(fields).__name__}; an object is needed.", "invalid_json"
        )
    try:
        return kind.model_validate(_without(fields, kind.without))
    except ValidationError as error:
        raise refusal_of_invalid(error) from error


def _without(
    fields: dict[str, Any], without: Mapping[str, tuple[Any, ...]], inside: str = ""
) -> dict[str, Any]:
    """`fields` less what is null and less what this server does not have, at the value that means so."""
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in without:
            kept[name] = value
        elif not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in without[name]
        ):
            param = f"{inside}.{name}".removeprefix(".")
            allowed = ", ".join(["null", *map(repr, without[name])])
            raise Refusal(
                400,
                f"This server does not have '{param}'; it may be left out or be {allowed}.",
                "unsupported_value",
                param,
            )
    return kept
