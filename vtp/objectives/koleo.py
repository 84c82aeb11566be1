"""Spreading of features over the sphere (KoLeo)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vtp import dist
from vtp.objectives.precision import full_precision


@full_precision
def koleo_loss(features: Float[Tensor, "b d"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Push each feature away from its nearest neighbour (Sablayrolles et al. 2019, Eq. 2).

        L = -1/b sum_i log( min_{j != i} |x_i - x_j| + eps ),   x = features on the unit sphere

    Neighbours are looked for among the rows of all ranks (DINOv2: of this rank), so that the mean of the ranks' losses
    is the loss of one process that holds all rows. Every rank must hold equally many. `eps` keeps equal rows finite.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(
            f"koleo_loss: {len(features)} row(s) have no nearest neighbour; use at least two images a rank"
        )
    x = F.normalize(features, dim=-1)
    everyone = dist.gather(x)
    similarity = (x @ everyone.T).detach()  # [b, B]
    similarity.diagonal(dist.rank() * len(x)).fill_(-2)
    return -((x - everyone[similarity.argmax(dim=1)]).norm(dim=-1) + eps).log().mean()
