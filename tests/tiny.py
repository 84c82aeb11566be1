"""Models of the smallest size, for tests that need one and do not care which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vtp.data.views import ViewsConfig
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.models.vtp_hf import VTPConfig, VTPModel
from vtp.pretrain.config import PretrainConfig


def tiny_model(
    *, image_size: int = 16, patch: int = 8, width: int = 32, depth: int = 1, channels: int = 8, **parts: Any
) -> ModelConfig:
    return ModelConfig(
        image_size=image_size,
        vision=ViTConfig(patch_size=patch, embed_dim=width, depth=depth, num_heads=2, feature_bottleneck=channels),
        text=TextConfig(context_length=24, embed_dim=width, depth=1, num_heads=2),
        decoder=DecoderConfig(embed_dim=width, depth=1, num_heads=2),
        **parts,
    )


def save_tokenizer(folder: Path, **model: Any) -> Path:
    """An untrained tokenizer, published to `folder`."""
    torch.manual_seed(0)
    VTPModel(VTPConfig.from_model_config(tiny_model(**model))).save_pretrained(folder)
    return folder


def tiny_run(cfg: PretrainConfig, **changes: Any) -> PretrainConfig:
    """A recipe at 16 px with two blocks: a step takes milliseconds."""
    return replace(
        cfg,
        workers=0,
        model=tiny_model(patch=4, depth=2),
        views=ViewsConfig(size=16, global_size=16, local_size=8, local_crops=2),
        **{"distil": replace(cfg.distil, prototypes=16)} | changes,
    )
