"""Pixels: the one place that knows ImageNet's statistics, the published crops, and how floats become bytes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PIL's filter numbers (PIL.Image.Resampling), so that this floor need not import PIL.
BILINEAR, BICUBIC, BOX = 2, 3, 4


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=x.dtype if x.is_floating_point() else torch.float32)
    mean, std = both[..., None, None].to(x.device, non_blocking=True)  # made on a GPU it would be waited for
    return mean, std


def normalise(images: Tensor) -> Float[Tensor, "*b 3 h w"]:
    """[*b, 3, h, w] bytes 0..255 or floats 0..1 -> ImageNet-normalised floats."""
    mean, std = _statistics(images)
    x = images if images.is_floating_point() else images.float() / 255
    return (x - mean).div_(std)


def denormalise(images: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """ImageNet-normalised floats -> floats clamped to 0..1, in float32."""
    x = images.float()
    mean, std = _statistics(x)
    return (x * std + mean).clamp(0, 1)


def from_symmetric(images: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Floats -1..1, as diffusers has them -> ImageNet-normalised floats."""
    return normalise((images + 1) / 2)


def to_symmetric(images: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """ImageNet-normalised floats -> floats -1..1, not clamped."""
    mean, std = _statistics(images)
    return (images * std + mean) * 2 - 1


def to_uint8(images: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """ImageNet-normalised floats -> bytes, rounded (truncation darkens every picture by half a level)."""
    return (denormalise(images) * 255).round().to(torch.uint8)


def rgb(image: Any) -> Any:
    """A PIL image of any mode -> 8-bit RGB: transparency is laid over white, 16 bits lose their low byte."""
    if image.mode.startswith("I"):  # 16 bits, which PIL opens as I;16 or as 32-bit I
        return image.convert("I").point([level // 256 for level in range(65_536)], "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image.copy()
        white.paste("white", (0, 0, *image.size))
        white.alpha_composite(image)
        return white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def squash(image: Any, size: int) -> Any:
    """A PIL image -> size x size whatever its aspect ratio, bilinear: the published preprocessing for CLIP features."""
    return image.resize((size, size), BILINEAR)


def center_crop(image: Any, size: int) -> Any:
    """A PIL image -> its central square at `size`, as ADM does it: the published preprocessing for reconstruction.

    The short side is halved by box filtering while it is at least twice `size`, then resized bicubically.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
