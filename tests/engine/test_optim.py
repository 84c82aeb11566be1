"""AdamW with a clipped gradient and two weight decays, against the equations in float64."""

import math

import pytest
import torch
from torch import nn

from vtp.engine.optim import OptimConfig, adamw, set_schedule, update
from vtp.schedules import Ramp, WarmupCosine


def parameters():
    torch.manual_seed(0)
    return {"matrix": nn.Parameter(torch.randn(5, 7)), "vector": nn.Parameter(torch.randn(7))}


@pytest.mark.parametrize("clip", [0.0, 0.5, 3.0, 100.0])
def test_steps_are_those_of_the_equations(clip):
    cfg = OptimConfig(lr=WarmupCosine(peak=0.01, warmup=0.0), weight_decay=Ramp(start=0.1, end=0.3), clip_grad=clip)
    named = parameters()
    want = {name: p.detach().double() for name, p in named.items()}
    first, second = ({name: torch.zeros_like(x) for name, x in want.items()} for _ in range(2))
    optimizer = adamw(named.items(), cfg)
    for step in range(1, 5):
        grads = {name: step * torch.randn(x.shape, dtype=torch.float64) for name, x in want.items()}
        for name, p in named.items():
            p.grad = grads[name].float()
        lr = set_schedule(optimizer, cfg, step, 10)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        assert float(update(optimizer, list(named.values()), clip)) == pytest.approx(norm, rel=1e-5)
        assert all(p.grad is None for p in named.values())
        factor = min(1.0, clip / norm) if clip else 1.0
        decay = cfg.weight_decay(step, 10)
        for name, x in want.items():
            g = factor * grads[name]
            first[name] = cfg.betas[0] * first[name] + (1 - cfg.betas[0]) * g
            second[name] = cfg.betas[1] * second[name] + (1 - cfg.betas[1]) * g**2
            m, v = (s[name] / (1 - beta**step) for s, beta in zip((first, second), cfg.betas, strict=True))
            x -= lr * (decay * x * (name == "matrix") + m / (v.sqrt() + cfg.eps))
            torch.testing.assert_close(named[name].detach().double(), x, rtol=0, atol=1e-6)


def test_the_norm_of_many_values():
    """torch's vector_norm is wrong by 1e-3 of so large an embedding's."""
    p = nn.Parameter(torch.zeros(50_000, 384))
    p.grad = torch.randn(p.shape)
    want = float(p.grad.double().square().sum().sqrt())
    assert float(update(adamw([("p", p)], OptimConfig()), [p], 0.0)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(value, clip):
    named = parameters()
    optimizer = adamw(named.items(), OptimConfig())
    set_schedule(optimizer, OptimConfig(), 1, 10)

    def step(spoil):
        torch.manual_seed(1)
        for p in named.values():
            p.grad = torch.randn_like(p)
        if spoil:
            named["vector"].grad[3] = value
        return update(optimizer, list(named.values()), clip)

    step(False)
    before = [p.detach().clone() for p in named.values()]
    moments = [x.clone() for p in named.values() for x in optimizer.state[p].values()]
    assert not step(True).isfinite()
    assert all(torch.equal(p, x) for p, x in zip(named.values(), before, strict=True))
    after = [x for p in named.values() for x in optimizer.state[p].values()]
    assert all(torch.equal(x, y) for x, y in zip(after, moments, strict=True))
    step(False)
    assert not torch.equal(named["vector"], before[1])


def test_decay_is_for_matrices_only():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 3))
            self.scale = torch.nn.Parameter(torch.zeros(()))

    optimizer = adamw(Model().named_parameters(), OptimConfig())
    decayed, rest = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert len(rest["params"]) == 3
    set_schedule(optimizer, OptimConfig(), 10, 20)
    assert decayed["weight_decay"] > 0 and rest["weight_decay"] == 0.0
