"""The linear path between noise ``x0`` (t = 0) and data ``x1`` (t = 1), and the losses of its velocity.

    x_t = t x1 + (1 - t) x0          dx_t/dt = x1 - x0

(Liu et al. 2023, rectified flow; Lipman et al. 2023, conditional optimal transport).
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def interpolate(x0: Float[Tensor, "b c *grid"], x1: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"]) -> Tensor:
    """The point ``x_t = t x1 + (1 - t) x0`` of each row's path at its own time in [0, 1]."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def target_velocity(x0: Float[Tensor, "b c *grid"], x1: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    """What the network learns to predict, ``x1 - x0``: constant along the path."""
    return x1 - x0


def mse_loss(pred: Float[Tensor, "b c *grid"], target: Float[Tensor, "b c *grid"]) -> Float[Tensor, " b"]:
    """Squared error of each row, averaged over channels and positions, in float32."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def cosine_loss(pred: Float[Tensor, "b c *grid"], target: Float[Tensor, "b c *grid"]) -> Float[Tensor, " b"]:
    """One minus the cosine between the channel vectors, averaged over positions (Yao et al. 2025, LightningDiT)."""
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=1)).flatten(1).mean(1)
