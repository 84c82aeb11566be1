"""LightningDiT (Yao et al. 2025): the class-conditional diffusion transformer that generates latents.

Module and parameter names are those of the published checkpoints, so that their weights load as they are.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtp.files import as_new
from vtp.models.layers import Recomputable, RMSNorm, attention

# What a published config.json may say of the architecture beside DiTConfig's fields: there is one answer to each.
FIXED = {
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "use_qknorm": False,
    "wo_shift": False,
    "learn_sigma": False,
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a LightningDiT; the defaults are B/1 on 16 x 16 latents of 64 channels, 1000 classes."""

    input_size: int = 16  # rows = columns of the latent that the stored position tables are for
    patch_size: int = 1
    in_channels: int = 64
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # the label num_classes is the null class

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads) or self.input_size % self.patch_size:
            raise ValueError(
                f"DiTConfig: hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads}, and "
                f"input_size {self.input_size} of patch_size {self.patch_size}"
            )

    @staticmethod
    def from_published(values: Mapping[str, Any]) -> "DiTConfig":
        """From a config.json: our fields, and the published switches, refused where they name another network."""
        names = {f.name for f in fields(DiTConfig)}
        for key, value in values.items():
            if key not in names and key not in FIXED:
                raise ValueError(f"DiT config: unknown key {key!r}; known are {', '.join(sorted(names))}")
            if key in FIXED and value != FIXED[key]:
                raise ValueError(f"DiT config: {key}={value} is not supported, only {FIXED[key]}")
        return DiTConfig(**{key: value for key, value in values.items() if key in names})


class LightningDiT(nn.Module):
    """Velocity of a latent at time t, given a class. Initially zero everywhere."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d, grid = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        self.pos_embed = nn.Parameter(sincos_positions((grid, grid), d)[None], requires_grad=False)
        self.feat_rope = RotaryTable((grid, grid), d // config.num_heads)
        self.blocks = nn.ModuleList(Block(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size**2 * config.in_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier linears and small embeddings; zero where a block starts as the identity and the network at zero."""
        for name, weight in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim > 1 and name != "pos_embed":
                nn.init.xavier_uniform_(weight.flatten(1))

    @property
    def null_class(self) -> int:
        """The label of the unconditional velocity."""
        return self.config.num_classes

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], y: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Velocity at ``x`` and time ``t`` in [0, 1] for classes ``y``. Any grid that the patch size divides.

        Position tables of another grid than the config's are computed for it (positions are integers, nothing is
        interpolated). Raises ValueError for another channel count or a grid with a remainder.
        """
        p, (channels, height, width) = self.config.patch_size, x.shape[1:]
        if channels != self.config.in_channels or height % p or width % p:
            raise ValueError(
                f"DiT input is {channels} x {height} x {width}: "
                f"it must have {self.config.in_channels} channels and sides that are multiples of {p}"
            )
        grid = (height // p, width // p)
        tokens = self.x_embedder(x) + self.positions(grid)  # [B, N, D]
        rope = self.feat_rope(grid)
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, c, rope)
        return unpatchify(self.final_layer(tokens, c), grid, p)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Sine-cosine position embedding of a grid: the stored one where it is the config's."""
        if grid == (self.config.input_size // self.config.patch_size,) * 2:
            return self.pos_embed
        return sincos_positions(grid, self.config.hidden_size)[None].to(self.pos_embed)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        as_new(folder / "model.safetensors")

    @staticmethod
    def from_pretrained(folder: Path) -> "LightningDiT":
        """Read what ``save_pretrained`` wrote, or a published model in the same two files; evaluation mode."""
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is no DiT: it holds no config.json")
        model = LightningDiT(DiTConfig.from_published(json.loads((folder / "config.json").read_text())))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(x).flatten(2).mT


class TimestepEmbedder(nn.Module):
    """A 256-wide sinusoid of t, periods up to 1e4, t in [0, 1] and not scaled; then a small MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def timestep_embedding(t: Float[Tensor, " b"]) -> Float[Tensor, "b 256"]:
        """``[cos(t w), sin(t w)]`` with w from 1 down to 1e-4."""
        frequencies = torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * frequencies  # [B, 128]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.mlp(self.timestep_embedding(t))


class LabelEmbedder(nn.Module):
    """One row a class and a last one for the null class. The training program drops labels, not the network."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.embedding_table(y)


def drop_labels(
    labels: Int[Tensor, " b"], null: int, rate: float, generator: torch.Generator | None = None
) -> Int[Tensor, " b"]:
    """Each label, or with probability ``rate`` the null class: what lets one network be both sides of guidance."""
    dropped: Bool[Tensor, " b"] = torch.rand(len(labels), generator=generator, device=labels.device) < rate
    return labels.masked_fill(dropped, null)


class Block(Recomputable):
    """Pre-norm attention and SwiGLU, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, int(2 / 3 * int(dim * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))  # SiLU: once, by the caller

    def compute(
        self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"], rope: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "b n d"]:
        """Tokens behind the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n out"]:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, N, d]
        q, k = rotate(qkv[:2], *rope)
        return self.proj(attention(q, k, qkv[2]).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RotaryTable(nn.Module):
    """Cosines and sines of the axial rotary embedding: half of a head turns with the row, half with the column."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: tuple[int, int], head_dim: int) -> None:
        super().__init__()
        self.grid = grid
        cos, sin = rotary_tables(grid, head_dim)
        self.register_buffer("freqs_cos", cos)  # [N, head_dim]
        self.register_buffer("freqs_sin", sin)

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if grid == self.grid:
            return self.freqs_cos, self.freqs_sin
        cos, sin = rotary_tables(grid, self.freqs_cos.shape[1])
        return cos.to(self.freqs_cos), sin.to(self.freqs_sin)


def modulate(x: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]) -> Tensor:
    """``x (1 + scale) + shift`` (Peebles and Xie 2023, adaLN)."""
    return torch.addcmul(shift, x, 1 + scale)


def rotate(x: Float[Tensor, "*b n d"], cos: Float[Tensor, "n d"], sin: Float[Tensor, "n d"]) -> Float[Tensor, "*b n d"]:
    """Rotate each pair of neighbouring channels (2i, 2i + 1) by its position's angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def rotary_tables(grid: tuple[int, int], head_dim: int, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, head_dim] at the integer rows and columns of a grid, each angle for one channel pair."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2)[: head_dim // 4].float() / (head_dim // 2))
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = torch.stack([rows.flatten(), columns.flatten()], dim=1)[:, :, None] * frequencies  # [N, 2, head_dim/4]
    angles = angles.flatten(1).repeat_interleave(2, dim=1)  # [N, head_dim]
    return angles.cos(), angles.sin()


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "n d"]:
    """Frozen sine-cosine embedding of a grid: first half of the channels the column, second half the row."""
    frequencies = 1.0 / 1e4 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    angles = torch.stack([columns.flatten(), rows.flatten()], dim=1)[:, :, None] * frequencies  # [N, 2, D/4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def unpatchify(x: Float[Tensor, "b n k"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b c h w"]:
    """Tokens of ``patch * patch * c`` values (channels last) back to a map."""
    x = x.unflatten(1, grid).unflatten(-1, (patch, patch, -1))  # [B, rows, columns, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
