"""The vision trunk: a plain pre-norm ViT with axial rotary positions, one class token and a linear bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vtp.models.config import ViTConfig
from vtp.models.layers import Block, Linear, make_norm
from vtp.models.rope import RopeEmbed


class Tokens(NamedTuple):
    """Features of a batch of images."""

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int]  # (rows, columns); n = rows * columns, row-major


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to one token."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        return self.proj(images)


class ViT(nn.Module):
    """Vision transformer with the published names and numerics.

    Images are ImageNet-normalised. Rows and columns of pixels beyond the last whole patch are ignored, as published.
    """

    def __init__(self, cfg: ViTConfig, rope_dtype: str = "bf16") -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.patch_size = cfg.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(cfg.patch_size, dim)
        self.rope_embed = RopeEmbed(dim // cfg.num_heads, rope_dtype)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                cfg.num_heads,
                mlp_ratio=cfg.mlp_ratio,
                ffn_layer=cfg.ffn_layer,
                norm_layer=cfg.norm_layer,
                init_values=cfg.init_values,
                qk_norm=cfg.use_qk_norm,
            )
            for _ in range(cfg.depth)
        )
        self.norm = make_norm(cfg.norm_layer, dim)
        self.feature_bottleneck = None if cfg.latent_dim == dim else Linear(dim, cfg.latent_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the two tokens; the layers have drawn their own weights."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.mask_token)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None = None, drop_path: float = 0.0
    ) -> Tokens:
        """Features after the final norm, at full width.

        Args:
            images: ImageNet-normalised.
            masks: True where the mask token replaces the patch.
            drop_path: share of the batch that skips each residual branch, in [0, 1); in training mode only.
        """
        x, grid = self._embed(images, masks)
        rope = self.rope_embed(grid, 1, x.device)
        drop_path = drop_path if self.training else 0.0
        for block in self.blocks:
            x = block(x, rope, drop_path)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1:], grid)

    def intermediate(self, images: Float[Tensor, "b 3 H W"], blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Features after each of the named blocks (counted from 0), in the order of the blocks.

        Raises:
            ValueError: a block that does not exist; negative numbers do not count from the end.
        """
        if not blocks or not set(blocks) <= set(range(len(self.blocks))):
            raise ValueError(f"blocks {list(blocks)} are not among 0 ... {len(self.blocks) - 1}")
        x, grid = self._embed(images, None)
        rope = self.rope_embed(grid, 1, x.device)
        taken = []
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = block(x, rope)
            if i in blocks:
                y = self.norm(x) if norm else x
                taken.append(Tokens(y[:, 0], y[:, 1:], grid))
        return taken

    def bottleneck(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        """Normed features, class or patches, projected to the width of the latents."""
        return x if self.feature_bottleneck is None else self.feature_bottleneck(x)

    def _embed(
        self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b t d"], tuple[int, int]]:
        if min(images.shape[2:]) < self.patch_size:
            p = self.patch_size
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels hold no whole patch of {p} x {p}")
        x = self.patch_embed(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).mT  # [b, n, d]
        cls: Tensor = self.cls_token
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        elif self.training:  # every parameter takes part in every step, for data-parallel training
            cls = cls + 0 * self.mask_token
        return torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1), grid
