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

Pictures = Iterable[Tensor]  # batches of bytes [b 3 h w], of any sizes b


@torch.no_grad()
def frechet(samples: Pictures, reference: Pictures, extractor: Extractor) -> dict[str, float]:
    """The Frechet distance of two sets of pictures, called g + the extractor's figure: gfid only in Inception's."""
    return {f"g{extractor.figure}": frechet_distance(_moments(samples, extractor), _moments(reference, extractor))}


def _moments(batches: Pictures, extractor: Extractor) -> Moments:
    found: Moments | None = None
    for pictures in batches:
        found = accumulate(found, extractor, pictures)
    if found is None:
        raise ConfigError("there are no pictures to measure")
    return found


@torch.no_grad()
def class_agreement(
    samples: Pictures, asked: Int[Tensor, " n"], answer: Callable[[Tensor], Int[Tensor, " b"]]
) -> dict[str, float]:
    """The share of pictures in which a classifier sees the class that was asked for, in their order."""
    seen = torch.cat([answer(pictures) for pictures in samples])
    return {"class_agreement": (seen == asked).float().mean().item()}
