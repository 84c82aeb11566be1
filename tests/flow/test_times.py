import pytest
import torch
from safetensors.torch import load_file

from vtp.flow.times import logit_normal, warped_times


def test_logit_normal_has_its_moments_and_follows_its_generator():
    t = logit_normal(200_000, mu=-0.5, sigma=1.25, generator=torch.Generator().manual_seed(3))
    assert 0 < t.min() and t.max() < 1
    assert abs(t.logit().mean() + 0.5) < 0.01 and abs(t.logit().std() - 1.25) < 0.01
    assert torch.equal(
        logit_normal(9, generator=torch.Generator().manual_seed(1)),
        logit_normal(9, generator=torch.Generator().manual_seed(1)),
    )


def test_warp_keeps_the_ends_and_order_and_is_uniform_at_one():
    torch.testing.assert_close(warped_times(11), torch.linspace(0, 1, 11))
    for shift in (0.075, 0.3, 3.0):
        t = warped_times(50, shift)
        assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
        torch.testing.assert_close(1 - t.flip(0), warped_times(50, 1 / shift))  # s and 1/s mirror each other


@pytest.mark.parametrize(("published", "shift"), [(0.0, 1.0), (0.075, 0.075), (0.3, 0.3)])
def test_published_grids(shared, published, shift):
    grids = load_file(shared / "fixtures/lightningdit/tgrids_250.safetensors")
    torch.testing.assert_close(warped_times(250, shift), grids[f"shift{published}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("points", "shift"), [(1, 1.0), (10, 0.0), (10, -1.0)])
def test_impossible_grid(points, shift):
    with pytest.raises(ValueError, match="time grid"):
        warped_times(points, shift)
