"""Statistics of a tokenizer's latents, by channel: what makes them mean 0 and variance 1, and where that comes from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vtp.config import ConfigError

LATENT_STATS = "latent_stats.json"  # beside model.safetensors in a published folder


@dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """Mean and standard deviation of every latent channel, and what they were taken over.

    Raises:
        ConfigError: means and deviations of different numbers of channels, a number that is not finite, or a deviation
            below 0.
    """

    mean: tuple[float, ...]  # per channel, over all latents and positions
    std: tuple[float, ...]  # per channel, unbiased
    count: int | None  # images; None here and below: not known
    size: int | None  # side of the images in pixels
    data: str | None
    tokenizer_sha256: str | None  # of the model.safetensors that made the latents

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != len(self.std) or not finite or min(self.std, default=0.0) < 0:
            raise ConfigError(
                f"latent statistics with {len(self.mean)} means and {len(self.std)} standard deviations; "
                "there must be one finite number of each for every channel, deviations not below 0"
            )

    def normalise(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """To mean 0 and standard deviation 1 in every channel; a channel that never changes becomes 0."""
        mean, std = self._tensors(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Back to what the tokenizer's decoder reads."""
        mean, std = self._tensors(latents)
        return latents * std + mean

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tensor([self.mean, self.std], dtype=like.dtype)[..., None, None]
        mean, std = both.to(like.device, non_blocking=True)  # made on a GPU it would be waited for
        return mean, std.clamp(min=1e-6)

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all numbers of all channels: the mixture's moments from the channels'."""
        channels = len(self.mean)
        mean = math.fsum(self.mean) / channels
        variance = math.fsum(s**2 + (m - mean) ** 2 for m, s in zip(self.mean, self.std, strict=True)) / channels
        return mean, math.sqrt(variance)


def read_stats(file: Path) -> ChannelStats:
    """Statistics from latent_stats.json, from the stats.json of `vtp latents`, or from a published latents_stats.pt.

    A .pt holds {"mean", "std"}, each [1 c 1 1], and says nothing of where they come from.

    Raises:
        ConfigError: there is no such file, or it does not describe latents.
    """
    if not file.is_file():
        raise ConfigError(f"no latent statistics at {file}; `vtp latents TOKENIZER --data DATA --out DIR` makes them")
    saved = _published(file) if file.suffix == ".pt" else json.loads(file.read_text())
    try:
        values: dict[str, Any] = {field.name: saved[field.name] for field in fields(ChannelStats)}
        mean, std = (tuple(map(float, values.pop(name))) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} does not describe latents: {error}") from None
    try:
        return ChannelStats(mean=mean, std=std, **values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def write_stats(folder: Path, stats: ChannelStats) -> None:
    """To latent_stats.json in a published folder."""
    values = {field.name: getattr(stats, field.name) for field in fields(ChannelStats)}
    (folder / LATENT_STATS).write_text(json.dumps(values, indent=2) + "\n")


def _published(file: Path) -> dict[str, Any]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        found = {name: saved[name].flatten().tolist() for name in ("mean", "std")}
    except Exception as error:  # torch has no one class for a file that it cannot read
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f'{file} is no published {{"mean", "std"}} ({type(error).__name__}: {reason})') from None
    return dict.fromkeys(field.name for field in fields(ChannelStats)) | found
