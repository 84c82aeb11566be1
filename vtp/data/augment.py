"""Colour, blur and solarisation of whole batches on the training device: what would be the slowest part in a worker.

Random numbers come from a generator on the CPU, so that a run draws the same on every device and nothing waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vtp.config import ConfigError, within
from vtp.data.batches import Batch
from vtp.images import normalise

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue: what changes nothing


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths and probabilities; the defaults are DINOv2's. The CLIP view stays as it is unless clip_jitter > 0."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # in turns of the colour circle
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: tuple[float, float] = (1.0, 0.1)  # first and second global crop
    local_blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; shrink it with the crops
    solarize_probability: float = 0.2  # second global crop
    clip_jitter: float = 0.0  # brightness, contrast and saturation of the CLIP view (never its hue: captions name it)

    def __post_init__(self) -> None:
        within(self, "brightness contrast saturation clip_jitter", 0, 1)
        within(self, "jitter_probability gray_probability blur_probability local_blur_probability", 0, 1)
        within(self, "solarize_probability", 0, 1)
        within(self, "hue", 0, 0.5)
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ConfigError(f"augment.blur_sigma={list(self.blur_sigma)}: write [low, high] with 0 < low <= high")


def finish(batch: Batch, cfg: AugmentConfig, generator: torch.Generator) -> Batch:
    """Turn a loader's bytes into augmented, ImageNet-normalised floats, on the device where the batch lies.

    Args:
        generator: on the CPU; the caller seeds it by (seed, rank, step).
    """
    clip, ssl, rec = batch.clip, batch.ssl, batch.rec
    if clip is not None:
        images = _unit(clip.images)
        if cfg.clip_jitter > 0:
            strengths = (cfg.clip_jitter, cfg.clip_jitter, cfg.clip_jitter, 0.0)
            jitter(images, *draw_jitter(len(images), strengths, 1.0, generator))
        clip = clip._replace(images=normalise(images))
    if ssl is not None:
        views, local = _unit(ssl.global_crops), _unit(ssl.local_crops)
        probabilities = (*cfg.blur_probability, cfg.local_blur_probability)
        for crops, probability in zip((*views, local.flatten(0, 1)), probabilities, strict=True):
            _colour(crops, cfg, generator)
            _blur(crops, probability, cfg, generator)
        _on(views[1], _chosen(len(views[1]), cfg.solarize_probability, generator), solarize)
        ssl = ssl._replace(global_crops=normalise(views), local_crops=normalise(local))
    if rec is not None:
        if clip is not None and rec.shared:
            rec = rec._replace(images=clip.images[: rec.shared])
        else:
            rec = rec._replace(images=normalise(_unit(rec.images)))
    return batch._replace(clip=clip, ssl=ssl, rec=rec)


def _unit(images: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    return images.contiguous().float().div_(255)


def _colour(x: Tensor, cfg: AugmentConfig, generator: torch.Generator) -> None:
    strengths = (cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
    gray = _chosen(len(x), cfg.gray_probability, generator)
    jitter(x, *draw_jitter(len(x), strengths, cfg.jitter_probability, generator))
    _on(x, gray, luma)


def _blur(x: Tensor, probability: float, cfg: AugmentConfig, generator: torch.Generator) -> None:
    low, high = cfg.blur_sigma
    sigma = low + (high - low) * torch.rand(len(x), generator=generator)
    _on(x, _chosen(len(x), probability, generator), blur, sigma)


def _chosen(n: int, probability: float, generator: torch.Generator) -> Int[Tensor, " m"]:
    """The rows that an augmentation of this probability falls on."""
    return (torch.rand(n, generator=generator) < probability).nonzero().flatten()


def _on(x: Tensor, rows: Int[Tensor, " m"], operation: Callable[..., Tensor], *drawn: Float[Tensor, " b"]) -> None:
    """Write the operation on the given images, each with its own drawn numbers, into x; the host waits for nothing."""
    if len(rows):
        there = rows.to(x.device, non_blocking=True)
        new = operation(x.index_select(0, there), *(values[rows].to(x.device, non_blocking=True) for values in drawn))
        x.index_copy_(0, there, new.expand(-1, 3, -1, -1))


def draw_jitter(
    n: int, strengths: tuple[float, float, float, float], probability: float, generator: torch.Generator
) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "n 4"]]:
    """Draw one colour jitter an image, as torchvision's ColorJitter: factors, and the order of the four operations.

    Args:
        strengths: brightness, contrast, saturation (factors from 1 - s to 1 + s) and hue (turns from -s to s).
        probability: that an image is jittered at all; the factors of one that is not change nothing.
    """
    u = torch.rand(n, 4, generator=generator) * 2 - 1
    u[torch.rand(n, generator=generator) >= probability] = 0
    return torch.tensor(NEUTRAL) + torch.tensor(strengths) * u, torch.rand(n, 4, generator=generator).argsort(1)


def jitter(x: Float[Tensor, "b 3 h w"], factors: Float[Tensor, "b 4"], order: Int[Tensor, "b 4"]) -> None:
    """Change brightness, contrast, saturation and hue of each image (0..1) in place, in the image's own order.

    Each operation is torchvision's (to 1e-5), clamped as there.
    """
    for place in order.T:
        for which, operation in enumerate((brightness, contrast, saturation, hue)):
            rows = ((place == which) & (factors[:, which] != NEUTRAL[which])).nonzero().flatten()
            _on(x, rows, operation, factors[:, which])


def brightness(x: Float[Tensor, "b 3 h w"], factor: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(x: Float[Tensor, "b 3 h w"], factor: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Away from the mean luma of the image."""
    return _blend(x, luma(x.mean((2, 3), keepdim=True)), factor)


