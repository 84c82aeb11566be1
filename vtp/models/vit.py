"""The vision trunk: a plain pre-norm ViT with axial rotary positions, one class token and a linear bottleneck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vtp.models.config import ViTConfig
from vtp.models.layers import Block, Linear, make_norm, pack
from vtp.models.rope import RopeEmbed


class Tokens(NamedTuple):
    """Features of a batch of images."""

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int]  # (rows, columns); n = rows * columns, row-major


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to one token.

    Without gradients it is the published convolution, bit for bit. With them a matrix product: on a CPU the gradient of
    the convolution takes up to ten times as long in bfloat16.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w d"]:
        if not torch.is_grad_enabled():
            return self.proj(images).permute(0, 2, 3, 1)
        p = self.proj.kernel_size[0]
        rows, columns = images.shape[2] // p, images.shape[3] // p
        patches = images[:, :, : rows * p, : columns * p].unflatten(3, (columns, p)).unflatten(2, (rows, p))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [b, h, w, 3 p p]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer with the published names and numerics.

    Images are ImageNet-normalised. Rows and columns of pixels beyond the last whole patch are ignored, as published.
    """

    def __init__(self, cfg: ViTConfig, rope_dtype: str = "bf16") -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.patch_size = cfg.patch_size
        self.embed_dim = dim
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
        ropes = [self.rope_embed(grid, 1, x.device)]
        drop_path = drop_path if self.training else 0.0
        for block in self.blocks:
            x = block(x, ropes, None, drop_path)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1:], grid)

    def read(
        self,
        views: Sequence[Float[Tensor, "_ 3 _ _"]],
        patches: Int[Tensor, " m"] | None = None,
        masks: Bool[Tensor, "b n"] | None = None,
        drop_path: float = 0.0,
    ) -> Float[Tensor, "rows d"]:
        """Class tokens of views of several sizes, which share the linears: one pass over the weights.

        As in `forward`, but the last block's feed-forward and the norm see no other token than those that are read.

        Args:
            views: images of one size each, ImageNet-normalised.
            patches: of the first views also the patches at these places of all their patches behind one another.
            masks: True where the mask token replaces a patch of the first views.
            drop_path: as in `forward`.

        Returns:
            Class tokens of the first views, their patches, class tokens of the other views.
        """
        embedded, grids = zip(*(self._embed(x, masks if i == 0 else None) for i, x in enumerate(views)), strict=True)
        groups = tuple((x.shape[0], x.shape[1]) for x in embedded)
        x = pack(embedded)
        del embedded  # `x` is a copy, and memory is dear
        ropes = [self.rope_embed(grid, 1, x.device) for grid in grids]
        rows, start = [], 0
        for count, length in groups:
            rows.append(torch.arange(count, device=x.device) * length + start)
            start += count * length
        if patches is not None:
            rows.insert(1, patches + patches // (groups[0][1] - 1) + 1)
        drop_path = drop_path if self.training else 0.0
        *before, last = self.blocks
        for block in before:
            x = block(x, ropes, groups, drop_path)
        return self.norm(last(x, ropes, groups, drop_path, torch.cat(rows)))

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "b 3 H W"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch features of the last n blocks, or of the blocks n (from 0), in their order, as DINOv2 has it.

        Args:
            x: images, ImageNet-normalised.
            reshape: maps [b d h w] instead of [b n d].
            return_class_token: pair each with the class token [b d].
            norm: apply the final norm.

        Raises:
            ValueError: a block that does not exist; negative numbers do not count from the end.
        """
        depth = len(self.blocks)
        blocks = range(depth - n, depth) if isinstance(n, int) else n
        if not blocks or not set(blocks) <= set(range(depth)):
            raise ValueError(f"blocks {list(blocks)} are not among 0 ... {depth - 1}")
        embedded, grid = self._embed(x, None)
        outputs = enumerate(self._each_block(embedded, grid, max(blocks) + 1))
        taken = [self.norm(h) if norm else h for i, h in outputs if i in blocks]
        patches = [h[:, 1:].mT.unflatten(2, grid) if reshape else h[:, 1:] for h in taken]
        return tuple(zip(patches, (h[:, 0] for h in taken), strict=True)) if return_class_token else tuple(patches)

    def forward_intermediates(
        self,
        x: Float[Tensor, "b 3 H W"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final and intermediate features under the names, defaults and meanings of these arguments of timm's.

        Args:
            x: images, ImageNet-normalised.
            indices: the last n blocks, or the blocks of a sequence (negative ones count from the end), or all (None).
            return_prefix_tokens: pair each intermediate with its class token [b 1 d].
            norm: apply the final norm to the intermediates too.
            stop_early: compute no block after the last one asked for; the final features are then its own.
            output_fmt: NCHW gives maps [b d h w], NLC tokens [b n d].
            intermediates_only: leave out the final features.

        Returns:
            (features [b 1+n d] after the final norm, intermediates), the latter a list in the order of the blocks; or
            that list alone.

        Raises:
            ValueError: a block that does not exist, or another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; one of 'NCHW', 'NLC'")
        depth = len(self.blocks)
        indices = depth if indices is None else indices
        chosen = range(depth - indices, depth) if isinstance(indices, int) else [i + depth * (i < 0) for i in indices]
        if not chosen or not set(chosen) <= set(range(depth)):
            raise ValueError(f"indices={indices!r}: the {depth} blocks are 0 ... {depth - 1}, or -{depth} ... -1")
        taken: list[Any] = []
        embedded, grid = self._embed(x, None)
        for i, h in enumerate(self._each_block(embedded, grid, max(chosen) + 1 if stop_early else depth)):
            if i in chosen:
                y = self.norm(h) if norm else h
                patches = y[:, 1:]
                if output_fmt == "NCHW":
                    patches = patches.mT.unflatten(2, grid).contiguous()  # [b, d, h, w]
                taken.append((patches, y[:, :1]) if return_prefix_tokens else patches)
        return taken if intermediates_only else (self.norm(h), taken)

    def _each_block(
        self, x: Float[Tensor, "b t d"], grid: tuple[int, int], depth: int
    ) -> Iterator[Float[Tensor, "b t d"]]:
        """The tokens after each of the first `depth` blocks, computed as they are asked for."""
        ropes = [self.rope_embed(grid, 1, x.device)]
        for block in self.blocks[:depth]:
            x = block(x, ropes)
            yield x

    def bottleneck(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        """Normed features, class or patches, projected to the width of the latents."""
        return x if self.feature_bottleneck is None else self.feature_bottleneck(x)

    def _embed(
        self, images: Float[Tensor, "b 3 H W"], masks: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b t d"], tuple[int, int]]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images of shape {list(images.shape)}, {images.dtype}: give [b, 3, H, W], three colours,"
                " ImageNet-normalised floats"
            )
        if min(images.shape[2:]) < self.patch_size:
            p = self.patch_size
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels hold no whole patch of {p} x {p}")
        x = self.patch_embed(images)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)  # [b, n, d]
        cls: Tensor = self.cls_token
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        elif self.training:  # every parameter takes part in every step, for data-parallel training
            cls = cls + 0 * self.mask_token
        return torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1), grid
