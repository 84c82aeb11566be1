import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv

from vtp.config import ConfigError
from vtp.data.augment import NEUTRAL, AugmentConfig, blur, draw_jitter, finish, hue, jitter, luma, solarize
from vtp.data.batches import Batch, ClipBatch, RecBatch, SSLBatch
from vtp.data.order import Cursor
from vtp.images import denormalise, normalise

OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


@pytest.fixture
def images():
    """Noise of which much saturates, bytes' colours with ties, gray, and the corners of the colour cube."""
    x = torch.rand(24, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    x[8:16] = (x[8:16] * 4).round() / 4
    x[16:20] = x[16:20, :1]
    x[20:] = x[20:].round()
    return x


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize("which", range(4))
def test_each_operation_is_torchvisions(images, which):
    strengths = tuple(0.5 if i == which else 0.0 for i in range(4))
    factors, order = draw_jitter(len(images), strengths, 1.0, seeded())
    expected = torch.stack([OPERATIONS[which](x, float(f)) for x, f in zip(images, factors[:, which], strict=True)])
    jitter(images, factors, order)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_one_operation_after_the_other_in_the_drawn_order(images):
    factors, order = draw_jitter(len(images), (0.4, 0.4, 0.2, 0.1), 1.0, seeded(3))
    assert len({tuple(row) for row in order.tolist()}) > 10
    ours = images.clone()
    jitter(ours, factors, order)
    for i, x in enumerate(images):
        for k in order[i].tolist():
            x = OPERATIONS[k](x, float(factors[i, k]))
        torch.testing.assert_close(ours[i], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 1 / 3, 0.5])
def test_hue_turns_every_colour_as_hsv_does(turns):
    steps = torch.linspace(0, 1, 18)
    colours = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).flatten(2)[None]  # [1, 3, 18, 324]
    ours = hue(colours, torch.tensor([turns]))
    expected = torch.tensor(
        [
            colorsys.hsv_to_rgb((h + turns) % 1, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*rgb) for rgb in colours[0].flatten(1).T.double().tolist())
        ]
    )
    torch.testing.assert_close(ours[0].flatten(1).T, expected.float(), atol=3e-6, rtol=0)


def test_draws_are_within_the_strengths():
    factors, order = draw_jitter(4000, (0.4, 0.3, 0.2, 0.1), 0.8, seeded())
    neutral = torch.tensor(NEUTRAL)
    untouched = (factors == neutral).all(1)
    assert abs(untouched.float().mean() - 0.2) < 0.03
    spread = (factors - neutral)[~untouched]
    np.testing.assert_allclose(spread.amax(0), [0.4, 0.3, 0.2, 0.1], rtol=0.01)
    np.testing.assert_allclose(spread.amin(0), [-0.4, -0.3, -0.2, -0.1], rtol=0.01)
    assert (order.sort(1).values == torch.arange(4)).all()
    np.testing.assert_allclose((order == 0).float().mean(0), [0.25] * 4, atol=0.03)


def test_luma_is_torchvisions_gray(images):
    torch.testing.assert_close(luma(images), tv.rgb_to_grayscale(images))


def test_gray_images_are_gray_and_no_others():
    raw = batch(ssl=200)
    off = AugmentConfig(
        jitter_probability=0.0, blur_probability=(0.0, 0.0), solarize_probability=0.0, local_blur_probability=0.0
    )
    out = finish(raw, off, seeded()).ssl
    for crops in (*denormalise(out.global_crops), denormalise(out.local_crops.flatten(0, 1))):
        gray = (crops - crops.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
        assert abs(gray.float().mean() - 0.2) < 0.08


@pytest.mark.parametrize("shape", [(20, 24), (5, 9)])
def test_blur_is_torchvisions(shape):
    x = torch.rand(4, 3, *shape, generator=seeded())
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    expected = torch.stack([tv.gaussian_blur(x[i], [9, 9], [float(sigma[i])] * 2) for i in range(4)])
    torch.testing.assert_close(blur(x, sigma), expected, atol=1e-6, rtol=1e-5)


def test_blur_of_crops_smaller_than_the_kernel_keeps_the_mean_of_constants():
    x = torch.full((2, 3, 2, 3), 0.3)
    torch.testing.assert_close(blur(x, torch.tensor([1.0, 2.0])), x)


def test_solarize_is_torchvisions():
    x = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8, generator=seeded())
    torch.testing.assert_close(solarize(x.float() / 255), tv.solarize(x, 128).float() / 255)


