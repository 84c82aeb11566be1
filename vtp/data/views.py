"""Crops of one decoded picture, as bytes: what a worker makes. Colour is the training device's work (augment.py).

A picture is decoded once; a crop is read from it and resized in one call, antialiased and bicubic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor

from vtp.config import ConfigError, within


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Which crops are made. Scales are shares of the picture's area; aspect ratios are drawn from 3/4 to 4/3."""

    size: int = 256  # CLIP and reconstruction view, pixels
    scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False  # captions say left and right, and letters do not read backwards
    share: bool = True  # the reconstruction view is the CLIP view: the trunk runs once on it
    rec_scale: tuple[float, float] = (0.9, 1.0)  # of a reconstruction view of its own
    global_size: int = 256
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_crops: int = 8
    ssl_flip: bool = True
    caption_spans: float = 0.0  # share of captions cut to a random run of their words: a small set's words meet alone
    mask_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # of a masked crop's patches

    def __post_init__(self) -> None:
        for name in ("scale", "rec_scale", "global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"views.{name}={[low, high]}: write [low, high] with 0 < low <= high <= 1")
        within(self, "mask_probability caption_spans", 0, 1)
        within(self, "local_crops", 0)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Pairs a rank takes per step for each objective; 0 switches an objective's views off.

    max(clip, ssl, rec) pairs are read, and each objective gets a random choice of them.
    """

    clip: int = 256
    ssl: int = 64
    rec: int = 64

    def __post_init__(self) -> None:
        within(self, "clip ssl rec", 0, 2**31)
        if self.pairs == 0:
            raise ConfigError("batch.clip, batch.ssl and batch.rec are all 0; there is nothing to learn from")

    @property
    def pairs(self) -> int:
        return max(self.clip, self.ssl, self.rec)


def check(views: ViewsConfig, batch: BatchConfig, patch_size: int) -> None:
    """Refuse sizes that the patches do not tile, and a shared view that cannot be shared.

    Raises:
        ConfigError: names the key and the nearest sizes that work.
    """
    used = {"size": batch.clip or batch.rec, "global_size": batch.ssl, "local_size": batch.ssl and views.local_crops}
    for name, needed in used.items():
        size = getattr(views, name)
        if needed and (size % patch_size or size < patch_size):
            below, above = size // patch_size * patch_size, (size // patch_size + 1) * patch_size
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"views.{name}={size} is not a multiple of the patch size {patch_size}; use {nearest}")
    if batch.ssl and not round(2 * batch.ssl * views.mask_probability):
        raise ConfigError(
            f"views.mask_probability={views.mask_probability} masks none of {2 * batch.ssl} global crops, and iBOT "
            f"learns from nothing else; take at least {1 / (2 * batch.ssl):.2g}"
        )
    if views.share and 0 < batch.clip < batch.rec:
        raise ConfigError(
            f"batch.rec={batch.rec} reconstruction views cannot all be among batch.clip={batch.clip} CLIP views; "
            "lower batch.rec or set views.share=false"
        )


def crop_boxes(sizes: Int[ndarray, "n 2"], scale: tuple[float, float], rng: np.random.Generator) -> Int[ndarray, "n 4"]:
    """Random (top, left, height, width) within pictures of (height, width), as torchvision's RandomResizedCrop.

    Area share uniform in `scale`, log aspect ratio uniform between 3/4 and 4/3; of ten tries the first that fits; else
    the largest central box of an allowed aspect ratio.
    """
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    area = rng.uniform(*scale, (n, 10)) * (height * width)
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (n, 10)))
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(n)
    none = ~fits[rows, first]
    h, w = h[rows, first], w[rows, first]
    h = np.where(none, np.minimum(sizes[:, 0], np.rint(sizes[:, 1] * 4 / 3)), h).astype(np.int64)
    w = np.where(none, np.minimum(sizes[:, 1], np.rint(sizes[:, 0] * 4 / 3)), w).astype(np.int64)
    room = sizes - np.stack((h, w), 1)
    corner = np.where(none[:, None], room // 2, (rng.random((n, 2)) * (room + 1)).astype(np.int64))
    return np.concatenate((corner, h[:, None], w[:, None]), 1)


def resized_crop(
    image: UInt8[ndarray, "h w 3"], box: Sequence[int], size: int, flip: bool = False
) -> UInt8[Tensor, "size size 3"]:
    """The box (top, left, height, width) of a picture at size x size pixels, mirrored if `flip`."""
    top, left, height, width = box
    part = torch.from_numpy(image[top : top + height, left : left + width])
    if (height, width) != (size, size):
        # Bytes in channels-last order take torch's vectorised path, several times as fast as PIL's.
        chw = part.permute(2, 0, 1)[None]
        part = F.interpolate(chw, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return part.flip(1) if flip else part


def make(
    images: list[ndarray],
    size: int,
    scale: tuple[float, float],
    flip: bool,
    rng: np.random.Generator,
    crops: int = 1,
) -> UInt8[Tensor, "crops n 3 size size"]:
    """`crops` random crops of each picture [h, w, 3]; bytes, laid out in memory as [crops, n, size, size, 3]."""
    out = torch.empty((crops, len(images), size, size, 3), dtype=torch.uint8)
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    for k in range(crops):
        boxes = crop_boxes(sizes, scale, rng).tolist()
        flips = (rng.random(len(images)) < 0.5).tolist() if flip else [False] * len(images)
        for i, image in enumerate(images):
            out[k, i] = resized_crop(image, boxes[i], size, flips[i])
    return out.permute(0, 1, 4, 2, 3)


def caption_span(caption: str, rng: np.random.Generator) -> str:
    """A run of a caption's words: its two ends are drawn at random, so that every run is as likely."""
    words = caption.split()
    first, last = sorted(rng.choice(len(words) + 1, 2, replace=False).tolist()) if words else (0, 0)
    return " ".join(words[first:last])
