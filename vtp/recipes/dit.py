"""Diffusion runs: the published settings for two sizes, and one that learns on a CPU in a minute."""

from __future__ import annotations

from dataclasses import replace

from vtp.engine.loop import LoopConfig
from vtp.engine.optim import OptimConfig
from vtp.generation.config import DiTSize, DiTTrainConfig, LogitNormal
from vtp.schedules import Ramp, WarmupCosine


def dit_b() -> DiTTrainConfig:
    """LightningDiT-B/1 as published for VTP-S and VTP-B latents: 80 epochs of ImageNet. Batch size is for one rank.

    Recomputing makes a step fit into 80 GB; where there are more, or ranks share the batch, it is faster without.
    """
    loop = LoopConfig(log_every=100, save_every=5_000, tensorboard=True)
    return DiTTrainConfig(out="runs/dit_b", recompute=True, loop=loop)


def dit_xl() -> DiTTrainConfig:
    """LightningDiT-XL/1 as published; for VTP-L latents set times.mu=-0.75 times.sigma=1.0. 128 a rank, for 8 ranks."""
    size = DiTSize(hidden_size=1152, depth=28, num_heads=16)
    return replace(dit_b(), out="runs/dit_xl", batch_size=128, model=size, times=LogitNormal(mu=-0.5, sigma=1.25))


def dit_quickstart() -> DiTTrainConfig:
    """Small latents (4 x 4 or 8 x 8) on two CPU cores, minutes. The average's horizon fits so short a run."""
    return DiTTrainConfig(
        out="runs/dit_quickstart",
        steps=900,
        batch_size=64,
        flip=False,  # letters, left and right mean something in `scenes`
        ema=0.99,
        cosine_weight=0.0,
        model=DiTSize(hidden_size=192, depth=6, num_heads=6),
        optim=OptimConfig(
            lr=WarmupCosine(peak=5e-3, warmup=0.05),
            weight_decay=Ramp(start=0.0, end=0.0),
            betas=(0.9, 0.95),
            eps=1e-8,
            clip_grad=1.0,
        ),
        loop=LoopConfig(log_every=20, save_every=500),
    )
