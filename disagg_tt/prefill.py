"""The prefill side of a request.

1. announce the request; the decode side reserves a slot          sender.announce
2. run the layers; each layer's K and V leave when they exist     model.prefill, sender.send_layer
3. take the first token from the last row of the logits           first_token
4. send the metadata: length and first token, in integers         sender.finish
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from disagg_tt.core import TILE, Request
from disagg_tt.device import ttnn
from disagg_tt.device.host import read
from disagg_tt.kv_stream.base import Guard, KVSender, Metadata, PrefillTimes
from disagg_tt.model.llama import Llama
from disagg_tt.perf import Timeline
from disagg_tt.tokens import Choice, Sampling, choose

FirstToken = Callable[[int], None]


def first_token(
    model: Llama, logits: Any, length: int, sampling: Sampling, logprobs: int | None = None
) -> Choice:
    """Choose the token after a prompt of `length` tokens from the logits of its last tile, waiting for them."""
    row = (length - 1) % TILE
    if sampling.greedy and logprobs is None:
        return Choice(int(read(model.greedy(logits), lambda: torch.zeros(1, TILE))[0, row]))
    values = read(logits, lambda: torch.zeros(1, 1, TILE, model.config.vocab_size))
    return choose(values[0, 0, row].float(), sampling, length, logprobs)


class Prefill:
    """Prefills requests, one at a time, and streams their K and V through `sender`."""

    def __init__(
        self,
        model: Llama,
        sender: KVSender,
        sampling: Sampling,
        timeline: Timeline,
        guard: Guard = nullcontext,
    ):
        """Make it; `guard(what)` is entered around each wait for the device, which has no deadline of its own."""
        self.model, self.sender, self.sampling, self.timeline = model, sender, sampling, timeline
        self._guard = guard

    def run(self, request: Request, on_first_token: FirstToken) -> int:
        """Prefill and stream `request`; `on_first_token` is called with it as soon as it is known.

        Returns the bytes that the stream put on the wire. Raises what the sender raises.
        """
        called = time.monotonic()
        with self.timeline.span("announce", request=request.id):
            self.sender.announce(request)
        started = time.monotonic()
        logits = self.model.prefill(list(request.tokens), self.sender.send_layer)
        with self._guard(f"the first token of request {request.id}"):  # behind the sends of its layers
            token = first_token(self.model, logits, len(request.tokens), self.sampling).token
        computed = time.monotonic()
        started += self.sender.waited_s  # for a slot, behind the first layer's first products
        on_first_token(token)
        self.timeline.add("prefill", started, computed, request=request.id, tokens=len(request.tokens))
        metadata = Metadata(request.id, len(request.tokens), token, self.model.config.num_hidden_layers)
        what = f"the K/V of request {request.id} to leave"
        with self._guard(what), self.timeline.span("send the rest", request=request.id):
            self.sender.finish(metadata, PrefillTimes(called, started, computed))
        return self.sender.bytes_sent

    def warm_up(self, length: int) -> None:
        """Compile the programs of a prompt of `length` tokens; sends nothing."""
        self.model.greedy(self.model.prefill([0] * length, lambda layer, k, v: None))
        ttnn.synchronize_device(self.model.mesh)
