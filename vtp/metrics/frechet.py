"""Frechet distance between two sets of features. It is called FID only on the features of `inception`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Moments(NamedTuple):
    """What a set of feature vectors leaves behind: enough to be merged with others and compared. All float64."""

    count: int  # type: ignore[assignment]  # tuple.count is of no use here
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]  # sum of (x - mean)(x - mean)^T; the covariance is scatter / (count - 1)


def moments(features: Float[Tensor, "n d"]) -> Moments:
    """Moments of the rows, in double precision."""
    x = features.double()
    mean = x.mean(0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets (Chan et al. 1979): as accurate as all rows at once, in any order of batches."""
    count, apart = a.count + b.count, b.mean - a.mean
    mean = a.mean + apart * (b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + torch.outer(apart, apart) * (a.count * b.count / count))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians with these moments (Heusel et al. 2017, Eq. 6).

        |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2

    The last trace is the sum of the singular values of S_a^1/2 S_b^1/2, which takes no square root of rounding noise:
    it stays accurate with fewer samples than dimensions, where the usual sqrtm(S_a S_b) does not.

    Raises:
        ValueError: features of different width, fewer than two samples in a set, or features that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"frechet_distance: features of {len(a.mean)} and of {len(b.mean)} numbers: not one network's")
    if min(a.count, b.count) < 2:
        raise ValueError(f"frechet_distance: sets of {a.count} and {b.count} samples; a covariance needs two")
    if not all(x.isfinite().all() for m in (a, b) for x in (m.mean, m.scatter)):
        raise ValueError("frechet_distance: features hold NaN or infinity")
    between = torch.linalg.svdvals(_root_covariance(a) @ _root_covariance(b)).sum()
    traces = a.scatter.trace() / (a.count - 1) + b.scatter.trace() / (b.count - 1)
    distance = (a.mean - b.mean).square().sum() + traces - 2 * between
    return max(0.0, float(distance))  # two equal sets: rounding alone may make it negative


def _root_covariance(m: Moments) -> Float[Tensor, "d d"]:
    """The symmetric square root of the covariance, directions of rounding noise taken as the zeros they are."""
    values, vectors = torch.linalg.eigh(m.scatter / (m.count - 1))
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors * torch.where(values > noise, values, 0).sqrt()) @ vectors.T
