"""Probes against scikit-learn, a loop, and features whose answer is known."""

import warnings

import numpy as np
import pytest
import torch

from vtp.config import ConfigError
from vtp.evaluation import probes
from vtp.evaluation.probes import PENALTIES, Features, extract, knn, linear_probe


def clusters(n, classes=4, d=6, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (n,), generator=g)
    return Features(centres[y] + spread * torch.randn(n, d, generator=g), y)


def test_regression_ends_where_scikit_learn_ends():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, penalty = clusters(120, spread=2.0), 1e-2
    x = (train.x - train.x.mean(0)) / train.x.std(0)
    ours = probes._fit(x, train.y, penalty, torch.zeros(7, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=5000).fit(x, train.y)
    torch.testing.assert_close(ours[:-1].T, torch.from_numpy(theirs.coef_).float(), atol=2e-3, rtol=2e-3)
    difference = ours[-1] - torch.from_numpy(theirs.intercept_).float()  # intercepts are free up to a constant
    torch.testing.assert_close(difference, difference.mean().expand(4), atol=2e-3, rtol=0)


def test_linear_probe_reads_what_is_there_and_nothing_where_nothing_is():
    train, test = clusters(300), clusters(200, seed=1)
    assert linear_probe(train, test, 4)["top1"] > 0.9
    shuffled = Features(train.x, train.y[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    assert linear_probe(shuffled, test, 4)["top1"] < 0.5


def test_linear_probe_ignores_units_and_never_chooses_by_test_images():
    train, test = clusters(200, spread=2.0), clusters(100, spread=2.0, seed=1)
    want = linear_probe(train, test, 4)
    scale, shift = torch.logspace(-1, 2, 6), torch.arange(6.0)
    moved = linear_probe(Features(train.x * scale + shift, train.y), Features(test.x * scale + shift, test.y), 4)
    assert moved["top1"] == pytest.approx(want["top1"], abs=0.02)
    other = linear_probe(train, Features(test.x, (test.y + 1) % 4), 4)  # other test labels, the same choice
    assert (other["penalty"], other["held_out_accuracy"]) == (want["penalty"], want["held_out_accuracy"])
    assert want["penalty"] in PENALTIES


def test_knn_equals_the_loop():
    train, test, k, temperature = clusters(40, spread=2.0), clusters(15, spread=2.0, seed=1), 5, 0.1
    right = 0
    for x, y in zip(test.x, test.y, strict=True):
        similarity = [(float(x @ t / x.norm() / t.norm()), int(c)) for t, c in zip(train.x, train.y, strict=True)]
        votes = np.zeros(4)
        for s, c in sorted(similarity, reverse=True)[:k]:
            votes[c] += np.exp(s / temperature)
        right += int(votes.argmax() == int(y))
    assert knn(train, test, 4, k, temperature)["top1"] == pytest.approx(right / 15)


def test_knn_ignores_lengths():
    train, test = clusters(60), clusters(30, seed=1)
    scaled = Features(train.x * torch.rand(60, 1).add(0.1), train.y)
    assert knn(scaled, test, 4) == knn(train, test, 4)


def test_too_few_training_images_is_said():
    with pytest.raises(ConfigError, match="k=20"):
        knn(clusters(5), clusters(5), 4)
    with pytest.raises(ConfigError, match="ten training images"):
        linear_probe(clusters(5), clusters(5), 4)
    with pytest.raises(ConfigError, match="no image"):
        extract(lambda x: x, [])