def batch(clip=4, ssl=3, rec=2, rows=True):
    def pixels(*shape):
        return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=seeded()).movedim(-1, -3)

    return Batch(
        ClipBatch(pixels(clip, 16, 16), torch.ones(clip, 5, dtype=torch.int64)) if clip else None,
        SSLBatch(pixels(2, ssl, 16, 16), pixels(4, ssl, 8, 8), *([torch.zeros(0)] * 3)) if ssl else None,
        RecBatch(pixels(0 if rows else rec, 16, 16), rec if rows else 0) if rec else None,
        Cursor(0, ()),
        {},
    )


def test_finish_normalises_the_clip_view_and_shares_it_with_reconstruction():
    raw = batch()
    out = finish(raw, AugmentConfig(), seeded())
    torch.testing.assert_close(out.clip.images, normalise(raw.clip.images))
    torch.testing.assert_close(out.rec.images, out.clip.images[:2], rtol=0, atol=0)
    jittered = finish(raw, AugmentConfig(clip_jitter=0.3), seeded())
    assert not torch.equal(jittered.clip.images, out.clip.images)
    torch.testing.assert_close(jittered.rec.images, jittered.clip.images[:2], rtol=0, atol=0)


def test_finish_is_seeded_and_augments_every_crop_of_the_self_distillation():
    raw = batch()
    once, again = (finish(raw, AugmentConfig(), seeded(1)) for _ in range(2))
    other = finish(raw, AugmentConfig(), seeded(2))
    assert torch.equal(once.ssl.global_crops, again.ssl.global_crops)
    assert torch.equal(once.ssl.local_crops, again.ssl.local_crops)
    assert not torch.equal(once.ssl.global_crops, other.ssl.global_crops)
    assert once.ssl.global_crops.shape == (2, 3, 3, 16, 16) and once.ssl.local_crops.shape == (4, 3, 3, 8, 8)
    assert once.ssl.local_crops.is_contiguous() and once.clip.images.is_contiguous()


def test_nothing_switched_on_is_only_normalisation():
    off = AugmentConfig(
        jitter_probability=0.0,
        gray_probability=0.0,
        blur_probability=(0.0, 0.0),
        local_blur_probability=0.0,
        solarize_probability=0.0,
    )
    raw = batch(clip=0, rows=False)
    out = finish(raw, off, seeded())
    assert out.clip is None
    torch.testing.assert_close(out.ssl.global_crops, normalise(raw.ssl.global_crops), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.ssl.local_crops, normalise(raw.ssl.local_crops), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.rec.images, normalise(raw.rec.images))


def test_no_local_crops():
    raw = batch(rec=0)
    raw = raw._replace(ssl=raw.ssl._replace(local_crops=raw.ssl.local_crops[:0]))
    assert finish(raw, AugmentConfig(), seeded()).ssl.local_crops.shape == (0, 3, 3, 8, 8)


def test_dinov2s_probabilities():
    raw = batch(ssl=400)
    cfg = AugmentConfig(jitter_probability=0.0, blur_probability=(0.0, 0.0), gray_probability=0.0)
    first, second = finish(raw, cfg, seeded()).ssl.global_crops - normalise(raw.ssl.global_crops)
    assert first.abs().max() < 1e-4
    np.testing.assert_allclose((second.abs().amax((1, 2, 3)) > 1e-3).float().mean(), 0.2, atol=0.06)


@pytest.mark.parametrize(
    "wrong", [{"hue": 0.7}, {"brightness": -0.1}, {"blur_sigma": (0.0, 1.0)}, {"clip_jitter": 2.0}]
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
