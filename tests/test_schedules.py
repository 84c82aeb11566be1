"""Schedules: ends, monotony, and that the batch size moves nothing."""

import math
from functools import partial

import pytest

from vtp.schedules import Ramp, WarmupCosine

RAMPS = [Ramp(start=0.04, end=0.07), Ramp(start=0.996, end=1.0, cosine=True), Ramp(start=2.0, end=1.0, share=0.3)]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_goes_from_start_to_end_and_stays(ramp):
    total = 1000
    values = [ramp(i, total) for i in range(total + 1)]
    assert values[0] == ramp.start
    assert values[-1] == ramp.end
    assert all(v == ramp.end for v in values[round(ramp.share * total) :])
    sign = math.copysign(1, ramp.end - ramp.start)
    assert all(sign * (b - a) >= 0 for a, b in zip(values, values[1:], strict=False))


def test_ramp_half_way():
    assert Ramp(start=1.0, end=3.0, share=0.5)(25, 100) == 2.0
    assert Ramp(start=1.0, end=3.0, cosine=True)(25, 100) == pytest.approx(2 - math.cos(math.pi / 4))


def test_ramp_over_no_share_is_at_its_end_at_once():
    assert Ramp(start=1.0, end=3.0, share=0.0)(0, 100) == 3.0


def test_warmup_cosine_peaks_after_the_warmup():
    lr = WarmupCosine(peak=2.0, warmup=0.1, end=0.5)
    assert lr(0, 1000) == 0.0
    assert lr(50, 1000) == pytest.approx(1.0)
    assert lr(100, 1000) == 2.0
    assert lr(550, 1000) == pytest.approx(1.25)
    assert lr(1000, 1000) == lr(2000, 1000) == 0.5
    assert WarmupCosine(peak=2.0, warmup=0.0)(0, 1000) == 2.0


@pytest.mark.parametrize("schedule", [*RAMPS, WarmupCosine(peak=1.0, warmup=0.2, end=0.1)])
def test_images_count_not_steps(schedule):
    """Twice the batch at half the steps passes through the same values at the same images."""
    total = 64 * 100
    small = {step * 64: schedule(step * 64, total) for step in range(100)}
    large = {step * 128: schedule(step * 128, total) for step in range(50)}
    assert all(small[images] == value for images, value in large.items())


def test_any_length_of_run():
    for total in (0, 1, 7):
        for images in range(total + 1):
            assert 0 <= WarmupCosine(peak=1.0, warmup=0.5)(images, total) <= 1
            assert 1 <= Ramp(start=1.0, end=2.0)(images, total) <= 2


@pytest.mark.parametrize(
    "make", [partial(Ramp, start=0.0, end=1.0, share=1.5), partial(WarmupCosine, peak=1.0, warmup=1.0)]
)
def test_shares_are_shares(make):
    with pytest.raises(ValueError, match="of the run"):
        make()
