"""Image-text contrast by sigmoid (SigLIP)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vtp import dist
from vtp.objectives.blocks import sum_over_rows
from vtp.objectives.precision import full_precision


@full_precision
def siglip_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, "*one"],
    logit_bias: Float[Tensor, "*one"],
) -> Float[Tensor, ""]:
    """Every pair is a yes-no question (Zhai et al. 2023, Eq. 1); nats per image.

        L = -1/B sum_i sum_j log sigmoid( z_ij (s x_i.y_j + b) ),   z_ij = 1 if i = j else -1

    With several ranks i runs over this rank's images and j over all ranks' texts: the mean of the ranks' losses is the
    loss of one process that holds all rows. Every rank must hold equally many rows. Of many rows the similarities are
    made block by block.

    Args:
        image, text: this rank's pairs, L2-normalised; row i of one belongs to row i of the other.
        logit_scale: s, already exponentiated. The paper starts at 10.
        logit_bias: b. The paper starts at -10, so that the many negatives do not dominate.
    """
    texts = dist.gather(text)

    def as_negatives(image: Tensor) -> Tensor:
        return F.logsigmoid(-(logit_scale * image @ texts.T + logit_bias)).sum()

    # log sigmoid(x) - log sigmoid(-x) = x: all pairs as negatives, then the true ones put right. No [b, B] of signs.
    positives = (logit_scale * (image * text).sum(-1) + logit_bias).sum()
    return -(sum_over_rows(as_negatives, len(texts), image) + positives) / len(image)
