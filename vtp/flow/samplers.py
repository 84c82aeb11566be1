"""Ordinary differential equation solvers: from noise (t = 0) to data (t = 1) along a velocity field.

A sampler is a function of ``velocity(x, t) -> dx/dt``, the starting point and the times to visit. ``t`` is a float.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Velocity: TypeAlias = Callable[[Tensor, float], Tensor]
Times: TypeAlias = Float[Tensor, " points"] | Sequence[float]


def euler(velocity: Velocity, x: Tensor, times: Times) -> Tensor:
    """First order, one evaluation a step: ``x += dt v(x, t)``."""
    for t, t_next in pairwise(_floats(times)):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Times) -> Tensor:
    """Second order, two evaluations a step: the mean of the slopes at both ends (Karras et al. 2022, Alg. 1)."""
    for t, t_next in pairwise(_floats(times)):
        slope = velocity(x, t)
        slope_next = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + slope_next) / 2
    return x


def dopri5(velocity: Velocity, x: Tensor, times: Times, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Fifth order with adaptive steps (Dormand and Prince 1980), through ``torchdiffeq``; defaults as published."""
    from torchdiffeq import odeint

    grid = torch.tensor(_floats(times), device=x.device)
    return odeint(lambda t, y: velocity(y, float(t)), x, grid, method="dopri5", rtol=rtol, atol=atol)[-1]


def _floats(times: Times) -> list[float]:
    return times.tolist() if isinstance(times, Tensor) else list(times)
