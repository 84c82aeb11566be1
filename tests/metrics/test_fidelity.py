"""PSNR and SSIM against their definitions; batches never change an image's figure."""

import math

import pytest
import torch
import torch.nn.functional as F

from vtp.metrics import fidelity
from vtp.metrics.fidelity import psnr, ssim


def images(b=3, side=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(b, 3, side, side, generator=g)
    return x, (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1)


def test_psnr_equals_the_published_loop():
    x, y = images()
    for got, a, b in zip(psnr(x, y), x.double(), y.double(), strict=True):
        squares = [(255 * u - 255 * v) ** 2 for u, v in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
        assert math.isclose(got, 20 * math.log10(255 / math.sqrt(sum(squares) / len(squares))), rel_tol=1e-5)


def test_psnr_of_one_level_everywhere_and_of_equal_images():
    x = torch.full((1, 3, 8, 8), 0.5)
    torch.testing.assert_close(psnr(x, x + 1 / 255), torch.tensor([20 * math.log10(255)]), atol=1e-3, rtol=0)
    assert psnr(x, x).isinf().all()


def slow_ssim(a, b):
    """Wang et al. 2004, Eq. 13, around every pixel of every channel; the image is mirrored at its edges."""
    a, b = (F.pad(v, (5, 5, 5, 5), mode="reflect") for v in (a, b))
    w = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=torch.float64)
    w = torch.outer(w, w) / w.sum() ** 2
    c1, c2, values = 0.01**2, 0.03**2, []
    for channel in range(3):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                p, q = (v[channel, i : i + 11, j : j + 11] for v in (a, b))
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, cov = (w * p * p).sum() - mp**2, (w * q * q).sum() - mq**2, (w * p * q).sum() - mp * mq
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return sum(values) / len(values)


def test_ssim_equals_the_loop():
    x, y = images(b=2, side=12)
    want = torch.stack([slow_ssim(a, b) for a, b in zip(x.double(), y.double(), strict=True)])
    torch.testing.assert_close(ssim(x, y).double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))


@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_ssim_in_bands_is_that_of_the_whole(monkeypatch, rows):
    x, y = images(b=2, side=16)
    whole = ssim(x, y)
    monkeypatch.setattr(fidelity, "BAND", rows * 2 * 16)
    torch.testing.assert_close(ssim(x, y), whole)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_an_image_has_one_figure_whatever_its_batch(metric):
    x, y = images(b=5)
    torch.testing.assert_close(metric(x, y), torch.cat([metric(x[:1], y[:1]), metric(x[1:], y[1:])]))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="8 x 8"):
        ssim(*images(side=8))
