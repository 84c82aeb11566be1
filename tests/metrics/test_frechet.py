"""The Frechet distance against known answers, its symmetries, and sets smaller than their features."""

import json

import numpy as np
import pytest
import torch

from vtp.metrics.frechet import Moments, frechet_distance, merge, moments


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diagonal_gaussians_have_their_exact_distance():
    def gaussian(mean, variances):
        return Moments(101, torch.full((8,), mean, dtype=torch.float64), 100 * torch.diag(variances))

    one = torch.arange(1, 9, dtype=torch.float64)
    assert frechet_distance(gaussian(0.0, one), gaussian(0.5, 4 * one)) == pytest.approx(38.0, abs=1e-12)


@pytest.mark.parametrize(
    "file, key, a, b, tolerance",
    [
        ("resnet20_cifar_features.npz", "train_vs_test", "train", "test", 1e-10),
        ("resnet20_cifar_features.npz", "test_vs_test_blur3", "test", "test_blur3", 1e-11),
        ("resnet20_cifar_features.npz", "train_vs_test_blur3", "train", "test_blur3", 1e-11),
        # Rank-deficient: both reference formulas take roots of rounding noise and differ from each other by 1.5e-7 and
        # 4e-8; the exact value (nuclear norm, as in the next test) is 4909.311047677 and 33935.984337384.
        ("squeezenet_photos_features.npz", "orig_vs_jpeg50", "orig", "jpeg50", 4e-7),
        ("squeezenet_photos_features.npz", "orig_vs_jpeg10", "orig", "jpeg10", 6e-8),
    ],
)
def test_reference_features_have_their_known_distance(shared, file, key, a, b, tolerance):
    expected = json.loads((shared / "data/reference/expected.json").read_text())
    want = next(cases[key]["symmetric_eigh"] for cases in expected.values() if key in cases)
    features = np.load(shared / "data/reference" / file)
    got = frechet_distance(moments(torch.from_numpy(features[a])), moments(torch.from_numpy(features[b])))
    assert got == pytest.approx(want, rel=tolerance)


def test_fewer_samples_than_dimensions_is_exact():
    """Then the mixed term is the nuclear norm of the centred sets' inner products, which needs no square root."""
    x, y = normal(9, 40) * torch.logspace(3, -3, 40, dtype=torch.float64), normal(7, 40, seed=1) + 0.1
    cx, cy = x - x.mean(0), y - y.mean(0)
    mixed = torch.linalg.svdvals(cx @ cy.T).sum() / (8 * 6) ** 0.5
    want = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() / 8 + cy.square().sum() / 6 - 2 * mixed
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(want), rel=1e-9)


def test_distance_is_symmetric_zero_to_itself_and_blind_to_rotation():
    x, y = moments(normal(50, 6)), moments(2 * normal(60, 6, seed=1) + 1)
    turn = torch.linalg.qr(normal(6, 6, seed=2))[0]
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    assert 0 <= frechet_distance(x, x) < 1e-12
    turned = frechet_distance(moments(normal(50, 6) @ turn), moments((2 * normal(60, 6, seed=1) + 1) @ turn))
    assert turned == pytest.approx(frechet_distance(x, y), rel=1e-10)


def test_batches_merge_to_the_moments_of_all_rows_even_far_from_zero():
    rows = normal(31, 5) + 1e6
    whole = moments(rows)
    parts = merge(merge(moments(rows[:10]), moments(rows[10:11])), moments(rows[11:]))
    assert parts.count == whole.count == 31
    torch.testing.assert_close(parts.mean, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.scatter / 30, torch.cov(rows.T), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (normal(5, 3), normal(5, 4), "3 and of 4"),
        (normal(1, 3), normal(5, 3), "1 and 5 samples"),
        (normal(5, 3), normal(5, 3) / 0, "NaN or infinity"),
    ],
)
def test_what_has_no_distance_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(moments(x), moments(y))
