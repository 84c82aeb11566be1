"""The FLOPs on paper are those that torch counts while a step runs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.pretrain.test_objectives import a_batch
from tests.tiny import tiny_model
from vtp.pretrain.flops import step_flops
from vtp.pretrain.objectives import Pretraining
from vtp.recipes.pretrain import corner


@pytest.mark.parametrize(("name", "share"), [("vtp", True), ("clip_ae", False)])
def test_paper_is_what_is_counted(tiny, name, share):
    cfg = corner(replace(tiny, model=tiny_model(patch=4, depth=3, width=64)), name)
    cfg = replace(cfg, views=replace(cfg.views, share=share))
    model, batch = Pretraining(cfg), a_batch(cfg)
    with FlopCounterMode(display=False) as counter:
        losses, _ = model(batch, teacher_temp=0.05)
        sum(losses.values()).backward()
    # torch counts the similarities of pairs besides, and knows that nothing asks for the gradient of the pixels
    assert step_flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_activations_computed_again_are_not_the_models_work(tiny):
    model, batch = Pretraining(tiny), a_batch(tiny)
    before = step_flops(model, batch)
    model.student._set_gradient_checkpointing(True)
    assert step_flops(model, batch) == before
    assert step_flops(model, batch._replace(ssl=None)) < before
    assert step_flops(model.to(torch.float64), batch) == before
