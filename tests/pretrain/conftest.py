"""A pre-training run that takes a second: 16 px scenes, two blocks."""

from dataclasses import replace

import pytest

from tests.tiny import tiny_run
from vtp.data.views import BatchConfig
from vtp.engine.loop import LoopConfig
from vtp.recipes.pretrain import cpu


@pytest.fixture
def tiny(tmp_path):
    cfg = cpu()
    run = tiny_run(
        cfg,
        data="scenes",
        out=str(tmp_path / "run"),
        steps=6,
        precision="fp32",
        batch=BatchConfig(clip=8, ssl=6, rec=4),
        distil=replace(cfg.distil, prototypes=16, head_hidden=16, head_bottleneck=8),
        loop=LoopConfig(log_every=2, save_every=3),
    )
    # The published rotations in bf16 amplify the last bit, in which products of other sizes differ on some processors.
    return replace(run, model=replace(run.model, rope_dtype="fp32"))
