"""How faithfully images come back: pixel by pixel, and as a set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtp.config import ConfigError
from vtp.images import denormalise, to_uint8
from vtp.metrics.extractors import Extractor
from vtp.metrics.fidelity import psnr, ssim
from vtp.metrics.frechet import Moments, frechet_distance, merge, moments


@torch.no_grad()
def reconstruction(
    reconstruct: Callable[[Tensor], Tensor], data: Iterable[tuple[Tensor, Any]], extractor: Extractor | None = None
) -> dict[str, float]:
    """Means over images of psnr (dB) and ssim, and the Frechet distance of originals and reconstructions.

    Pixel figures are taken on unrounded pixels clamped to 0..1, the distance on bytes, both as published.

    Args:
        reconstruct: ImageNet-normalised images -> the same after encoding and decoding.
        data: batches of (ImageNet-normalised images, anything).
        extractor: names the distance: rfid in Inception's features, r + its figure in others.
    """
    count, sums = 0, {"psnr": 0.0, "ssim": 0.0}
    before: Moments | None = None
    after: Moments | None = None
    for images, _ in data:
        back = reconstruct(images).float()
        images = images.to(back.device)
        count += len(images)
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            sums[name] += metric(denormalise(back), denormalise(images)).double().sum().item()
        if extractor is not None:
            before = accumulate(before, extractor, to_uint8(images))
            after = accumulate(after, extractor, to_uint8(back))
    if count == 0:
        raise ConfigError("the data has no readable image")
    result = {name: total / count for name, total in sums.items()}
    if extractor is not None and before is not None and after is not None:
        result[f"r{extractor.figure}"] = frechet_distance(before, after)
    return result


def accumulate(so_far: Moments | None, extractor: Extractor, pictures: Tensor) -> Moments:
    """Moments with another batch of bytes [b 3 h w] put in."""
    new = moments(extractor.features(pictures).cpu())
    return new if so_far is None else merge(so_far, new)
