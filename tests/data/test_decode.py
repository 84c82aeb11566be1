import io

import numpy as np
import pytest
from PIL import Image

from vtp.data import decode as decoding
from vtp.data.decode import BadImage, decode
from vtp.images import rgb


def encoded(image, suffix="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


RED_LEFT = Image.fromarray(np.repeat([[[255, 0, 0]] * 8 + [[0, 0, 255]] * 8], 12, 0).astype(np.uint8))  # 12 x 16


def test_rgb_is_kept():
    np.testing.assert_array_equal(decode(encoded(RED_LEFT)), np.asarray(RED_LEFT))
    assert decode(encoded(RED_LEFT)).flags.writeable


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright = decode(encoded(RED_LEFT, "JPEG", exif=exif, quality=95))
    assert upright.shape == (16, 12, 3)
    assert upright[:6, :, 0].min() > 200 and upright[10:, :, 2].min() > 200


def test_transparency_lies_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 3] = np.array([0, 255, 0, 255])[None, :]
    pixels = decode(encoded(Image.fromarray(rgba)))
    assert (pixels[:, 0] == 255).all() and (pixels[:, 1] == 0).all()
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30])
    assert (decode(encoded(palette, transparency=0)) == 255).all()
    assert (decode(encoded(palette)) == [10, 20, 30]).all()


def test_pictures_of_floats_are_refused():
    with pytest.raises(BadImage, match="floats"):
        decode(encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P", "YCbCr"])
def test_other_modes_become_rgb(mode):
    suffix = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    pixels = decode(encoded(Image.new("RGB", (8, 8), "white").convert(mode), suffix))
    assert pixels.shape == (8, 8, 3) and pixels.min() > 250


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    pixels = decode(encoded(deep))
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(deep) // 256)
    as_integers = rgb(deep.convert("I"))
    np.testing.assert_array_equal(np.asarray(as_integers), pixels)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert (pixels == [255, 0, 0]).all()


def test_bad_bytes_are_named():
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    for data, reason in ((b"", "empty file"), (b"hello", "not an image"), (whole[: len(whole) // 2], "corrupt image")):
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert caught.value.reason == reason


def test_programs_in_a_picture_s_clothes_are_not_run(monkeypatch):
    """PIL would hand PostScript to Ghostscript, where a loop has no end."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        encoded(RED_LEFT, "EPS"),
    ):
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert caught.value.reason == "not an image"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "MPO"])
def test_other_kinds_of_pictures(kind):
    assert decode(encoded(RED_LEFT, kind)).shape == (12, 16, 3)


def test_decompression_bombs_are_not_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (12_000, 12_000)))
    with pytest.raises(BadImage, match="too many pixels"):
        decode(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL's own limit, where it is the lower one
    with pytest.raises(BadImage, match="too many pixels"):
        decode(encoded(Image.new("1", (200, 200))))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    with pytest.raises(BadImage, match="16 x 12"):
        decode(encoded(RED_LEFT))


def test_pixels_that_count_visitors_are_no_pictures():
    for size in ((1, 1), (3, 400), (400, 1)):
        with pytest.raises(BadImage) as caught:
            decode(encoded(Image.new("RGB", size)))
        assert caught.value.reason == "too few pixels"
    assert decode(encoded(Image.new("RGB", (4, 60)))).shape == (60, 4, 3)
