"""One run's configuration, checked before any device is touched, and what is built from it on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loguru import logger

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import LlamaConfig, Options
from disagg_tt.core import Answer, Request, whole_tiles
from disagg_tt.decode import Token
from disagg_tt.device import ttnn
from disagg_tt.errors import CheckpointError, PromptError
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint, find_checkpoint
from disagg_tt.model.llama import Llama
from disagg_tt.model.weight_cache import WeightCache
from disagg_tt.perf import decode_times
from disagg_tt.plan import Setup, default_weight_dtype, plan
from disagg_tt.prompt import Tokenizer, encode_prompts
from disagg_tt.tokens import Sampling, TextStream
from disagg_tt.watchdog import Watchdog

MAX_SLOTS = 32

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Run:
    """A run's configuration, checked: everything that needs no device."""

    options: Options
    checkpoint: Checkpoint
    config: LlamaConfig
    tokenizer: Tokenizer
    max_seq_len: int
    emit: Emit
    watchdog: Watchdog

    @property
    def sampling(self) -> Sampling:
        o = self.options
        return Sampling(temperature=o.temperature, top_p=o.top_p, top_k=o.top_k, seed=o.seed)

    def requests(self) -> list[Request]:
        """Return the prompts as requests; raises PromptError for one that is empty or too long."""
        encoded = encode_prompts(self.tokenizer, self.options.prompts, self.options.chat, self.max_seq_len)
        return [Request(i, tuple(tokens), self.options.max_new_tokens) for i, tokens in enumerate(encoded)]

    def text_stream(self, max_new_tokens: int) -> TextStream:
        o = self.options
        return TextStream(self.tokenizer, o.stop, self.config.eos_token_ids, max_new_tokens, o.ignore_eos)

    def tokens_a_slot(self, requests: list[Request]) -> int:
        """Return the tokens of the longest request with its answer, in whole tiles, at most the sequence limit."""
        longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
        return whole_tiles(min(longest, self.max_seq_len))

    def slots(self, requests: int) -> int:
        """Return the number of decode slots for that many requests."""
        return self.options.batch or min(requests, MAX_SLOTS)

    def check_memory(self, chips: int, requests: list[Request]) -> None:
        """Raise PlanError unless the model and a cache for `requests` fit on two meshes of `chips` chips."""
        o = self.options
        dtype = o.weight_dtype or default_weight_dtype(self.config)
        tokens = self.tokens_a_slot(requests)
        plan(Setup(self.config, chips, dtype, o.kv_dtype, self.slots(len(requests)), tokens, o.overlap))

    def load_model(self, mesh: Any, role: str, tokens: int, beat: Callable[[], None] = lambda: None) -> Llama:
        """Load the weights onto `mesh` for sequences of up to `tokens`; `beat` is called before each layer."""

        def progress(layers: range) -> Iterator[int]:
            for layer in layers:
                self.progress(f"{role}: layers loaded", layer, len(layers))
                beat()
                yield layer
            self.progress(f"{role}: layers loaded", len(layers), len(layers))

        dtype = weights.weight_dtype(self.config, self.options.weight_dtype)
        folder = self.options.weight_cache
        cache = WeightCache(folder, self.checkpoint, mesh, dtype) if folder is not None else None
        loaded = weights.load(self.checkpoint, mesh, dtype, progress, cache)
        if cache is not None:
            logger.info(
                "{}: {} tensors converted, the others read from {}", role, cache.converted, cache.folder
            )
        return Llama(mesh, self.config, loaded, whole_tiles(tokens), getattr(ttnn, self.options.kv_dtype))

    def cache(self, mesh: Any, slots: int, tokens: int) -> PagedCache:
        """Return a cache for `slots` requests of up to `tokens` tokens each, whole tiles."""
        pages = tokens // BLOCK
        return PagedCache(
            mesh, self.config, slots, pages, slots * pages, getattr(ttnn, self.options.kv_dtype)
        )

    def progress(self, what: str, done: int, total: int) -> None:
        """Report how far something is."""
        self.emit({"event": "progress", "what": what, "done": done, "total": total})


class Answers:
    """The answers of a run as their tokens come."""

    def __init__(self, emit: Emit):
        self._emit = emit
        self._steps: dict[int, list[float]] = {}
        self.by_request: dict[int, Answer] = {}

    def open(self, request: int, prompt_tokens: int, steps: list[float]) -> None:
        """Begin the answer of `request`; `steps` is where its decode steps' times, in s, are going to be."""
        self.by_request[request] = Answer(request, prompt_tokens)
        self.by_request[request].perf |= {"request": request, "prompt_tokens": prompt_tokens}
        self._steps[request] = steps

    def take(self, token: Token, first: bool = False) -> Answer | None:
        """Add a token, tell of it, and return the answer if that ended it."""
        answer = self.by_request[token.request]
        answer.tokens.append(token.token)
        answer.text += token.text
        self._emit({"event": "token", "request": token.request, "text": token.text, "first": first})
        if token.finish_reason is None:
            return None
        answer.finish_reason = token.finish_reason
        answer.perf |= {"new_tokens": len(answer.tokens), **decode_times(self._steps[token.request], 1)}
        return answer

    def in_order(self) -> list[Answer]:
        """Return the answers by request id."""
        return [self.by_request[i] for i in sorted(self.by_request)]


def read_run(options: Options, emit: Emit, watchdog: Watchdog) -> Run:
    """Check the checkpoint and the limits; raises CheckpointError or PromptError before any device is touched."""
    checkpoint = Checkpoint.open(find_checkpoint(options.model))
    checkpoint.verify()
    config = checkpoint.config
    limit = options.max_seq_len or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise PromptError(
            f"--max-seq-len is {limit}; this model's max_position_embeddings is {config.max_position_embeddings}, use at most that"
        )
    tokenizer = Tokenizer(checkpoint.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that belongs to the checkpoint"
        )
    return Run(options, checkpoint, config, tokenizer, limit, emit, watchdog)
