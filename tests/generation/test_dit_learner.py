import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.meta import META, NothingWaits, usable
from vtp import config
from vtp.config import ConfigError
from vtp.engine.loop import LoopConfig, reseed
from vtp.generation.config import DiTSize, DiTTrainConfig
from vtp.generation.latents import Latents
from vtp.generation.learner import DiTLearner, LatentBatches
from vtp.generation.run import train_dit
from vtp.models.dit import DiTConfig, LightningDiT
from vtp.recipes.dit import dit_b, dit_quickstart, dit_xl


def test_an_epoch_takes_every_latent_once(latents):
    folder = Latents(latents)
    batches = LatentBatches(folder, batch_size=8, seed=0, flip=False)
    first, second = (torch.cat([b.latents for b in islice(batches, 5)]) for _ in range(2))
    everything = folder.take(torch.arange(40), torch.zeros(40, dtype=torch.bool))[0]
    for epoch in (first, second):
        assert torch.equal(epoch.flatten(1).sum(1).sort()[0], everything.flatten(1).sum(1).sort()[0])
    assert not torch.equal(first, second)


def test_batches_go_on_where_they_stood(latents):
    batches = LatentBatches(Latents(latents), batch_size=7, seed=1, flip=True)
    stream = iter(batches)
    _, state = next(stream), batches.state_dict()
    expected = list(islice(stream, 8))
    again = LatentBatches(Latents(latents), batch_size=7, seed=1, flip=True)
    again.load_state_dict(json.loads(json.dumps(state)))
    for a, b in zip(expected, again, strict=False):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.labels, b.labels)


def test_half_of_the_latents_are_mirrored_unless_switched_off(latents):
    folder = Latents(latents)
    plain = folder.take(torch.arange(40), torch.zeros(40, dtype=torch.bool))[0]

    def share_of_plain(flip):
        batch = next(iter(LatentBatches(folder, batch_size=40, seed=0, flip=flip))).latents
        return sum(any(torch.equal(row, p) for p in plain) for row in batch) / 40

    assert share_of_plain(False) == 1 and 0.25 < share_of_plain(True) < 0.75


def test_a_step_reads_nothing_from_its_device(latents, monkeypatch):
    usable(monkeypatch)
    folder = Latents(latents)
    shape = DiTConfig(input_size=2, in_channels=6, hidden_size=32, depth=2, num_heads=2, num_classes=8)
    cfg = DiTTrainConfig(steps=2, batch_size=8, precision="fp32", optim=dit_quickstart().optim)
    learner = DiTLearner(cfg, LightningDiT(shape), folder, META)
    batches = iter(LatentBatches(folder, 8, seed=0, flip=True))
    with NothingWaits():
        for i in range(2):
            read = learner.step(next(batches), i + 1)
    assert read["total"].device == META


