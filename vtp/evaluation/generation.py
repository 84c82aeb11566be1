"""How close generated pictures come to real ones, and whether they show what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from vtp.config import ConfigError
from vtp.evaluation.reconstruction import accumulate
from vtp.metrics.extractors import Extractor
from vtp.metrics.frechet import Moments, frechet_distance

Shown = Iterable[tuple[Tensor, Tensor]]  # batches of (bytes [b 3 h w], the class each should show [b]), of any sizes b


@torch.no_grad()
def measure(
    pictures: Shown, reference: Moments, extractor: Extractor, answer: Callable[[Tensor], Int[Tensor, " b"]] | None
) -> dict[str, float]:
    """The Frechet distance of pictures to a reference, and the share in which a classifier sees the class asked for.

    Args:
        reference: moments of the extractor's features of real pictures.
        extractor: the distance is called g + its figure: gfid only in Inception's features.
        answer: pictures -> their classes; None leaves class_agreement out.

    Raises:
        ConfigError: no pictures.
    """
    found: Moments | None = None
    right = 0
    for shown, asked in pictures:
        found = accumulate(found, extractor, shown)
        right += 0 if answer is None else int((answer(shown) == asked).sum())
    if found is None:
        raise ConfigError("there are no pictures to measure")
    metrics = {f"g{extractor.figure}": frechet_distance(found, reference)}
    return metrics if answer is None else metrics | {"class_agreement": right / found.count}


@torch.no_grad()
def reference_moments(pictures: Iterable[Tensor], extractor: Extractor) -> Moments:
    """Moments of the features of real pictures, bytes [b 3 h w] in batches."""
    found: Moments | None = None
    for shown in pictures:
        found = accumulate(found, extractor, shown)
    if found is None:
        raise ConfigError("there are no pictures to compare with")
    return found
