"""The image processor: both published preprocessings, everything that is a picture, and the way back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor

from tests.tiny import tiny_model
from vtp.images import center_crop, normalise, to_uint8
from vtp.models.vtp_hf import VTPConfig, VTPModel, publish
from vtp.models.vtp_hf_processing import VTPImageProcessor

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def test_squash_is_the_published_one():
    published = transforms.Compose(
        [
            transforms.Resize((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    out = VTPImageProcessor(size=32)(PHOTO)
    assert out["pixel_values"].shape == (1, 3, 32, 32) and out["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(out.pixel_values[0], published(PHOTO), atol=1e-6, rtol=1e-6)


def test_center_crop_is_adms():
    expected = normalise(pil_to_tensor(center_crop(PHOTO, 16)))[None]
    assert torch.equal(VTPImageProcessor(16, do_center_crop=True)(PHOTO).pixel_values, expected)
    processor = VTPImageProcessor(32)
    assert torch.equal(processor(images=PHOTO, size=16, do_center_crop=True)["pixel_values"], expected)
    assert processor.size == {"height": 32, "width": 32} and not processor.do_center_crop


def test_whatever_is_a_picture_gives_the_same_values():
    processor = VTPImageProcessor(32)
    expected = processor(PHOTO).pixel_values
    first = PIXELS.transpose(2, 0, 1)
    arrays = [PIXELS, first, PIXELS / 255, np.stack([PIXELS])]
    tensors = [torch.tensor(PIXELS), torch.tensor(first), torch.tensor(first) / 255, torch.tensor(first[None] / 255)]
    for form in [*arrays, *tensors, [PHOTO], (first,), PHOTO.convert("RGBA")]:
        assert torch.equal(processor(form).pixel_values, expected)
    batch = processor([[PHOTO], np.stack([PIXELS, PIXELS[::-1]]), Image.new("L", (9, 70))]).pixel_values
    assert batch.shape == (4, 3, 32, 32) and torch.equal(batch[:2], expected.expand(2, -1, -1, -1))
    assert processor(PHOTO, return_tensors="np")["pixel_values"].dtype == np.float32
    grey = processor(PIXELS[..., 0]).pixel_values
    assert torch.equal(processor(PIXELS[..., :1]).pixel_values, grey)
    assert torch.equal(processor(Image.fromarray(PIXELS[..., 0])).pixel_values, grey)


def test_shapes_that_leave_the_channels_open_are_read_by_custom():
    both = np.random.default_rng(0).integers(0, 256, (3, 8, 3), dtype=np.uint8)
    processor = VTPImageProcessor(8)
    assert torch.equal(processor(both).pixel_values, processor(Image.fromarray(both)).pixel_values)
    assert torch.equal(processor(torch.from_numpy(both)).pixel_values, processor(both.transpose(1, 2, 0)).pixel_values)


def test_transparency_lies_over_white():
    clear = VTPImageProcessor(8)(Image.new("RGBA", (8, 8), (255, 0, 0, 0))).pixel_values
    assert torch.equal(clear, VTPImageProcessor(8)(Image.new("RGB", (8, 8), "white")).pixel_values)


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("dog.png", TypeError, "str is no picture; give PIL images"),
        ([PHOTO, None], TypeError, "NoneType is no picture"),
        ([], ValueError, "no images"),
        (np.zeros((5, 8, 8), np.uint8), ValueError, r"an array of shape \(5, 8, 8\) is no picture"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"an array of shape \(0, 8, 3\) is no picture"),
        (np.zeros(3, np.uint8), ValueError, r"an array of shape \(3,\) is no picture"),
        (torch.zeros(3, 8, 8, dtype=torch.long), ValueError, "an array of int64 is no picture; give uint8"),
        (PIXELS.astype(float), ValueError, r"floats of a picture lie in 0..1, these in 0..255"),
        (normalise(torch.from_numpy(PIXELS).movedim(2, 0)), ValueError, r"these in -2\.\d+..2\.\d+"),
        (np.full((8, 8, 3), np.nan), ValueError, "these in nan..nan"),
    ],
)
def test_what_is_no_picture(picture, error, message):
    with pytest.raises(error, match=message):
        VTPImageProcessor(8)(picture)


@pytest.mark.parametrize("size", [{"height": 8, "width": 16}, {"shortest_edge": 8}, 0, {"height": -1, "width": -1}])
def test_sizes_that_are_no_square(size):
    with pytest.raises(ValueError, match="size="):
        VTPImageProcessor(size)
    with pytest.raises(ValueError, match="size="):
        VTPImageProcessor(8)(PHOTO, size=size)


def test_other_statistics_are_refused():
    with pytest.raises(ValueError, match=r"image_mean=\[0.5, 0.5, 0.5\].* the model reads ImageNet's"):
        VTPImageProcessor(image_mean=[0.5] * 3)


def test_decoded_images_become_pictures():
    processor = VTPImageProcessor(32)
    decoded = processor([PHOTO, PIXELS[::-1]]).pixel_values * 1.5  # beyond black and white: clamped
    pictures = processor.post_process(decoded)
    pixels = processor.post_process(decoded.requires_grad_(), output_type="pt")
    assert torch.equal(pixels, to_uint8(decoded)) and pixels.dtype == torch.uint8
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert torch.equal(torch.stack([pil_to_tensor(picture) for picture in pictures]), pixels)
    assert np.array_equal(processor.post_process(decoded, output_type="np"), pixels.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="output_type='jpeg' is unknown"):
        processor.post_process(decoded, output_type="jpeg")


@pytest.mark.parametrize("do_center_crop", [False, True])
def test_pictures_of_the_right_size_come_back_as_they_were(do_center_crop):
    square, processor = PIXELS[:, :40], VTPImageProcessor(40, do_center_crop=do_center_crop)
    assert np.array_equal(processor.post_process(processor(square).pixel_values, "np")[0], square)


def test_published_folders_hold_it(tmp_path, caplog):
    config = VTPConfig.from_model_config(tiny_model(train_clip=False))
    (tmp_path / ".new_killed").mkdir()  # left by a publication that was killed
    publish(VTPModel(config), tmp_path)
    assert not any(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {
        "do_center_crop": False,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "VTPImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": 16, "width": 16},
    }
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is VTPImageProcessor
    assert torch.equal(processor(PHOTO).pixel_values, VTPImageProcessor(16)(PHOTO).pixel_values)
    cropping = AutoImageProcessor.from_pretrained(tmp_path, do_center_crop=True, size=24)
    assert torch.equal(cropping(PHOTO).pixel_values, VTPImageProcessor(24, do_center_crop=True)(PHOTO).pixel_values)
    assert "backend" not in caplog.text  # of transformers 5, which asks for another class first
    model = VTPModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert model(**processor(PHOTO), forward_type="rec").keys() >= {"reconstructed_image", "latents"}
        decoded = model(processor(PHOTO).pixel_values, forward_type="rec")["reconstructed_image"]
    (picture,) = processor.post_process(decoded)
    assert picture.size == (16, 16)
