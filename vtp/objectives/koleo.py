"""Spreading of features over the sphere (KoLeo)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vtp.objectives.precision import full_precision


@full_precision
def koleo_loss(features: Float[Tensor, "b d"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Push each feature away from its nearest neighbour (Sablayrolles et al. 2019, Eq. 2).

        L = -1/b sum_i log( min_{j != i} |x_i - x_j| + eps ),   x = features on the unit sphere

    Neighbours are looked for among this rank's rows only, as in DINOv2. `eps` keeps two equal rows finite.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(
            f"koleo_loss: {len(features)} row(s) have no nearest neighbour; use at least two images a rank"
        )
    x = F.normalize(features, dim=-1)
    nearest = (x @ x.T).detach().fill_diagonal_(-2).argmax(dim=1)
    return -((x - x[nearest]).norm(dim=-1) + eps).log().mean()
