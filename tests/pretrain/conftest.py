"""A pre-training run that takes a second: 16 px scenes, two blocks."""

from dataclasses import replace

import pytest

from vtp.data.views import BatchConfig, ViewsConfig
from vtp.engine.loop import LoopConfig
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.recipes.pretrain import cpu


@pytest.fixture
def tiny(tmp_path):
    cfg = cpu()
    return replace(
        cfg,
        data="scenes",
        out=str(tmp_path / "run"),
        steps=6,
        workers=0,
        precision="fp32",
        batch=BatchConfig(clip=8, ssl=6, rec=4),
        model=ModelConfig(
            image_size=16,
            vision=ViTConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2, feature_bottleneck=8),
            text=TextConfig(context_length=24, embed_dim=32, num_heads=2, depth=1),
            decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2),
        ),
        views=ViewsConfig(size=16, global_size=16, local_size=8, local_crops=2),
        distil=replace(cfg.distil, prototypes=16, head_hidden=16, head_bottleneck=8),
        loop=LoopConfig(log_every=2, save_every=3),
    )
