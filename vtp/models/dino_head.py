"""The projection head of self-distillation (Caron et al. 2021; Oquab et al. 2023)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vtp.models.layers import Linear


class _UnitRows(torch.autograd.Function):
    """gain v / |v| for each row, its gradient in closed form: autograd takes 10 passes over them, this 4.

    torch's own fused kernel makes a row of zeros NaN; here it stays zeros.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(1e-12)
        scale = gain / norm
        ctx.save_for_backward(v, norm, scale)
        return v * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, norm, scale = ctx.saved_tensors
        along = (grad * v).sum(1, keepdim=True) / norm
        return torch.addcmul(grad, v, -along / norm).mul_(scale), along


class Prototypes(nn.Module):
    """Weight-normalised rows g v / |v|, under the names of torch's weight_norm but deep-copyable."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_g)
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Float[Tensor, "k d"]:
        """The prototypes themselves, in float32."""
        return _UnitRows.apply(self.weight_v.float(), self.weight_g.float())

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return F.linear(x, self.weight())


class DINOHead(nn.Module):
    """MLP with GELU, L2 normalisation, then the cosine to each of `out_dim` prototypes (times its gain)."""

    def __init__(
        self, in_dim: int, out_dim: int, nlayers: int = 3, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers = [layer for a, b in pairwise(widths) for layer in (Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(bottleneck_dim, out_dim)

    def embed(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n b"]:
        """The unit vector which is compared with the prototypes, in float32."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return self.last_layer(self.embed(x))
