"""Colour, blur and solarisation of whole batches on the training device: what would be the slowest part in a worker.

Random numbers come from a generator on the CPU, so that a run draws the same on every device and nothing waits for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vtp.config import ConfigError, within
from vtp.data.batches import Batch
from vtp.images import normalise


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths and probabilities; the defaults are DINOv2's, but hue turns in YIQ (see `jitter_matrices`).

    The CLIP view stays as it is unless clip_jitter > 0.
    """

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
            none = torch.empty(0, dtype=torch.int64)
            images = jitter(images, *jitter_matrices(len(images), strengths, 1.0, none, generator))
        clip = clip._replace(images=normalise(images))
    if ssl is not None:
        first, second = (_unit(x) for x in ssl.global_crops)
        first = _blurred(_coloured(first, cfg, generator), cfg.blur_probability[0], cfg, generator)
        second = _blurred(_coloured(second, cfg, generator), cfg.blur_probability[1], cfg, generator)
        second = solarize(second, _chosen(len(second), cfg.solarize_probability, generator))
        local = _unit(ssl.local_crops.flatten(0, 1))
        if len(local):
            local = _blurred(_coloured(local, cfg, generator), cfg.local_blur_probability, cfg, generator)
        ssl = ssl._replace(
            global_crops=normalise(torch.stack((first, second))),
            local_crops=normalise(local).unflatten(0, ssl.local_crops.shape[:2]),
        )
    if rec is not None:
        if clip is not None and rec.shared:
            rec = rec._replace(images=clip.images[: rec.shared])
        else:
            rec = rec._replace(images=normalise(_unit(rec.images)))
    return batch._replace(clip=clip, ssl=ssl, rec=rec)


def _unit(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    return images.contiguous().float() / 255


def _coloured(x: Tensor, cfg: AugmentConfig, generator: torch.Generator) -> Tensor:
    strengths = (cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
    gray = _chosen(len(x), cfg.gray_probability, generator)
    return jitter(x, *jitter_matrices(len(x), strengths, cfg.jitter_probability, gray, generator))


def _blurred(x: Tensor, probability: float, cfg: AugmentConfig, generator: torch.Generator) -> Tensor:
    low, high = cfg.blur_sigma
    sigma = low + (high - low) * torch.rand(len(x), generator=generator)
    rows = _chosen(len(x), probability, generator)
    return x.index_copy(0, rows.to(x.device), blur(x[rows], sigma[rows])) if len(rows) else x


def _chosen(n: int, probability: float, generator: torch.Generator) -> Int[Tensor, " m"]:
    """The rows that an augmentation of this probability falls on."""
    return (torch.rand(n, generator=generator) < probability).nonzero().flatten()


_LUMA = torch.tensor([0.2989, 0.587, 0.114])
_TO_GRAY = _LUMA.expand(3, 3)  # [3, 3]: every output channel is the luma
_YIQ = torch.stack((_LUMA, torch.tensor([0.5959, -0.2746, -0.3213]), torch.tensor([0.2115, -0.5227, 0.3112])))


def jitter_matrices(
    n: int,
    strengths: tuple[float, float, float, float],
    probability: float,
    gray: Int[Tensor, " m"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 3 3"]]:
    """Draw one colour jitter an image and compose it: a pixel x of an image of mean colour m becomes A x + B m.

    Brightness, contrast and saturation are torchvision's, hue is a rotation of the chroma plane (linear, and ten times
    as fast as a way through HSV); the four come in an order drawn for each image. Being linear they compose exactly,
    so that the image is touched, and clamped, only once.

    Args:
        strengths: brightness, contrast, saturation (factors from 1 - s to 1 + s) and hue (turns from -s to s).
        probability: that an image is jittered at all.
        gray: images that are made gray afterwards.
    """
    u = torch.rand(n, 4, generator=generator) * 2 - 1
    off = torch.rand(n, generator=generator) >= probability
    order = torch.rand(n, 4, generator=generator).argsort(1)
    u[off] = 0
    bright, contrast, saturate = ((1 + strengths[i] * u[:, i]).view(n, 1, 1) for i in range(3))
    eye = torch.eye(3).expand(n, 3, 3)
    matrices = torch.stack(
        (bright * eye, contrast * eye, saturate * eye + (1 - saturate) * _TO_GRAY, _hue(strengths[3] * u[:, 3])), 1
    )
    means = torch.zeros(n, 4, 3, 3)
    means[:, 1] = (1 - contrast) * _TO_GRAY  # contrast mixes in the luma of the mean of what came before it
    a, b = eye, torch.zeros(n, 3, 3)
    rows = torch.arange(n)
    for k in range(4):
        m, mean = matrices[rows, order[:, k]], means[rows, order[:, k]]
        a, b = m @ a, m @ b + mean @ (a + b)
    a[gray], b[gray] = _TO_GRAY @ a[gray], _TO_GRAY @ b[gray]
    return a, b


def _hue(turns: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotation of I and Q around the luma axis."""
    angle = -2 * math.pi * turns  # chroma turns against the order of HSV
    zero, one, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    rotation = torch.stack((one, zero, zero, zero, c, -s, zero, s, c), 1).view(-1, 3, 3)
    return torch.linalg.inv(_YIQ) @ rotation @ _YIQ


def jitter(
    x: Float[Tensor, "b 3 h w"], a: Float[Tensor, "b 3 3"], b: Float[Tensor, "b 3 3"]
) -> Float[Tensor, "b 3 h w"]:
    """A x + B mean(x) for every pixel, clamped to 0..1."""
    a, b = a.to(x.device, non_blocking=True), b.to(x.device, non_blocking=True)
    shift = b @ x.mean((2, 3))[:, :, None]  # [b, 3, 1]
    return torch.baddbmm(shift, a, x.flatten(2)).clamp_(0, 1).view_as(x)


def blur(x: Float[Tensor, "b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Gaussian blur of 9 taps with reflected borders, one sigma (in pixels) an image, as two matrix products."""
    rows, columns = (_blur_matrix(sigma, side).to(x.device, x.dtype)[:, None] for side in x.shape[-2:])
    return rows @ x @ columns.mT


def _blur_matrix(sigma: Float[Tensor, " b"], side: int) -> Float[Tensor, "b side side"]:
    radius = min(4, side - 1)
    offsets = torch.arange(-radius, radius + 1)
    taps = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    taps = taps / taps.sum(1, keepdim=True)
    position = torch.arange(side)[:, None] + offsets  # [side, taps]
    position = side - 1 - (side - 1 - position.abs()).abs()  # reflected at both ends
    matrix = torch.zeros(len(sigma), side, side)
    return matrix.scatter_add_(2, position.expand(len(sigma), -1, -1), taps[:, None].expand(-1, side, -1))


def solarize(x: Float[Tensor, "b 3 h w"], rows: Int[Tensor, " m"]) -> Float[Tensor, "b 3 h w"]:
    """Invert what is at least half bright in the chosen images."""
    if len(rows) == 0:
        return x
    part = x[rows]
    return x.index_copy(0, rows.to(x.device), torch.where(part >= 128 / 255, 1 - part, part))
