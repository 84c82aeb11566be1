"""CLIP's text tower. The causal mask is an argument of the attention, not a buffer that a load could leave unset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vtp.models.config import TextConfig
from vtp.models.layers import Groups, LayerScale, Linear, Recomputable, attention, pack, unpack
from vtp.models.linear import linear


class CausalAttention(nn.Module):
    """Multi-head self-attention under the names of nn.MultiheadAttention."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.num_heads = cfg.num_heads
        self.causal = not cfg.no_causal_mask
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = Linear(dim, dim, std=dim**-0.5 * (2 * cfg.depth) ** -0.5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj_weight, std=self.in_proj_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, x: Float[Tensor, "n d"], groups: Groups) -> Float[Tensor, "n d"]:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        seen = []
        for part in unpack(qkv, groups):
            q, k, v = part.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)  # [b, heads, l, h]
            seen.append(attention(q, k, v, causal=self.causal).transpose(1, 2).flatten(2))
        return self.out_proj(pack(seen))


class TextMlp(nn.Module):
    """Linear, GELU, linear under CLIP's names."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        dim, hidden = cfg.embed_dim, int(cfg.embed_dim * cfg.mlp_ratio)
        self.quick_gelu = cfg.quick_gelu
        self.c_fc = Linear(dim, hidden, std=(2 * dim) ** -0.5)
        self.c_proj = Linear(hidden, dim, std=dim**-0.5 * (2 * cfg.depth) ** -0.5)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class TextBlock(Recomputable):
    """Pre-norm block of the text tower."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        dim, scale = cfg.embed_dim, cfg.ls_init_value
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(cfg)
        self.ls_1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = TextMlp(cfg)
        self.ls_2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def compute(self, x: Float[Tensor, "n d"], groups: Groups) -> Float[Tensor, "n d"]:
        x = x + self.ls_1(self.attn(self.ln_1(x), groups))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class TextTransformer(nn.Module):
    """The blocks of the text tower, on embedded tokens.

    Texts come in groups of one length each. The tokens of all groups lie behind one another, so that a block computes
    its products once, on no more padding than the groups have.
    """

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.depth))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Texts of one length."""
        return self.grouped([x])[0]

    def grouped(self, groups: Sequence[Float[Tensor, "_ _ d"]]) -> list[Float[Tensor, "_ _ d"]]:
        """Texts in groups, each [texts, tokens, d]."""
        shapes = tuple((x.shape[0], x.shape[1]) for x in groups)
        x = pack(groups)
        for block in self.resblocks:
            x = block(x, shapes)
        return unpack(x, shapes)


def pool_text(x: Float[Tensor, "b l d"], text: Int[Tensor, "b l"], pool_type: str) -> Float[Tensor, "b *l d"]:
    """The token that stands for the text: the one with the largest id (`argmax`, the end token), `first` or `last`.

    `none` keeps all tokens.
    """
    if pool_type == "argmax":
        return x[torch.arange(x.shape[0], device=x.device), text.argmax(dim=-1)]
    if pool_type == "none":
        return x
    return x[:, 0 if pool_type == "first" else -1]
