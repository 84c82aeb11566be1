import math
from itertools import combinations

import numpy as np
import pytest
import torch

from vtp.report.pictures import SHOWN, Tokenizer, _chance, principal_colours, read_held_out
from vtp.report.plots import Curve, panel, smooth


@pytest.fixture
def tokenizer(make_run) -> Tokenizer:
    return Tokenizer(make_run("vtp") / "tokenizer")


def test_pictures_are_of_distinct_held_out_images(tokenizer):
    held_out = read_held_out("scenes:test", None, 32)
    shown = held_out.shown()
    originals, decoded, decibels = tokenizer.reconstructions(shown)
    assert originals.shape == decoded.shape == (SHOWN, 32, 32, 3)
    assert len({image.tobytes() for image in originals}) == SHOWN
    error = (originals[0] / 255.0 - decoded[0] / 255.0) ** 2
    assert decibels[0] == pytest.approx(-10 * math.log10(error.mean()), abs=0.1)  # pictures are rounded, PSNR is not


def test_confusion_counts_every_image_once(tokenizer):
    held_out = read_held_out("scenes:test", None, 32)
    held_out = held_out._replace(samples=held_out.samples[:200])
    features = tokenizer.image_features(held_out.samples)
    confusion = tokenizer.confusion(held_out, features, "shape")
    truth = np.bincount([s.labels["shape"] for s in held_out.samples if "shape" in s.labels], minlength=8)
    np.testing.assert_array_equal(confusion.counts.sum(1), truth)
    assert confusion.names == held_out.classes["shape"]
    few = held_out._replace(samples=held_out.samples[:10])
    assert tokenizer.confusion(few, features, "word") is None


def test_retrieval_finds_everything_when_features_match(tokenizer, monkeypatch):
    held_out = read_held_out("scenes:test", None, 32)
    held_out = held_out._replace(samples=held_out.samples[:40])
    captions = sorted({s.captions[0] for s in held_out.samples})

    def one_hot(texts):
        return torch.eye(len(captions))[[captions.index(t) for t in texts]]

    monkeypatch.setattr(tokenizer, "text_features", one_hot)
    monkeypatch.setattr(tokenizer, "image_features", lambda samples: one_hot([s.captions[0] for s in samples]))
    found = tokenizer.retrieval(held_out)
    assert all(recall == 1 for recall, _ in found.recalls.values())
    assert all(hits[0].right and not hits[1].right for hits in found.texts)


def test_chance_is_the_share_of_blind_draws_that_hit():
    draws = list(combinations(range(6), 3))
    blind = sum(bool({0, 1} & set(draw)) for draw in draws) / len(draws)
    assert _chance([2, 2], 6, 3) == pytest.approx(blind)


def test_feature_colours_separate_what_features_separate():
    features = torch.zeros(2, 3, 3, 5)
    features[0, :, :, 1], features[1, :, :, 2] = 1.0, 1.0
    colours = principal_colours(features)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 2
    np.testing.assert_array_equal(colours, principal_colours(features))


def test_smoothing_keeps_lines_and_ends():
    line = np.linspace(0, 5, 200)
    np.testing.assert_allclose(smooth(line), line, atol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=200)
    assert np.std(smooth(noisy) - line) < 0.6
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_curves_carry_no_colour_of_their_own():
    curve = Curve(np.arange(10.0), np.arange(10.0), 1)
    svg = panel([curve], "a <label>", (5.0, "ln K"))
    assert "var(--run-1)" in svg and "var(--ink-2)" in svg and "a &lt;label&gt;" in svg
    assert "http" not in svg.replace("http://www.w3.org/1999/xlink", "")
    assert not [c for c in ("#0404", "#010101", "#020202", "#030303") if c in svg]
