"""Fidelity of single pictures. Every figure is per image, so that a mean over a data set is a sum over a count."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MARGIN = 5  # pixels on each side that SSIM's window of 11 reaches
BAND = 2**20  # pixels whose SSIM is computed at a time: 0.4 GB


def psnr(pred: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image, dB: 20 log10(255 / sqrt(mse)) on pixels times 255, not rounded.

    Args:
        pred, target: pixels in 0..1. Equal images have infinite PSNR.
    """
    error = (pred.float() - target.float()).mul(255).square().mean((1, 2, 3))
    return 20 * torch.log10(255 / error.sqrt())


def ssim(pred: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image, at most 1 (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5).

    As the published protocol has it (torchmetrics): mirrored at the edges, mean over pixels and channels.

    Args:
        pred, target: pixels in 0..1, at least 11 x 11.

    Raises:
        ValueError: smaller images.
    """
    if min(pred.shape[-2:]) < 11:
        raise ValueError(f"ssim: images of {pred.shape[-2]} x {pred.shape[-1]} are smaller than its window of 11 x 11")
    from torchmetrics.functional.image import structural_similarity_index_measure

    count, _, height, width = pred.shape
    band = max(1, BAND // (count * width))
    total = pred.new_zeros(count, dtype=torch.float64)
    for first in range(0, height, band):
        top, last = max(0, first - MARGIN), min(height, first + band)
        rows = slice(top, last + MARGIN)
        _, similar = structural_similarity_index_measure(
            pred[..., rows, :].float(), target[..., rows, :].float(), data_range=1.0, reduction="none",
            return_full_image=True,
        )  # fmt: skip
        total += similar[..., first - top : last - top, :].sum((1, 2, 3), dtype=torch.float64)
    return (total / (3 * height * width)).float()
