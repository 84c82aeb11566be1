"""Pixels: the published crop bit for bit, and what floats and bytes lose between each other (nothing)."""

import numpy as np
import pytest
import torch
from PIL import Image

from vtp import images


@pytest.mark.parametrize("case", range(5))
def test_center_crop_is_the_published_one(shared, case):
    cases = np.load(shared / "fixtures/misc/center_crop.npz")
    cropped = images.center_crop(Image.fromarray(cases[f"{case}/in"]), int(cases[f"{case}/size"]))
    assert np.array_equal(np.asarray(cropped), cases[f"{case}/out"])


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_bytes_survive_the_round_trip():
    every_level = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    assert torch.equal(images.to_uint8(images.normalise(every_level)), every_level)
    x = random_bytes(2, 3, 5, 7)
    assert torch.equal(images.to_uint8(images.normalise(x)), x)
    assert torch.equal(images.to_uint8(images.normalise(x.double() / 255)), x)


def test_normalise_is_imagenets():
    x = random_bytes(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(images.normalise(x), (x / 255 - mean) / std)
    torch.testing.assert_close(images.normalise(x / 255), images.normalise(x))
    assert images.normalise(x.double() / 255).dtype == torch.float64


def test_bytes_are_rounded_not_truncated():
    x = images.normalise(torch.full((3, 1, 2), 0.0) + torch.tensor([99.4, 99.6]) / 255)
    assert images.to_uint8(x)[:, 0].tolist() == [[99, 100]] * 3


def test_denormalise_clamps_and_is_float32():
    x = images.normalise(torch.tensor([-0.5, 0.25, 1.5]).view(1, 1, 3).expand(3, 1, 3))
    y = images.denormalise(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.tensor([0.0, 0.25, 1.0]).expand(3, 1, 3), atol=2e-3, rtol=0)
    assert images.to_uint8(x)[0, 0].tolist() == [0, 64, 255]


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (31, 17), (300, 129), (16, 1000)])
def test_any_picture_becomes_the_square_asked_for(size):
    picture = Image.fromarray(random_bytes(size[1], size[0], 3).numpy())
    for side in (16, 64):
        assert images.center_crop(picture, side).size == (side, side)
        assert images.squash(picture, side).size == (side, side)


def test_center_crop_takes_the_middle_and_squash_everything():
    x = np.zeros((32, 96, 3), np.uint8)
    x[:, 32:64] = 255
    picture = Image.fromarray(x)
    assert np.asarray(images.center_crop(picture, 32)).min() == 255
    assert np.asarray(images.squash(picture, 96))[:, :30].max() == 0
