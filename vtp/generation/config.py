"""Everything that decides what a diffusion run learns. The latents decide the grid, the channels and the classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtp.config import within
from vtp.engine.loop import LoopConfig
from vtp.engine.optim import OptimConfig
from vtp.files import path_of
from vtp.schedules import Ramp, WarmupCosine


@dataclass(frozen=True, kw_only=True)
class DiTSize:
    """The part of a LightningDiT's shape that is a choice; default B/1."""

    patch_size: int = 1
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        within(self, "patch_size hidden_size depth num_heads", 1)
        within(self, "mlp_ratio", 2 / self.hidden_size)  # SwiGLU has two thirds of that width


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Training times are sigmoid(mu + sigma z); below 0 `mu` looks more often at the noisy end."""

    mu: float = -0.5
    sigma: float = 1.25


@dataclass(frozen=True, kw_only=True)
class DiTTrainConfig:
    """One diffusion run on a folder of latents; the defaults are the published settings of LightningDiT-B/1."""

    data: str = "latents"  # a folder that `vtp latents` wrote
    latents: str | None = None  # another name for data: read instead of it when given
    out: str = "runs/dit"
    steps: int = 100_000
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device multiplies it, else fp32
    resume: Literal["auto", "never", "anyway"] = "auto"  # anyway: go on although the configuration has changed
    recompute: bool = False  # activations of the blocks computed again in the backward pass: less memory, more time
    compile: bool = False  # torch.compile, block by block
    batch_size: int = 1_024  # per rank
    flip: bool = True  # half of the latents are those of the mirrored image; false where left and right mean something
    label_dropout: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance
    times: LogitNormal = LogitNormal()
    cosine_weight: float = 1.0  # of the cosine loss beside the mean squared error
    ema: float = 0.9999  # decay per step, reached through (1 + step) / (10 + step)
    model: DiTSize = DiTSize()
    optim: OptimConfig = OptimConfig(
        lr=WarmupCosine(peak=2e-4, warmup=0.0, end=2e-4),  # constant
        weight_decay=Ramp(start=0.0, end=0.0),
        betas=(0.9, 0.95),
        eps=1e-8,
        clip_grad=0.0,
    )
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        within(self, "steps", 1, 10**10)
        within(self, "batch_size", 1)
        within(self, "seed cosine_weight times.sigma", 0)
        within(self, "label_dropout ema", 0, 1, below=True)

    @property
    def folder(self) -> Path:
        """The latents."""
        return path_of(self.data if self.latents is None else self.latents)
