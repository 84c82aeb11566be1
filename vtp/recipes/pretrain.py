"""Pre-training runs: the paper's three sizes, two that learn on a CPU, and the four corners of the ablation.

Where the paper is silent the values are OpenCLIP's (contrast) and DINOv2's (self-distillation), chosen by us.
"""

from __future__ import annotations

from dataclasses import replace

from vtp.data.augment import AugmentConfig
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.engine.loop import LoopConfig
from vtp.engine.optim import OptimConfig
from vtp.engine.parallel import ParallelConfig
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.pretrain.config import DistilConfig, PretrainConfig
from vtp.schedules import Ramp, WarmupCosine


def corner(cfg: PretrainConfig, name: str) -> PretrainConfig:
    """Switch objectives off: `ae` keeps reconstruction, `clip_ae` and `ssl_ae` add one objective, `vtp` keeps all."""
    weights = cfg.weights
    off = {"ae": {"clip": 0.0, "ssl": 0.0}, "clip_ae": {"ssl": 0.0}, "ssl_ae": {"clip": 0.0}, "vtp": {}}[name]
    return replace(cfg, weights=replace(weights, **off), out=f"{cfg.out}_{name}" if name != "vtp" else cfg.out)


def _published(width: int, depth: int, heads: int, name: str) -> PretrainConfig:
    """Symmetric encoder and decoder, f16 d64, text tower 768 x 12, at 256 px. Batches are per rank, for 64 ranks.

    The larger two set `parallel` so that a step fits into 80 GB; without, it is faster (benchmarks/memory.py).
    """
    return PretrainConfig(
        out=f"runs/{name}",
        steps=100_000,
        workers=8,
        batch=BatchConfig(clip=512, ssl=64, rec=32),
        model=ModelConfig(
            image_size=256,
            vision=ViTConfig(embed_dim=width, depth=depth, num_heads=heads),
            decoder=DecoderConfig(embed_dim=width, depth=depth, num_heads=heads),
        ),
        views=ViewsConfig(size=256, global_size=224, local_size=96, local_crops=8),
        optim=OptimConfig(
            lr=WarmupCosine(peak=5e-4, warmup=0.02, end=1e-6), weight_decay=Ramp(start=0.04, end=0.2, cosine=True)
        ),
        loop=LoopConfig(log_every=50, save_every=1_000, keep=3, tensorboard=True),
    )


def small() -> PretrainConfig:
    """VTP-S."""
    return _published(384, 12, 6, "small")


def base() -> PretrainConfig:
    """VTP-B."""
    return replace(_published(768, 12, 12, "base"), parallel=ParallelConfig(micro_batch=256))


def large() -> PretrainConfig:
    """VTP-L."""
    return replace(_published(1024, 24, 16, "large"), parallel=ParallelConfig(recompute=True))


def cpu() -> PretrainConfig:
    """Small real images with captions, minutes on two CPU cores: 32 px, patch 8, a few thousand pairs."""
    return PretrainConfig(
        out="runs/cpu",
        steps=1_000,
        batch=BatchConfig(clip=128, ssl=64, rec=64),
        workers=0,  # on two cores a process that makes views stands in the way of the step
        perceptual="teacher",
        init="fan_in",
        model=ModelConfig(
            image_size=32,
            vision=ViTConfig(
                patch_size=8, embed_dim=128, depth=4, num_heads=4, feature_bottleneck=32, use_qk_norm=True
            ),
            text=TextConfig(context_length=24, embed_dim=128, depth=3, num_heads=4),
            decoder=DecoderConfig(embed_dim=128, depth=4, num_heads=4),
        ),
        # A few thousand pairs are soon learnt by heart: the CLIP view is cropped and coloured, its caption cut.
        views=ViewsConfig(size=32, scale=(0.5, 1.0), caption_spans=0.4, global_size=32, local_size=16, local_crops=4),
        augment=AugmentConfig(blur_sigma=(0.1, 0.6), clip_jitter=0.2),
        # Heads scale with the run: 2,048 prototypes do not leave the uniform distribution in 800 steps, 256 do at once.
        distil=DistilConfig(
            prototypes=256,
            head_hidden=256,
            head_bottleneck=64,
            teacher_temp=Ramp(start=0.04, end=0.04),  # rising to 0.06 it forgot again what it had told apart at 0.04
            momentum=Ramp(start=0.98, end=0.995, cosine=True),
        ),
        optim=OptimConfig(lr=WarmupCosine(peak=1.4e-3, warmup=0.05)),
        loop=LoopConfig(log_every=20, save_every=250),
    )


def quickstart() -> PretrainConfig:
    """The embedded `scenes`, a few minutes on two CPU cores. There is no end of pairs, so none is learnt by heart."""
    cfg = cpu()
    model = replace(
        cfg.model,
        vision=replace(cfg.model.vision, feature_bottleneck=64),
        text=replace(cfg.model.text, depth=2),
    )
    return replace(
        cfg,
        out="runs/quickstart",
        data="scenes",
        steps=500,
        model=model,
        batch=BatchConfig(clip=128, ssl=32, rec=64),
        views=replace(cfg.views, scale=(0.9, 1.0), caption_spans=0.0, ssl_flip=False),
        augment=replace(cfg.augment, clip_jitter=0.0),
    )
