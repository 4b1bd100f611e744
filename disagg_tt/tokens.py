"""Tokens that come out: choosing the next one, when to stop, and the text so far."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from disagg_tt.config import check_sampling
from disagg_tt.errors import DeviceError

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step
REPLACEMENT = "\ufffd"  # what decoding gives for bytes that make no character (yet)
WINDOW, CONTEXT = 32, 8  # tokens that are decoded together: cut when there are more, and left by the cut


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest. InputError for a value not allowed."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k, self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the seed plays no part."""
        return self.temperature == 0


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on these alone: output `position` of SplitMix64 seeded by mix(seed).

    No state and no library's generator, so every rank draws from the same stream wherever it joins.
    """
    return (
        _mix(_mix(seed) + (position + 1) * GOLDEN) >> 12
    ) * 2.0**-52  # 52 bits: u * total stays below total


def _mix(value: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit numbers."""
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The token id for `position`, from `logits` [vocabulary] float32: temperature, then top-k, then top-p.

    Equal arguments give equal tokens on any machine. Equal logits rank by token id. Logits that are not
    finite are never chosen; DeviceError where none is finite.
    """
    best = int(torch.argmax(logits))
    if not torch.isfinite(logits[best]):  # argmax finds a NaN or an infinity first, so one look is enough
        logits = torch.where(torch.isfinite(logits), logits, -torch.inf)
        best = int(torch.argmax(logits))
        if not torch.isfinite(logits[best]):
            raise DeviceError(
                f"no logit of {logits.numel()} at position {position} is finite; the device's "
                "result is damaged: check weights and cache, then run again"
            )
    if sampling.greedy:
        return best
    weights = torch.exp((logits.double() - logits[best].double()) / sampling.temperature)
    ids = torch.arange(len(weights))
    if 0 < sampling.top_k < len(weights) or sampling.top_p < 1:
        weights, ids = _nucleus(weights, sampling.top_k, sampling.top_p)
    cumulative = torch.cumsum(weights, 0)
    drawn = torch.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], right=True)
    return int(ids[drawn])


def _nucleus(weights: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` heaviest (0: all), of them the fewest that reach share `top_p`: falling weights and ids."""
    if 0 < top_k < len(weights):
        floor = torch.topk(weights, top_k).values[-1]
    else:  # what lies below this is less than 1 - top_p in all, so none of it is needed: a short sort
        top_k, floor = len(weights), (1 - top_p) * weights.sum() / len(weights)
    ids = torch.nonzero(weights >= floor).squeeze(1)
    weights, order = torch.sort(weights[ids], descending=True, stable=True)
    weights, ids = weights[:top_k], ids[order][:top_k]
    if top_p < 1:
        cumulative = torch.cumsum(weights, 0)
        kept = int(torch.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        weights, ids = weights[:kept], ids[:kept]
    return weights, ids


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the model, before temperature, top-k and top-p; and the likeliest alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob(logits: torch.Tensor, token: int, alternatives: int) -> Logprob:
    """The log-probability of `token` and the `alternatives` likeliest tokens with theirs, from `logits` [vocabulary]."""
    values = torch.log_softmax(logits.double(), 0)
    top = torch.topk(values, min(alternatives, len(values)))
    return Logprob(float(values[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


@dataclass(frozen=True)
class Choice:
    """A token that was chosen, with its log-probability if that was asked for."""

    token: int
    logprob: Logprob | None = None


def choose(logits: torch.Tensor, sampling: Sampling, position: int, logprobs: int | None) -> Choice:
    """Choose the token for `position` from `logits` [vocabulary] float32; `logprobs` alternatives are reported, None: no
    log-probability at all."""
    token = sample(logits, sampling, position)
    return Choice(token, None if logprobs is None else logprob(logits, token, logprobs))


class Decoder(Protocol):
    """What `TextStream` needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""


class TextStream:
    """Text of one answer as its tokens come; knows when the answer has ended.

    finished: None, 'stop' (an EOS token or a stop string) or 'length' (`max_new_tokens` came).
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str],
        eos_ids: Collection[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
    ):
        self.finished: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._eos_ids = frozenset() if ignore_eos else frozenset(eos_ids)
        self._left = max_new_tokens
        self._window: list[int] = []  # the last tokens, decoded together since one may need its neighbours
        self._shown = 0  # characters of the window's text that are settled
        self._unsettled = 0  # tokens since the window's text was last whole characters
        self._held = ""  # settled, but it may become a stop string
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far; the stop string is not part of it."""
        return "".join(self._parts)

    def push(self, token_id: int) -> str:
        """Take the next token; the text that it settles, everything held where it ends the answer.

        Once finished, further tokens (a batch may decode a step more) change nothing.
        """
        if self.finished:
            return ""
        self._left -= 1
        if token_id in self._eos_ids:
            self.finished = "stop"
            return self.flush()
        text = self._release(self._settle(token_id))
        if self.finished is None and self._left <= 0:
            self.finished = "length"
            text += self.flush()
        return text

    def flush(self) -> str:
        """What is still held, at the end of the answer; a character that never became whole is U+FFFD."""
        text = self._release(self._tokenizer.decode(self._window)[self._shown :])
        self._window, self._shown = [], 0
        if self._held:
            text += self._held
            self._parts.append(self._held)
            self._held = ""
        return text

    def _settle(self, token_id: int) -> str:
        """The characters that are whole now; one that is not yet decodes to U+FFFD at the end, and waits.

        A character has 4 bytes at most, so after 4 tokens only the last 3 can still become whole.
        """
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        pending = len(text) - len(text.rstrip(REPLACEMENT))
        self._unsettled = self._unsettled + 1 if pending else 0
        if self._unsettled > 3:
            pending = min(pending, 3)
        settled = text[self._shown : len(text) - pending]
        self._shown = max(self._shown, len(text) - pending)
        if len(self._window) > (2 * WINDOW if pending else WINDOW):  # rather between two characters
            self._cut(len(text) - self._shown)
        return settled

    def _cut(self, waiting: int) -> None:
        """Shorten the window, from a token that begins a character where one is near."""
        for count in range(CONTEXT, CONTEXT + 4):
            text = self._tokenizer.decode(self._window[-count:])
            if REPLACEMENT not in text[: len(text) - waiting]:
                break
        self._window = self._window[-count:]
        self._shown = max(len(text) - waiting, 0)

    def _release(self, text: str) -> str:
        """Add settled text; give what cannot belong to a stop string, and finish where one is whole."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.finished = "stop"
            text, self._held = self._held[: min(found)], ""
            self._window, self._shown = [], 0  # what came after the stop string is never shown
        else:
            kept = max(
                (
                    size
                    for stop in self._stop
                    for size in range(1, len(stop))
                    if self._held.endswith(stop[:size])
                ),
                default=0,
            )
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if text:
            self._parts.append(text)
        return text
