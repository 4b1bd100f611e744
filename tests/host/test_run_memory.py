"""A run that cannot fit is refused from its requests alone, before a device is opened."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_tt.config import LLAMA_3_1_8B, Options
from disagg_tt.core import Request
from disagg_tt.errors import PlanError
from disagg_tt.run import Run


def run_of(**options: Any) -> Run:
    """A run of Llama-3.1-8B's size without its files."""
    nothing: Any = None
    return Run(Options(**options), nothing, LLAMA_3_1_8B, nothing, 8192, lambda event: None, nothing)


def requests(count: int, prompt_tokens: int, new_tokens: int) -> list[Request]:
    return [Request(i, (1,) * prompt_tokens, new_tokens) for i in range(count)]


def test_as_many_long_requests_as_fit_are_taken_and_one_more_is_refused():
    run = run_of()
    run.check_memory(2, requests(28, 8000, 192))
    with pytest.raises(PlanError, match="29 slots of 8192 tokens.* a decode chip needs"):
        run.check_memory(2, requests(29, 8000, 192))
    run.check_memory(2, requests(29, 1000, 64))


def test_the_batch_and_the_dtypes_that_were_asked_for_are_planned():
    run_of(batch=8).check_memory(2, requests(32, 8000, 192))
    with pytest.raises(PlanError, match="cache bfloat16"):
        run_of(kv_dtype="bfloat16").check_memory(2, requests(28, 8000, 192))
    with pytest.raises(PlanError, match="a prefill chip needs"):
        run_of(weight_dtype="bfloat16").check_memory(1, requests(1, 100, 10))
