"""Answers in the JSON of OpenAI's two endpoints, whole or chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from disagg_tt.serving.answers import Answer, Piece, Tokenizer
from disagg_tt.serving.api import ChatRequest, CompletionRequest
from disagg_tt.serving.generation import Logprob

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot come; JSON has no infinity
Json = dict[str, Any]


class Shape:
    """What the two endpoints have in common: the head of every object, and the usage."""

    kind, chunk_kind, id_prefix = "", "", ""

    def __init__(self, request: CompletionRequest | ChatRequest, tokenizer: Tokenizer):
        self.id = f"{self.id_prefix}-{uuid4().hex}"
        self._request, self._tokenizer = request, tokenizer
        self._created = int(time.time())

    def chunks(self, piece: Piece, answers: Sequence[Answer]) -> list[Json]:
        """What a stream says of one piece, and, where it was asked for, what all answers used so far."""
        rest: Json = {}
        if self._request.usage_in_stream:
            rest = {"usage": self._usage(answers) if self._request.usage_in_chunks else None}
        return [self._object(self.chunk_kind, [choice], **rest) for choice in self._choices_of_chunk(piece)]

    def last_chunk(self, answers: Sequence[Answer]) -> list[Json]:
        """The usage, where it was asked for."""
        if not self._request.usage_in_stream:
            return []
        return [self._object(self.chunk_kind, [], usage=self._usage(answers))]

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Piece]) -> Json:
        """The response that is not streamed, of all pieces of all answers."""
        of: dict[int, list[Piece]] = {answer.index: [] for answer in answers}
        for piece in pieces:
            of[piece.index].append(piece)
        choices = []
        for answer in answers:
            text = "".join(piece.text for piece in of[answer.index])
            logprobs = [logprob for piece in of[answer.index] for logprob in piece.logprobs]
            choices.append(self._choice(Piece(answer.index, text, logprobs, answer.finish_reason)))
        return self._object(self.kind, choices, usage=self._usage(answers))

    def _object(self, kind: str, choices: list[Json], **rest: Any) -> Json:
        head = {"id": self.id, "object": kind, "created": self._created, "model": self._request.model}
        return {**head, "choices": choices, **rest}

    def _usage(self, answers: Sequence[Answer]) -> Json:
        """Tokens; a prompt counts once, however many answers it has, with what its first answer found cached."""
        firsts = answers[:: self._request.n]
        prompt = sum(len(answer.wanted.tokens) for answer in firsts)
        completion = sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(answer.account.cached_tokens for answer in firsts)
            },
        }

    def _choices_of_chunk(self, piece: Piece) -> list[Json]:
        raise NotImplementedError

    def _choice(self, piece: Piece) -> Json:
        raise NotImplementedError


class CompletionShape(Shape):
    """text_completion, whose chunks are of the same kind."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer):
        super().__init__(request, tokenizer)
        self._with_logprobs = request.logprobs is not None
        self._offsets: dict[int, int] = {}  # of each answer's next token in its text

    def _choices_of_chunk(self, piece: Piece) -> list[Json]:
        return [self._choice(piece)] if piece.text or piece.finish_reason else []

    def _choice(self, piece: Piece) -> Json:
        logprobs = self._logprobs(piece) if self._with_logprobs else None
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> Json:
        tokens, offsets = [], []
        for token, _ in piece.logprobs:
            tokens.append(self._tokenizer.token_text(token))
            offsets.append(self._offsets.get(piece.index, 0))
            self._offsets[piece.index] = offsets[-1] + len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [_number(logprob.logprob) for _, logprob in piece.logprobs],
            "top_logprobs": [self._top(logprob) for _, logprob in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprob: Logprob) -> Json:
        """By text, as OpenAI has it: of two tokens with the same text, the likelier."""
        return {self._tokenizer.token_text(token): _number(value) for token, value in reversed(logprob.top)}


class ChatShape(Shape):
    """chat.completion, and chat.completion.chunk, whose first says the role."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer):
        super().__init__(request, tokenizer)
        self._with_logprobs = request.logprobs
        self._begun: set[int] = set()

    def _choices_of_chunk(self, piece: Piece) -> list[Json]:
        choices = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": ""}
            choices.append({"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if piece.text or piece.finish_reason:
            choices.append(
                {
                    "index": piece.index,
                    "delta": {"content": piece.text} if piece.text else {},
                    "logprobs": self._logprobs(piece),
                    "finish_reason": piece.finish_reason,
                }
            )
        return choices

    def _choice(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._with_logprobs:
            return None
        content = []
        for token, logprob in piece.logprobs:
            top = [self._token(other, value) for other, value in logprob.top]
            content.append({**self._token(token, logprob.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        """bytes: null where the token alone is not whole characters."""
        text = self._tokenizer.token_text(token)
        return {
            "token": text,
            "logprob": _number(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


def _number(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # NaN too
