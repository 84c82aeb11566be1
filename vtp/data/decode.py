"""Bytes of an image file -> 8-bit RGB pixels: the one place that meets what cameras, scanners and the web make."""

from __future__ import annotations

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from vtp.images import rgb

MAX_PIXELS = 64_000_000  # larger pictures are taken for decompression bombs
# What PIL may take bytes for: of its other kinds some start programs (PostScript), and none is a photograph's.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE = 4  # smaller ones are what web pages count their visitors with
_ORIENTATION = 0x0112  # EXIF tag


class BadImage(ValueError):
    """Bytes that are no usable picture; `reason` is a short name to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def decode(data: bytes) -> UInt8[ndarray, "h w 3"]:
    """Decode an image file of one of the `FORMATS`.

    EXIF rotation is applied, transparency is laid over white, CMYK and palettes become RGB, 16 bits become 8 by
    dropping the low byte, and of an animation the first frame is taken.

    Raises:
        BadImage: "empty file", "not an image", "corrupt image" (truncated, for example), "too many pixels" or "too few
            pixels".
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large pictures and odd metadata; the size is checked here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadImage("too many pixels", f"{image.width} x {image.height}, at most {MAX_PIXELS:,} are decoded")
            if min(image.size) < MIN_SIDE:
                raise BadImage(
                    "too few pixels", f"{image.width} x {image.height}, at least {MIN_SIDE} a side are needed"
                )
            if image.mode == "F":
                raise BadImage("not an image", "its pixels are floats, of no known range")
            return np.array(rgb(_upright(image)))  # a copy that may be written to, as torch wants it
    except Image.DecompressionBombError:
        raise BadImage("too many pixels", f"at most {MAX_PIXELS:,} are decoded") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except BadImage:
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, ... on broken files
        raise BadImage("corrupt image", f"{type(error).__name__}: {error}") from None


def image_format(data: bytes) -> str:
    """Which of the `FORMATS` a picture has that `decode` reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=FORMATS).format or ""


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image
