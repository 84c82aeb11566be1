"""Block masks for masked-image modelling, as in BEiT, iBOT and DINOv2, with an exact total per batch.

How many patches are masked is fixed by the batch size alone, so that every step has the same shapes; which crops are
masked, how much each and where is random.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray


def quotas(n: int, patches: int, probability: float, ratio: tuple[float, float]) -> Int[ndarray, " n"]:
    """Masked patches of each of n crops, before shuffling: the share `probability` of the crops (rounded) gets
    between ratio[0] and ratio[1] of its patches (at least one), evenly spread; the others get none."""
    masked = round(n * probability)
    spread = np.linspace(*ratio, 2 * masked + 1)[1::2] if masked else np.empty(0)  # middles of equal intervals
    counts = np.maximum(1, np.rint(spread * patches)).astype(np.int64)
    return np.concatenate((counts, np.zeros(n - masked, np.int64)))


def block_masks(
    n: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Bool[ndarray, "n patches"]:
    """Masks of n crops of rows x columns patches, True where masked; `quotas` says how many there are in all."""
    rows, columns = grid
    counts = rng.permutation(quotas(n, rows * columns, probability, ratio))
    masks = np.zeros((n, rows, columns), bool)
    for mask, count in zip(masks, counts.tolist(), strict=True):
        _fill(mask, count, rng)
    return masks.reshape(n, rows * columns)


def _fill(mask: Bool[ndarray, "rows columns"], count: int, rng: np.random.Generator) -> None:
    """Mask exactly `count` patches by random blocks; the last block loses single patches where it is too large."""
    rows, columns = mask.shape
    left = count
    while left > 0:
        u = rng.random(4)
        area = min(4, left) + u[0] * (left - min(4, left))
        aspect = math.exp((2 * u[1] - 1) * math.log(1 / 0.3))
        h = min(rows, max(1, round(math.sqrt(area * aspect))))
        w = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, start = int(u[2] * (rows - h + 1)), int(u[3] * (columns - w + 1))
        block = mask[top : top + h, start : start + w]
        fresh = np.flatnonzero(~block)
        if len(fresh) > left:
            fresh = fresh[:left]  # whole rows from the top: still a block
        block.flat[fresh] = True
        left -= len(fresh)


def targets(masks: Bool[ndarray, "n patches"]) -> tuple[ndarray, ndarray]:
    """(positions of the masked patches in the flattened [n * patches], weight 1 / (masked patches of its crop))."""
    flat = np.flatnonzero(masks)
    per_crop = masks.sum(1)
    return flat, (1.0 / per_crop[flat // masks.shape[1]]).astype(np.float32)
