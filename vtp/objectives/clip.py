"""Image-text contrast by softmax (CLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vtp import dist
from vtp.objectives.precision import full_precision


@full_precision
def clip_loss(
    image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], logit_scale: Float[Tensor, "*one"]
) -> Float[Tensor, ""]:
    """InfoNCE in both directions (Radford et al. 2021, Fig. 3); nats.

        L = -1/2B sum_i [ log softmax_j(s x_i.y_j)_i + log softmax_j(s y_i.x_j)_i ]

    With several ranks the sums over j run over all ranks' rows and the sum over i over this rank's: the mean of the
    ranks' losses (what averaging gradients makes of them) is the loss of one process that holds all rows. Every rank
    must hold equally many rows.

    Args:
        image, text: this rank's pairs, L2-normalised; row i of one belongs to row i of the other.
        logit_scale: s, the inverse temperature, already exponentiated; one element.
    """
    targets = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
    to_text = logit_scale * image @ dist.gather(text).T  # [b, B]
    to_image = logit_scale * text @ dist.gather(image).T  # [b, B]
    return (F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)) / 2
