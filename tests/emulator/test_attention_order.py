"""Attention is summed in one order: neither the rows beside a query nor masked keys behind it change a bit."""

from __future__ import annotations

import pytest
import torch
from tensors import generator

from disagg_tt.device.emulator.ops.attention_order import attend, attend_causally

TOKENS, GROUP, DIM = 480, 2, 64


@pytest.mark.parametrize("queries", [1, 2, 3, 8, 100])
def test_a_query_has_the_same_bits_alone_or_among_others_and_with_masked_keys_behind_it(queries: int) -> None:
    random = generator(1)
    q = torch.randn(2, GROUP, TOKENS, DIM, generator=random)
    k, v = torch.randn(2, 2, TOKENS, DIM, generator=random)
    whole = attend_causally(q, k, v)
    for last in range(-(-queries // 32) * 32, TOKENS + 1, 32):
        some = q[:, :, last - queries : last]
        assert torch.equal(
            attend_causally(some, k[:, :last], v[:, :last]), whole[:, :, last - queries : last]
        )
        unseen = torch.zeros(TOKENS).masked_fill(torch.arange(TOKENS) >= last, -torch.inf)
        one = attend(q[:, :, last - 1], k, v, unseen[None])
        assert torch.equal(one, whole[:, :, last - 1])


@pytest.mark.parametrize("tokens", [1, 3, 128, 129, 300])
def test_causal_attention_is_a_softmax_over_the_tokens_so_far(tokens: int) -> None:
    random = generator(2)
    q = torch.randn(2, GROUP, tokens, DIM, generator=random)
    k, v = torch.randn(2, 2, 310, DIM, generator=random)
    scores = torch.einsum("ngsd,ntd->ngst", q, k)
    seen = torch.arange(310) <= 310 - tokens + torch.arange(tokens)[:, None]
    expected = torch.einsum("ngst,ntd->ngsd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attend_causally(q, k, v), expected, rtol=1e-5, atol=1e-5)
