import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv

from vtp.config import ConfigError
from vtp.data.augment import AugmentConfig, blur, finish, jitter, jitter_matrices, solarize
from vtp.data.batches import Batch, ClipBatch, RecBatch, SSLBatch
from vtp.data.order import Cursor
from vtp.images import normalise

NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def images():
    return 0.4 + 0.2 * torch.rand(6, 3, 10, 12, generator=torch.Generator().manual_seed(0))  # no op reaches 0 or 1


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize(
    ("which", "theirs"), [(0, tv.adjust_brightness), (1, tv.adjust_contrast), (2, tv.adjust_saturation)]
)
def test_each_operation_is_torchvisions(images, which, theirs):
    strengths = tuple(0.4 if i == which else 0.0 for i in range(4))
    ours = jitter(images, *jitter_matrices(6, strengths, 1.0, NONE, seeded()))
    factors = 1 + 0.4 * (torch.rand(6, 4, generator=seeded()) * 2 - 1)[:, which]
    expected = torch.stack([theirs(x, float(f)) for x, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_composition_is_one_operation_after_the_other_in_the_drawn_order(images):
    strengths = (0.3, 0.3, 0.3, 0.0)
    ours = jitter(images, *jitter_matrices(6, strengths, 1.0, NONE, seeded(3)))
    g = seeded(3)
    factors = 1 + 0.3 * (torch.rand(6, 4, generator=g) * 2 - 1)
    torch.rand(6, generator=g)
    order = torch.rand(6, 4, generator=g).argsort(1)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, lambda x, _: x)
    for i, x in enumerate(images):
        for k in order[i].tolist():
            x = operations[k](x, float(factors[i, k]))
        torch.testing.assert_close(ours[i], x, atol=3e-4, rtol=0)


def test_hue_turns_the_chroma_and_keeps_the_luma(images):
    a, b = jitter_matrices(6, (0.0, 0.0, 0.0, 0.1), 1.0, NONE, seeded())
    turned = jitter(images, a, b)
    luma = torch.tensor([0.2989, 0.587, 0.114])
    torch.testing.assert_close(
        torch.einsum("c,bchw->bhw", luma, turned), torch.einsum("c,bchw->bhw", luma, images), atol=1e-4, rtol=0
    )
    gray = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(jitter(gray, a, b), gray, atol=2e-4, rtol=0)
    factors = 0.1 * (torch.rand(6, 4, generator=seeded()) * 2 - 1)[:, 3]
    theirs = torch.stack([tv.adjust_hue(x, float(f)) for x, f in zip(images, factors, strict=True)])
    ours, theirs = (x - images - (x - images).mean(1, keepdim=True) for x in (turned, theirs))
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.8  # the same way round,
    assert 0.7 < ours.norm() / theirs.norm() < 1.4  # about as far


def test_gray_and_unjittered_images(images):
    a, b = jitter_matrices(6, (0.4, 0.4, 0.2, 0.1), 0.0, torch.tensor([1, 4]), seeded())
    out = jitter(images, a, b)
    torch.testing.assert_close(out[[0, 2, 3, 5]], images[[0, 2, 3, 5]])
    torch.testing.assert_close(out[[1, 4]], tv.rgb_to_grayscale(images[[1, 4]], 3), atol=1e-4, rtol=0)


def test_values_stay_in_range():
    x = torch.rand(32, 3, 8, 8, generator=seeded())
    out = jitter(x, *jitter_matrices(32, (1.0, 1.0, 1.0, 0.5), 1.0, NONE, seeded()))
    assert out.min() >= 0 and out.max() <= 1


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
    out = solarize(x.float() / 255, torch.tensor([0, 3]))
    expected = torch.cat((tv.solarize(x[:1], 128), x[1:3], tv.solarize(x[3:], 128))).float() / 255
    torch.testing.assert_close(out, expected)


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
