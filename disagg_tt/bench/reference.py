"""The other side of a comparison: the same checkpoint in `transformers`, float32, greedy, on the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Reference:
    """One checkpoint in transformers, in this process, computed by `threads` torch threads."""

    def __init__(self, model: Path, threads: int):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._model = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = (
            None  # no end before the last token, as with --ignore-eos
        )

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Return the seconds from the call of `generate` to each new token; prompts must be equally long."""
        import torch

        ids = torch.tensor(prompts)
        times: list[float] = []

        def note(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter() - started)
            return torch.zeros(len(tokens), dtype=torch.bool)  # nothing stops here

        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        started = time.perf_counter()
        # called after each token, at any batch, which a streamer is not
        self._model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[note], **options)
        return times

    def decode_rate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Return tokens/s of decoding alone: from the first token, the prefill's, to the last."""
        times = self._generate(prompts, new_tokens)
        return len(prompts) * (len(times) - 1) / (times[-1] - times[0])

    def prefill_rate(self, prompt: list[int]) -> float:
        """Return prompt tokens/s to the first token."""
        return len(prompt) / self._generate([prompt], 1)[0]
