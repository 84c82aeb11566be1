"""Axial rotary position embedding of a grid of patches, in the published (bfloat16) arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def rope_periods(head_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, " p"]:
    """Periods 100^(2i / (head_dim / 2)), i < head_dim / 4, in units of half the image."""
    i = torch.arange(head_dim // 4, dtype=dtype, device=device)
    return 100.0 ** (2 * i / (head_dim // 2))


def _centres(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " n"]:
    """0.5, 1.5, ... size - 0.5."""
    if torch.compiler.is_compiling():  # a size may be a symbol, of which arange(0.5, size) makes no length
        return (torch.arange(size, dtype=torch.float32, device=device) + 0.5).to(dtype)
    return torch.arange(0.5, size, dtype=dtype, device=device)


def rope_tables(
    head_dim: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]]:
    """Cosine and sine of every patch's angles, rows first; coordinates of each axis run from -1 to 1 on their own.

    The order of the operations decides the published bits. In bf16 patch centres collide beyond 256 patches a side.
    """
    with torch.autocast(device.type, enabled=False):  # autocast would compute the power in float32
        axes = [_centres(size, dtype, device) / size for size in grid]
        coords = 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) - 1  # [n, 2]
        angles = 2 * math.pi * coords[:, :, None] / rope_periods(head_dim, dtype, device)  # [n, 2, h/4]
        angles = angles.flatten(1).tile(2)  # [n, h]
        return angles.cos(), angles.sin()


def _signed_tables(
    head_dim: int, grid: tuple[int, int], prefix: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # The rotation of `prefix` tokens is the identity, and the sign of rotate_half lives in the sine: then `rotate`
    # treats all tokens alike, with two products, one roll and one sum.
    cos, sin = rope_tables(head_dim, grid, dtype, device)
    sin = torch.cat([-sin[:, : head_dim // 2], sin[:, head_dim // 2 :]], dim=1)
    cos = torch.cat([cos.new_ones(prefix, head_dim), cos])
    sin = torch.cat([sin.new_zeros(prefix, head_dim), sin])
    return cos, sin  # [prefix + n, h]


@functools.lru_cache(maxsize=64)
def _cached_tables(*key: Any) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # tables first made for an evaluation also serve training
        return _signed_tables(*key)


def rotate(x: Float[Tensor, "*b h"], cos: Float[Tensor, "*t h"], sin: Float[Tensor, "*t h"]) -> Float[Tensor, "*b h"]:
    """Rotate queries and keys in the dtype of the tables (so a float32 query keeps bf16 precision, as published)."""
    y = x.to(cos.dtype)
    if torch.compiler.is_compiling():  # the same in steps that become vector instructions, as a roll does not
        y, cos, sin = (z.unflatten(-1, (2, -1)) for z in (y, cos, sin))
        return (y * cos + y.flip(-2) * sin).flatten(-2).to(x.dtype)
    return (y * cos).add_(y.roll(y.shape[-1] // 2, dims=-1).mul_(sin)).to(x.dtype)


@torch.library.custom_op(
    "vtp::rope_tables",
    mutates_args=(),
    schema="(int head_dim, SymInt rows, SymInt columns, int prefix, ScalarType dtype, Device device)"
    " -> (Tensor, Tensor)",
)
def _opaque_tables(
    head_dim: int, rows: int, columns: int, prefix: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A compiler that saw inside would compute the angles again for every head of every layer.
    cos, sin = _cached_tables(head_dim, (rows, columns), prefix, dtype, device)
    return cos.clone(), sin.clone()  # the compiler may write over its results


@_opaque_tables.register_fake
def _(
    head_dim: int, rows: int, columns: int, prefix: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos = torch.empty(prefix + rows * columns, head_dim, dtype=dtype, device=device)
    return cos, torch.empty_like(cos)


class RopeEmbed(nn.Module):
    """Rotation tables of a grid, computed once for each grid, dtype and device.

    The `periods` buffer is part of the published files. The tables are a function of the head width alone and never
    read it, so no cast, no load and no meta device can change them; it stays bfloat16 whatever the module is cast to.
    """

    periods: Tensor

    def __init__(self, head_dim: int, dtype: str = "bf16") -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dtype = DTYPES[dtype]
        self.register_buffer("periods", rope_periods(head_dim, torch.bfloat16))

    def reset_parameters(self) -> None:
        """Write the buffer again, where a file did not hold it."""
        self.periods.copy_(rope_periods(self.head_dim, torch.bfloat16, self.periods.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RopeEmbed:
        super()._apply(fn, recurse)
        self.periods = self.periods.to(torch.bfloat16)  # exact: the values came from bfloat16
        return self

    def forward(
        self, grid: tuple[int, int], prefix: int, device: torch.device
    ) -> tuple[Float[Tensor, "t h"], Float[Tensor, "t h"]]:
        """Tables of `prefix` unrotated tokens and then the patches of the grid, for `rotate`."""
        if torch.compiler.is_dynamo_compiling():  # torch.compile, within which is_exporting() is true as well
            return _opaque_tables(self.head_dim, *grid, prefix, self.dtype, device)
        if torch.compiler.is_exporting():  # in the operators that a file may hold
            return _signed_tables(self.head_dim, grid, prefix, self.dtype, device)
        return _cached_tables(self.head_dim, grid, prefix, self.dtype, device)