def saturation(x: Float[Tensor, "b 3 h w"], factor: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Away from the luma of the pixel."""
    return _blend(x, luma(x), factor)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def luma(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def hue(x: Float[Tensor, "b 3 h w"], turns: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Turn the hue of HSV, with saturation and value kept.

    With low and chroma c the least of a pixel's three values and their range, each channel is low + c w(hue), where w
    rises from 0 to 1 within a sixth of the circle, stays for two and falls; and the hue of a pixel lies
    (green + blue - red - low + c) / 6c turns from red, on green's side or on blue's. Written so it needs no case
    analysis, and is several times as fast as the way through HSV.
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(torch.minimum(green, blue), red)
    c = torch.maximum(torch.maximum(green, blue), red).sub_(low)
    angle = (green + blue).sub_(red).sub_(low).add_(c).div_((6 * c).clamp_(min=1e-9)).copysign_(green - blue)
    angle.add_(1 + turns.view(-1, 1, 1)).frac_()
    out = torch.empty_like(x)
    # w of red is 6 |angle - 1/2| - 1, of green 2 - 6 |angle - 1/3|, of blue 2 - 6 |angle - 2/3|, clamped to 0..1.
    for channel, (centre, slope, offset) in enumerate(((1 / 2, 6, -1), (1 / 3, -6, 2), (2 / 3, -6, 2))):
        w = (angle - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(low, c, w, out=out[:, channel])
    return out


def blur(x: Float[Tensor, "b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Gaussian blur of 9 taps with reflected borders, one sigma (in pixels) an image, as two matrix products."""
    rows, columns = (_blur_matrix(sigma, side)[:, None].to(x.dtype) for side in x.shape[-2:])
    return rows @ x @ columns.mT


def _blur_matrix(sigma: Float[Tensor, " b"], side: int) -> Float[Tensor, "b side side"]:
    radius = min(4, side - 1)
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    taps = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    taps = taps / taps.sum(1, keepdim=True)
    position = torch.arange(side, device=sigma.device)[:, None] + offsets  # [side, taps]
    position = side - 1 - (side - 1 - position.abs()).abs()  # reflected at both ends
    matrix = torch.zeros(len(sigma), side, side, device=sigma.device)
    return matrix.scatter_add_(2, position.expand(len(sigma), -1, -1), taps[:, None].expand(-1, side, -1))


def solarize(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Invert what is at least half bright."""
    return torch.where(x >= 128 / 255, 1 - x, x)
