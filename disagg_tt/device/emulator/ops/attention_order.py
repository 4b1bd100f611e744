"""Attention summed in one order, so that a token's result does not depend on which op computed it, or beside what.

A prompt may be read whole, in chunks over a cache, or, as a conversation goes on, partly by decode steps. The device goes
through the keys tile by tile in each case. A CPU's library sums one product over all keys, and torch's own attention, in an
order that depends on their shapes; one bfloat16 step of difference in layer 1 is another token some hundred tokens later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_KEYS = 128  # summed by one matrix product: libraries split longer sums, each length in its own way
_ROWS = 4  # fewer rows are multiplied by other routines, which sum otherwise
_QUERIES = 128  # attended at a time when causal, so that keys after them cost nothing


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return float32 [..., rows, head_dim]: softmax(q k^T + mask) v.

    q is [..., rows, head_dim], already scaled; k and v are [..., keys, head_dim]. `mask` [..., rows or 1, n] is added to the
    last n keys' scores. Whole tiles of 32 keys behind the last one seen, masked with -inf, change no bit of the result.
    """
    rows, keys = q.shape[-2], k.shape[-2]
    if rows < _ROWS:
        more = (0, 0, 0, _ROWS - rows)
        q, mask = F.pad(q, more), F.pad(mask, more) if mask is not None and mask.shape[-2] > 1 else mask
    scores = torch.matmul(q, k.transpose(-1, -2))
    if mask is not None:
        scores[..., keys - mask.shape[-1] :] += mask
    weights = torch.softmax(scores, dim=-1)
    out = torch.matmul(weights[..., :_KEYS], v[..., :_KEYS, :])
    for first in range(_KEYS, keys, _KEYS):
        some = slice(first, first + _KEYS)
        out += torch.matmul(weights[..., some], v[..., some, :])
    return out[..., :rows, :]


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return float32 [n, group, S, head_dim]: `attend` of the last S of T tokens, each over the tokens up to itself.

    q is [n, group, S, head_dim], already scaled, k and v are [n, T, head_dim]: `group` query heads share a head of K and V.
    """
    n, group, tokens, dim = q.shape
    before = k.shape[1] - tokens
    out = torch.empty_like(q)
    for first in range(0, tokens, _QUERIES):
        end = min(first + _QUERIES, tokens)
        size = end - first
        unseen = torch.full((size, size), float("-inf")).triu_(1).repeat(group, 1)
        seen = before + end
        some = attend(q[:, :, first:end].reshape(n, -1, dim), k[:, :seen], v[:, :seen], unseen)
        out[:, :, first:end] = some.view(n, group, size, dim)
    return out
