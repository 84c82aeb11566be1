"""A step of pre-training never waits for its device."""

from dataclasses import replace

import pytest

from tests.meta import META, NothingWaits, usable
from tests.pretrain.test_parallel import raw_batches
from vtp.engine.parallel import ParallelConfig
from vtp.objectives import prototypes
from vtp.pretrain import learner as learner_module
from vtp.pretrain.learner import PretrainLearner


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize("contrast", ["clip", "siglip"])
@pytest.mark.parametrize("many", [False, True], ids=["logits", "chunks"])
def test_a_step_reads_nothing_from_its_device(tiny, monkeypatch, contrast, centering, many):
    usable(monkeypatch)
    monkeypatch.setattr(learner_module, "matmul_rate", lambda *_: 1e12)
    if many:
        monkeypatch.setattr(prototypes, "LOGITS", 64)
    cfg = replace(
        tiny,
        contrast=contrast,
        distil=replace(tiny.distil, centering=centering),
        model=replace(tiny.model, init_logit_bias=-10.0 if contrast == "siglip" else None),
        parallel=ParallelConfig(micro_batch=4 if many else 0, recompute=many),
    )
    learner = PretrainLearner(cfg, META)
    batches = raw_batches(cfg)
    with NothingWaits():
        for i in range(2):
            read = learner.step(next(batches), i + 1)
    assert read["total"].device == META and read["grad_norm"].device == META
