"""The pixel decoder: latents -> transformer -> pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vtp.models.config import DecoderConfig
from vtp.models.layers import Block, make_norm
from vtp.models.linear import linear
from vtp.models.rope import RopeEmbed


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution over tokens: the published weight shape, one matrix product."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return linear(x, self.weight.flatten(1), self.bias)


class PixelDecoder(nn.Module):
    """Decodes latents [b c h w] to ImageNet-normalised images [b 3 h*p w*p], not clamped; p is the patch size."""

    def __init__(self, cfg: DecoderConfig, latent_dim: int, patch_size: int, rope_dtype: str = "bf16") -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.patch_size = patch_size
        self.proj_in = Pointwise(latent_dim, dim)
        self.rope_embed = RopeEmbed(dim // cfg.num_heads, rope_dtype)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                cfg.num_heads,
                ffn_layer=cfg.ffn_layer,
                norm_layer=cfg.norm_layer,
                init_values=cfg.init_values,
                qk_norm=cfg.use_qk_norm,
            )
            for _ in range(cfg.depth)
        )
        self.norm = make_norm(cfg.norm_layer, dim)
        self.proj_out = Pointwise(dim, 3 * patch_size**2)

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        if latents.ndim != 4 or latents.shape[1] != self.proj_in.in_channels or 0 in latents.shape[2:]:
            raise ValueError(f"latents of shape {list(latents.shape)}: give [b, {self.proj_in.in_channels}, h, w]")
        rows, columns = latents.shape[-2:]
        x = self.proj_in(latents.flatten(2).mT)  # [b, n, d]
        x = x.to(self.proj_in.weight.dtype)  # the residual stream stays float32 under autocast, as in the trunk
        ropes = [self.rope_embed((rows, columns), 0, x.device)]
        for block in self.blocks:
            x = block(x, ropes)
        x = self.proj_out(self.norm(x))  # [b, n, 3 p p]
        if torch.compiler.is_compiling():  # the same pixels; of the line below an exporter cannot prove what it must
            return F.pixel_shuffle(x.mT.unflatten(2, (rows, columns)), self.patch_size)
        x = x.unflatten(2, (3, self.patch_size, self.patch_size)).unflatten(1, (rows, columns))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [b, 3, h p, w p]