def test_loss_falls_when_two_latents_are_learned_by_heart(latents):
    cfg = DiTTrainConfig(steps=150, batch_size=64, device="cpu", precision="fp32", label_dropout=0.0)
    cfg = replace(cfg, optim=replace(dit_quickstart().optim))
    folder = Latents(latents)
    shape = DiTConfig(input_size=2, in_channels=6, hidden_size=32, depth=2, num_heads=2, num_classes=8)
    torch.manual_seed(0)
    learner = DiTLearner(cfg, LightningDiT(shape), folder, torch.device("cpu"))
    batch = next(iter(LatentBatches(folder, 2, seed=0, flip=False)))
    batch = type(batch)(batch.latents.repeat(32, 1, 1, 1), torch.tensor([0, 1]).repeat(32))
    losses = []
    for step in range(cfg.steps):
        reseed(0, 0, step)
        losses.append(float(learner.step(batch, step)["total"]))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_resumed_is_uninterrupted(tiny):
    whole = replace(tiny, out=tiny.out + "_whole", loop=LoopConfig(log_every=1))
    train_dit(whole)
    train_dit(replace(tiny, loop=LoopConfig(log_every=1, save_every=3)))
    run = Path(tiny.out)  # fall back to the checkpoint after three steps, as after a kill
    for path in (run / "checkpoints" / "step_0000005").iterdir():
        path.unlink()
    (run / "model" / "model.safetensors").unlink()
    train_dit(replace(tiny, loop=LoopConfig(log_every=1, save_every=3)))
    a, b = (load_file(Path(out) / "model" / "model.safetensors") for out in (whole.out, tiny.out))
    for name, value in a.items():
        assert torch.equal(value, b[name]), name

    def losses(out):
        return [json.loads(line)["total"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

    assert losses(whole.out) == losses(tiny.out)


def test_a_run_whose_blocks_are_recomputed_learns_the_same(tiny):
    other = replace(tiny, out=tiny.out + "_other", recompute=True)
    train_dit(other)
    _same_weights(tiny, other)
    train_dit(replace(other, recompute=False))  # which is no other run


@pytest.mark.slow
def test_a_run_whose_blocks_are_compiled_learns_the_same(tiny, tmp_path):
    """In a process of its own: here the shapes in annotations are checked, which torch.compile cannot trace."""
    other = replace(tiny, out=tiny.out + "_other", compile=True, recompute=True)
    (tmp_path / "tiny.yaml").write_text(config.dump(other))
    command = [sys.executable, "-m", "vtp", "train-dit", str(tmp_path / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    _same_weights(tiny, other)


def _same_weights(plain, other):
    train_dit(plain)
    one, two = (load_file(Path(cfg.out) / "model" / "model.safetensors") for cfg in (plain, other))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_published_model_stands_alone(tiny, latents):
    model = train_dit(tiny)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors", "stats.json"]
    assert LightningDiT.from_pretrained(model).config.num_classes == 8
    assert (model / "stats.json").read_text() == (latents / "stats.json").read_text()


def test_average_lags_behind_the_model(latents):
    cfg = DiTTrainConfig(steps=10, batch_size=4, device="cpu", precision="fp32", ema=0.5)
    shape = DiTConfig(input_size=2, in_channels=6, hidden_size=16, depth=1, num_heads=2, num_classes=8)
    learner = DiTLearner(cfg, LightningDiT(shape), Latents(latents), torch.device("cpu"))
    name, expected = "blocks.0.attn.qkv.weight", learner.model.blocks[0].attn.qkv.weight.detach().clone()
    for step, batch in enumerate(islice(LatentBatches(Latents(latents), 4, seed=0, flip=False), 6)):
        learner.step(batch, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * learner.model.state_dict()[name]
    torch.testing.assert_close(learner.published().state_dict()[name], expected)


def test_mirrored_latents_must_be_there(tiny, tokenizer, tmp_path):
    from vtp.generation.latents import encode_latents

    plain = encode_latents(tokenizer, "scenes", tmp_path / "plain", label="shape", limit=8, flip=False, device="cpu")
    with pytest.raises(ConfigError, match="flip=false"):
        train_dit(replace(tiny, data=str(plain)))
    train_dit(replace(tiny, latents=str(plain), flip=False, steps=1))


def test_a_shape_that_cannot_be_built_is_one_clear_error(tiny):
    with pytest.raises(ConfigError, match="model: .*hidden_size 16 must be a multiple of 4 x num_heads 5"):
        train_dit(replace(tiny, model=DiTSize(hidden_size=16, depth=1, num_heads=5)))
    assert not Path(tiny.out).exists()


def test_recipes_are_the_published_sizes():
    with torch.device("meta"):
        for recipe, millions in ((dit_b(), 130.6), (dit_xl(), 675.3)):
            config = DiTConfig(**recipe.model.__dict__)
            total = sum(p.numel() for p in LightningDiT(config).parameters())
            assert abs(total / 1e6 - millions) < 0.1
    assert dit_b().optim.lr(0, 10) == dit_b().optim.lr(10, 10) == 2e-4


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"ema": 1.0}, {"label_dropout": -0.1}])
def test_impossible_configuration(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DiTTrainConfig(**wrong)
