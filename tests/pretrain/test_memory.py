"""The memory of a step, as benchmarks/memory.py counts it on tensors without values."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtp.models import layers
from vtp.pretrain.learner import PretrainLearner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")  # torch looks for a gradient, and for values
def test_counted_without_values_is_what_a_step_holds(tiny, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    memory = importlib.import_module("memory")
    with memory.Alive() as alive, monkeypatch.context() as patch:
        patch.setattr(layers, "SHORT_SEQUENCE", 0)
        learner = PretrainLearner(tiny, torch.device("cpu"))
        learner.learn(memory.batch(tiny), 0)
        really_held, alive.most = alive.now, 0
        assert math.isfinite(learner.learn(memory.batch(tiny), 1)["total"])
    held, most = memory.count(tiny)
    assert held == pytest.approx(really_held / 1e9, rel=0.05)
    assert most == pytest.approx(alive.most / 1e9, rel=0.05)
    assert most > 1.2 * held
    assert math.isfinite(learner.learn(memory.batch(tiny), 2)["total"])  # the count leaves nothing behind


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base", "large", "dit_b", "dit_xl"])
def test_a_step_of_a_published_recipe_fits_into_80_gb(size):
    """With 10 GB to spare for what is not counted."""
    command = [sys.executable, str(BENCHMARKS / "memory.py"), size]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 10 < json.loads(done.stdout)["value"] < 70
