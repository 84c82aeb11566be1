import math

import pytest
import torch

from vtp.flow.samplers import dopri5, euler, heun
from vtp.flow.times import warped_times

MEAN, STD = 1.5, 0.3


def gaussian_velocity(x, t):
    """Exact for data N(MEAN, STD^2): E[x1 - x0 | x_t = x] of two independent normals."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def flow_map(noise):
    """Where the exact flow of ``gaussian_velocity`` carries each point: an affine map in one dimension."""
    return MEAN + STD * noise


def noise(n):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_exact_where_the_path_is_straight(sampler):
    start, end = noise(4), noise(4) + 2
    torch.testing.assert_close(sampler(lambda x, t: end - start, start, warped_times(4, 0.3).double()), end)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler, order):
    start = noise(64)
    errors = [
        (sampler(gaussian_velocity, start, torch.linspace(0, 1, n + 1).tolist()) - flow_map(start)).abs().mean()
        for n in (64, 128, 256)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert abs(math.log2(coarse / fine) - order) < 0.15


@pytest.mark.parametrize("sampler", [euler, heun])
def test_recovers_a_gaussian(sampler):
    samples = sampler(gaussian_velocity, noise(50_000), warped_times(200))
    assert abs(samples.mean() - MEAN) < 0.01 and abs(samples.std() - STD) < 0.01


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torchdiffeq's own
def test_adaptive_solver_agrees_with_the_exact_flow():
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    start = noise(16)
    torch.testing.assert_close(
        dopri5(gaussian_velocity, start, [0.0, 1.0], rtol=1e-6), flow_map(start), rtol=0, atol=1e-4
    )
