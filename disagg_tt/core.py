"""The few things that every part of the program shares: a request, its answer, and the two roles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PREFILL, DECODE = "prefill", "decode"
TILE = 32


def whole_tiles(tokens: int) -> int:
    """Return `tokens` rounded up to whole tiles of 32, the unit in which K and V are stored and sent."""
    return -(-tokens // TILE) * TILE


@dataclass(frozen=True)
class Request:
    """One prompt to answer. `tokens` stay on the prefill side; the decode side is told only their number."""

    id: int
    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Answer:
    """What one request produced: all new tokens, the text, why it ended ('stop' or 'length') and its measurements."""

    request: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    perf: dict[str, Any] = field(default_factory=dict)
