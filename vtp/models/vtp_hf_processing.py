"""The published preprocessings as a transformers image processor: preprocessor_config.json beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from vtp.images import IMAGENET_MEAN, IMAGENET_STD, center_crop, normalise, rgb, squash, to_uint8
from vtp.models.published import upload


class VTPImageProcessor(BaseImageProcessor):
    """Pictures -> ImageNet-normalised `pixel_values` [b 3 s s], and decoded images back to pictures.

    Args:
        size: the side s in pixels, also as {"height": s, "width": s}.
        do_center_crop: cut out the central square as ADM does, the published preprocessing for reconstruction and
            generation; else squash the whole picture to the square, the published one for CLIP and probes.
        image_mean, image_std: ImageNet's; in the file for other readers of it.

    Raises:
        ValueError: a size that is no square, or other statistics than ImageNet's.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int | Mapping[str, int] = 256,
        do_center_crop: bool = False,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (tuple(image_mean), tuple(image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(
                f"image_mean={list(image_mean)}, image_std={list(image_std)}: the model reads ImageNet's, "
                f"{list(IMAGENET_MEAN)} and {list(IMAGENET_STD)}"
            )
        side = _side(size)
        self.size = {"height": side, "width": side}
        self.do_center_crop = do_center_crop
        self.image_mean, self.image_std = list(IMAGENET_MEAN), list(IMAGENET_STD)

    def preprocess(
        self,
        images: Any,
        size: int | Mapping[str, int] | None = None,
        do_center_crop: bool | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """{"pixel_values": [b 3 s s]} of one picture or many; this is what calling the processor does.

        Args:
            images: PIL images of any mode, arrays and tensors, or lists of them. Arrays are [h w], [h w c] or [c h w]
                with 1, 3 or 4 channels, or batches of the latter two; bytes, or floats in 0..1, which are rounded to
                bytes, as a file would hold them. Transparency is laid over white.
            size: another side than the processor's.
            do_center_crop: another crop than the processor's.
            return_tensors: "pt" (also None) or "np".

        Raises:
            TypeError, ValueError: something that is no picture; the message says what it is.
        """
        side = _side(self.size if size is None else size)
        fit = center_crop if (self.do_center_crop if do_center_crop is None else do_center_crop) else squash
        pixels = [torch.from_numpy(np.array(fit(picture, side))) for picture in _pictures(images)]
        if not pixels:
            raise ValueError("no images to preprocess")
        values = normalise(torch.stack(pixels).permute(0, 3, 1, 2).contiguous())
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors or "pt")

    def post_process(self, images: Float[Tensor, "b 3 h w"], output_type: str = "pil") -> Any:
        """Decoded images, ImageNet-normalised floats, as pictures: clamped, and rounded to bytes.

        Args:
            images: what `get_latents_decoded_images` gives.
            output_type: "pil" for a list of PIL images, "np" for uint8 [b h w 3], "pt" for uint8 [b 3 h w].
        """
        pixels = to_uint8(images.detach()).cpu()
        if output_type == "pt":
            return pixels
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        if output_type == "np":
            return arrays
        if output_type == "pil":
            return [Image.fromarray(array) for array in arrays]
        raise ValueError(f"output_type={output_type!r} is unknown; one of 'pil', 'np', 'pt'")

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save, and send to a repository on the Hub. Options and errors as `published.upload`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id, **options)


def _side(size: int | Mapping[str, int]) -> int:
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f'size={dict(size)} is no square; give a number, or {{"height": s, "width": s}}')
        size = size["height"]
    if size < 1:
        raise ValueError(f"size={size}; give the side in pixels, at least 1")
    return size


def _pictures(images: Any) -> Iterator[Image.Image]:
    """8-bit RGB pictures, of whatever was given."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from _pictures(image)
    elif isinstance(images, Image.Image):
        yield rgb(images)
    elif isinstance(images, Tensor):
        images = images.detach().cpu()
        yield from _from_array((images.float() if images.is_floating_point() else images).numpy(), first=True)
    elif isinstance(images, np.ndarray):
        yield from _from_array(images, first=False)
    else:
        raise TypeError(f"{type(images).__name__} is no picture; give PIL images, arrays, tensors, or lists of them")


def _from_array(array: np.ndarray, first: bool) -> Iterator[Image.Image]:
    """`first`: channels come first where the shape leaves it open, as tensors have them."""
    if array.ndim == 4:
        for one in array:
            yield from _from_array(one, first)
        return
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[0] in channels and (first or array.shape[2] not in channels):
        array = array.transpose(1, 2, 0)
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in channels)):
        raise ValueError(f"an array of shape {array.shape} is no picture: [h w], [h w c] or [c h w], c 1, 3 or 4")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
            raise ValueError(f"floats of a picture lie in 0..1, these in {array.min():.4g}..{array.max():.4g}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} is no picture; give uint8, or floats in 0..1")
    yield rgb(Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2:] == (1,) else array)))
