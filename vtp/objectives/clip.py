"""Image-text contrast by softmax (CLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vtp import dist
from vtp.objectives.blocks import sum_over_rows
from vtp.objectives.precision import full_precision


@full_precision
def clip_loss(
    image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], logit_scale: Float[Tensor, "*one"]
) -> Float[Tensor, ""]:
    """InfoNCE in both directions (Radford et al. 2021, Fig. 3); nats.

        L = -1/2B sum_i [ log softmax_j(s x_i.y_j)_i + log softmax_j(s y_i.x_j)_i ]

    With several ranks the sums over j run over all ranks' rows and the sum over i over this rank's: the mean of the
    ranks' losses (what averaging gradients makes of them) is the loss of one process that holds all rows. Every rank
    must hold equally many rows. Of many rows the similarities are made block by block.

    Args:
        image, text: this rank's pairs, L2-normalised; row i of one belongs to row i of the other.
        logit_scale: s, the inverse temperature, already exponentiated; one element.
    """
    targets = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
    return (
        _one_way(logit_scale * image, dist.gather(text), targets)
        + _one_way(logit_scale * text, dist.gather(image), targets)
    ) / 2


def _one_way(queries: Float[Tensor, "b d"], keys: Float[Tensor, "B d"], targets: Int[Tensor, " b"]) -> Tensor:
    def loss(queries: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(queries @ keys.T, targets, reduction="sum")

    return sum_over_rows(loss, len(keys), queries, targets) / len(queries)
