"""Reconstruction and generation figures, independent of how the images were batched."""

import math

import pytest
import torch

from vtp.config import ConfigError
from vtp.evaluation.generation import measure, reference_moments
from vtp.evaluation.reconstruction import reconstruction
from vtp.images import denormalise, normalise
from vtp.metrics.extractors import Extractor
from vtp.metrics.fidelity import psnr, ssim
from vtp.metrics.frechet import frechet_distance, moments

POOLED = Extractor("fd_pooled", "mean colour of quarters", lambda x: x.float().unfold(2, 8, 8).mean((3, 4)).flatten(1))


def batches(sizes=(5, 2), seed=0):
    g = torch.Generator().manual_seed(seed)
    images = normalise(torch.randint(256, (sum(sizes), 3, 16, 16), generator=g, dtype=torch.uint8))
    return [(part, None) for part in images.split(list(sizes))]


def fade(images):
    return 0.9 * images


def test_reconstruction_is_a_mean_over_images():
    (images, _) = batches((7,))[0]
    got = reconstruction(fade, batches(), POOLED)
    before, after = denormalise(images), denormalise(fade(images))
    assert got["psnr"] == pytest.approx(psnr(after, before).mean().item(), rel=1e-6)
    assert got["ssim"] == pytest.approx(ssim(after, before).mean().item(), rel=1e-6)
    levels = [(x * 255).round().to(torch.uint8) for x in (before, after)]
    want = frechet_distance(*(moments(POOLED.features(x)) for x in levels))
    assert got["rfd_pooled"] == pytest.approx(want, rel=1e-9)
    assert reconstruction(fade, batches((1, 1, 5)), POOLED) == pytest.approx(got, rel=1e-6)
    assert set(reconstruction(fade, batches())) == {"psnr", "ssim"}


def test_pixels_out_of_range_count_as_what_is_shown():
    white = normalise(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))
    assert math.isinf(reconstruction(lambda x: x + 10, [(white, None)])["psnr"])


def test_generation_distance_and_agreement():
    pictures = torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8)
    asked = torch.tensor([0, 1] * 4 + [0])
    reference = reference_moments(pictures.split(2), POOLED)
    shown = list(zip(pictures.split(4), asked.split(4), strict=True))
    got = measure(shown, reference, POOLED, lambda x: torch.zeros(len(x), dtype=torch.long))
    assert got == {"gfd_pooled": pytest.approx(0, abs=1e-8), "class_agreement": pytest.approx(5 / 9)}
    assert set(measure(shown, reference, POOLED, None)) == {"gfd_pooled"}


def test_nothing_to_measure_is_said():
    with pytest.raises(ConfigError, match="no readable image"):
        reconstruction(fade, [])
    with pytest.raises(ConfigError, match="no pictures"):
        measure([], reference_moments([torch.zeros(2, 3, 16, 16)], POOLED), POOLED, None)
    with pytest.raises(ConfigError, match="no pictures to compare"):
        reference_moments([], POOLED)
