"""When to look at the path: random times for training, grids of times for sampling."""

import torch
from jaxtyping import Float
from torch import Tensor


def logit_normal(
    n: int,
    mu: float = 0.0,
    sigma: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Float[Tensor, " n"]:
    """Training times ``sigmoid(mu + sigma z)`` with z normal (Esser et al. 2024, Eq. 19).

    ``mu < 0`` looks more often at the noisy end, t = 0. A generator must live on ``device``.
    """
    return torch.sigmoid(mu + sigma * torch.randn(n, generator=generator, device=device))


def warped_times(points: int, shift: float = 1.0) -> Float[Tensor, " points"]:
    """Sampling times from 0 to 1: a uniform grid warped by ``t' = s t / (1 + (s - 1) t)``.

    ``points`` times make ``points - 1`` steps. ``shift`` s < 1 spends more of them near the noise, 1 is uniform.
    Published LightningDiT files write the uniform grid as ``timestep_shift: 0``; here it is 1.
    """
    if points < 2 or shift <= 0:
        raise ValueError(f"a time grid needs points >= 2 and shift > 0, not points={points}, shift={shift}")
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()
