"""Contrast without the matrix of all pairs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 2**24  # at a time: 64 MB in float32


def sum_over_rows(loss: Callable[..., Tensor], width: int, *rows: Tensor) -> Tensor:
    """loss(*rows), a sum over rows that makes `width` logits of each.

    Where these are many it is taken block by block, and what a block holds is computed again in the backward pass: no
    more than LOGITS exist at once, whatever the batch.
    """
    size = max(1, LOGITS // width)
    if len(rows[0]) <= size:
        return loss(*rows)
    blocks = zip(*(x.split(size) for x in rows), strict=True)
    losses = [checkpoint(loss, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return sum(losses[1:], losses[0])
