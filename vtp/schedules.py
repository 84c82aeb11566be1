"""Schedules over a run, counted in images seen, so that changing the batch size moves none of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """From `start` to `end`, linearly over the first `share` of the run, then flat.

    `share` 1 ramps over the whole run; `cosine` bends the ramp to half a cosine.
    """

    start: float
    end: float
    share: float = 1.0
    cosine: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is a fraction of the run, 0..1, not {self.share}")

    def __call__(self, images: int, total: int) -> float:
        """Value after `images` of `total` images."""
        ramp = self.share * total
        done = images / ramp if images < ramp else 1.0
        if self.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear from 0 to `peak` over `warmup` (a share of the run), then half a cosine down to `end`."""

    peak: float
    warmup: float = 0.05
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run, 0 <= warmup < 1, not {self.warmup}")

    def __call__(self, images: int, total: int) -> float:
        """Value after `images` of `total` images."""
        warm = self.warmup * total
        if images < warm:
            return self.peak * images / warm
        done = min(1.0, (images - warm) / max(1.0, total - warm))
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * done)) / 2
