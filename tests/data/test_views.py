import numpy as np
import pytest
import torch
from PIL import Image

from vtp.config import ConfigError
from vtp.data.views import BatchConfig, ViewsConfig, caption_span, check, crop_boxes, make, resized_crop


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 128 + 60 * np.sin((x + y) / 11)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize(("box", "size"), [((5, 7, 90, 120), 32), ((0, 0, 20, 15), 48), ((3, 3, 32, 32), 32)])
def test_a_crop_is_what_pil_makes_of_it(box, size):
    image = smooth(110, 140)
    top, left, h, w = box
    expected = Image.fromarray(image[top : top + h, left : left + w]).resize((size, size), Image.Resampling.BICUBIC)
    crop = resized_crop(image, box, size)
    assert crop.dtype == torch.uint8
    assert np.abs(crop.numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 2
    assert torch.equal(resized_crop(image, box, size, flip=True), crop.flip(1))


def test_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 60, 100)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 0.9], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = crop_boxes(np.tile([60, 100], (4000, 1)), (0.2, 0.9), np.random.default_rng(0))
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=1.2)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=1.2)
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= 60).all() and (ours[:, 1] + ours[:, 3] <= 100).all()


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1), (2, 900)])
def test_pictures_of_any_shape_have_a_box(size):
    boxes = crop_boxes(np.tile(size, (50, 1)), (0.9, 1.0), np.random.default_rng(0))
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()


def test_make_stacks_crops_of_pictures_and_keeps_bytes_channels_last():
    images = [smooth(40, 50), smooth(70, 30)]
    crops = make(images, 24, (0.3, 1.0), True, np.random.default_rng(3), crops=3)
    assert crops.shape == (3, 2, 3, 24, 24) and crops.permute(0, 1, 3, 4, 2).is_contiguous()
    assert torch.equal(crops, make(images, 24, (0.3, 1.0), True, np.random.default_rng(3), crops=3))
    assert not torch.equal(crops[0], crops[1])


@pytest.mark.parametrize(
    ("views", "batch", "key"),
    [
        (ViewsConfig(size=100), BatchConfig(), "views.size=100.*use 96 or 112"),
        (ViewsConfig(global_size=8), BatchConfig(), "views.global_size=8.*use 16"),
        (ViewsConfig(local_size=90), BatchConfig(), "views.local_size=90"),
        (ViewsConfig(), BatchConfig(clip=4, rec=8), "batch.rec=8.*views.share=false"),
    ],
)
def test_sizes_that_do_not_fit_are_named(views, batch, key):
    with pytest.raises(ConfigError, match=key):
        check(views, batch, 16)


def test_views_that_are_not_made_are_not_checked():
    check(ViewsConfig(global_size=100, local_size=90), BatchConfig(ssl=0), 16)
    check(ViewsConfig(size=100), BatchConfig(clip=0, rec=0), 16)
    check(ViewsConfig(local_size=90, local_crops=0), BatchConfig(), 16)


@pytest.mark.parametrize(
    "wrong", [{"scale": (0.0, 1.0)}, {"local_scale": (0.5, 0.2)}, {"mask_probability": 2.0}, {"local_crops": -1}]
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ViewsConfig(**wrong)
    with pytest.raises(ConfigError, match="are all 0"):
        BatchConfig(clip=0, ssl=0, rec=0)


def test_every_run_of_words_is_as_likely():
    rng = np.random.default_rng(0)
    seen = [caption_span("a  blue shirt", rng) for _ in range(3_000)]
    runs = ["a", "blue", "shirt", "a blue", "blue shirt", "a blue shirt"]
    assert set(seen) == set(runs)
    assert all(abs(seen.count(run) - 500) < 90 for run in runs)  # 4 standard deviations
    assert caption_span("", rng) == ""
