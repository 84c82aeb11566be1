import json

import pytest
import torch
from safetensors.torch import load_file

from vtp.flow.guidance import classifier_free
from vtp.flow.path import cosine_loss, interpolate, mse_loss, target_velocity
from vtp.flow.samplers import dopri5, euler
from vtp.flow.times import warped_times
from vtp.models.dit import DiTConfig, LightningDiT, drop_labels, rotary_tables, rotate, unpatchify

TINY = DiTConfig(input_size=4, in_channels=5, hidden_size=24, depth=2, num_heads=3, num_classes=7)


def perturbed(config):
    """A model that is not zero."""
    torch.manual_seed(0)
    model = LightningDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def published(shared):
    folder = shared / "fixtures/lightningdit/b1_like"
    return LightningDiT.from_pretrained(folder).requires_grad_(False), load_file(folder / "io.safetensors")


def velocity(model, labels):
    return lambda x, t: model(x, torch.full((len(x),), t), labels)


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_published_forward_and_embeddings(published):
    model, io = published
    assert_close(model(io["x"], io["t"], io["y"]), io["out"])
    assert_close(model.t_embedder.timestep_embedding(io["t"]), io["t_freq"])
    assert_close(model.t_embedder(io["t"]), io["t_emb"])
    assert_close(model.y_embedder(io["y"]), io["y_emb"])


def test_published_tables_are_ours(published):
    model, _ = published
    ours = LightningDiT(model.config).state_dict()
    for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        assert_close(ours[key], model.state_dict()[key], atol=1e-6)


@pytest.mark.parametrize(("published_shift", "shift"), [(0.0, 1.0), (0.075, 0.075), (0.3, 0.3)])
def test_published_euler_samples(published, published_shift, shift):
    model, io = published
    ours = euler(velocity(model, io["zy"]), io["z"], warped_times(11, shift))
    assert_close(ours, io[f"sample/euler/11/shift{published_shift}"])


@pytest.mark.parametrize(
    ("name", "start"), [("s4_nointerval", 0.0), ("s4_interval0.11", 0.11), ("s4_interval0.3_below", 0.3)]
)
def test_published_guidance(published, name, start):
    """The published state carries every sample twice; the second copy is never fed to the network."""
    model, io = published
    conditional, null = velocity(model, io["cfg_y"][:2]), velocity(model, io["cfg_y"][2:])
    ours = classifier_free(conditional, null, 4.0, (start, 1.0), channels=3)(io["cfg_x"][:2], float(io["cfg_t"][0]))
    assert_close(ours, io[f"cfg_out_{name}"][:2])


def test_published_guided_sample(published):
    model, io = published
    null = torch.full_like(io["zy"], model.null_class)
    guided = classifier_free(velocity(model, io["zy"]), velocity(model, null), 3.0, (0.2, 1.0), channels=3)
    ours = euler(guided, io["z"], warped_times(11, 0.3))
    assert_close(ours, io["sample_cfg3_interval0.2/euler/11/shift0.3"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torchdiffeq's own
def test_published_adaptive_sample(published):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    model, io = published
    assert_close(dopri5(velocity(model, io["zy"]), io["z"], warped_times(6)), io["sample/dopri5/6/shift0.0"])


def test_published_losses(published):
    model, io = published
    noise, data, t = io["loss/x0"], io["loss/x1"], io["loss/t"]
    pred = model(interpolate(noise, data, t), t, io["loss/y"])
    assert_close(pred, io["loss/pred"])
    assert_close(mse_loss(pred, target_velocity(noise, data)), io["loss/mse"])
    assert_close(cosine_loss(pred, target_velocity(noise, data)), io["loss/cos"])


def test_published_sizes(shared):
    sizes = {
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
        "1p0B": (24, 1536, 24),
        "1p6B": (28, 1792, 28),
    }
    for name, counts in json.loads((shared / "fixtures/lightningdit/param_counts_f16d64_256.json").read_text()).items():
        size, patch = name.removeprefix("LightningDiT-").split("/")
        depth, width, heads = sizes[size]
        with torch.device("meta"):
            model = LightningDiT(DiTConfig(patch_size=int(patch), hidden_size=width, depth=depth, num_heads=heads))
        assert sum(p.numel() for p in model.parameters()) == counts["total"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts["trainable"], name


def test_published_initialisation(shared):
    folder = shared / "fixtures/lightningdit/b1_like"
    torch.manual_seed(0)
    model = LightningDiT(DiTConfig.from_published(json.loads((folder / "config.json").read_text())))
    for name, (mean, std) in json.loads((folder / "init_stats.json").read_text()).items():
        weight = model.state_dict()[name]
        assert abs(float(weight.mean()) - mean) < 0.02 + 0.1 * abs(mean), name
        assert abs(float(weight.std()) - std) < 0.1 * std + 1e-6, name


def test_zero_at_the_start_with_every_gradient_after_a_step_away():
    x, t, y = torch.randn(3, 5, 4, 4), torch.rand(3), torch.tensor([0, 6, 7])
    assert LightningDiT(TINY)(x, t, y).abs().max() == 0
    model = perturbed(TINY)
    model(x, t, y).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_any_grid_uses_the_positions_of_that_grid():
    """A wider grid is not the stored one; at the stored size both ways to the tables agree."""
    model = perturbed(TINY)
    t, y = torch.rand(2), torch.tensor([1, 2])
    assert model(torch.randn(2, 5, 3, 6), t, y).shape == (2, 5, 3, 6)
    larger = LightningDiT(DiTConfig(**{**TINY.__dict__, "input_size": 6})).eval()
    tables = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    larger.load_state_dict({k: v for k, v in model.state_dict().items() if k not in tables}, strict=False)
    x = torch.randn(2, 5, 4, 4)
    assert_close(larger(x, t, y), model(x, t, y))


def test_batch_rows_do_not_see_each_other():
    model = perturbed(TINY)
    x, t, y = torch.randn(4, 5, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 7])
    assert_close(model(x, t, y)[2:3], model(x[2:3], t[2:3], y[2:3]))


def test_patches_are_put_back_where_they_came_from():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(unpatchify(tokens, (2, 3), 2), x)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = rotary_tables((1, 8), 16)
    q, k = torch.randn(2, 16)
    rows = rotate(q.expand(8, 16), cos, sin), rotate(k.expand(8, 16), cos, sin)
    torch.testing.assert_close(rows[0].norm(dim=-1), q.norm().expand(8))
    scores = rows[0] @ rows[1].T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)


def test_autocast_runs_and_stays_close():
    model = perturbed(TINY)
    x, t, y = torch.randn(3, 5, 4, 4), torch.rand(3), torch.tensor([0, 3, 7])
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
    torch.testing.assert_close(low.float(), model(x, t, y), rtol=0.1, atol=0.1)


def test_saved_and_loaded_is_the_same(tmp_path):
    model = perturbed(TINY)
    model.save_pretrained(tmp_path / "dit")
    again = LightningDiT.from_pretrained(tmp_path / "dit")
    assert again.config == TINY
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_label_dropout():
    labels = torch.arange(10_000) % 7
    dropped = drop_labels(labels, 7, 0.1, torch.Generator().manual_seed(0))
    assert 0.08 < float((dropped == 7).float().mean()) < 0.12
    assert torch.equal(dropped[dropped != 7], labels[dropped != 7])
    assert torch.equal(drop_labels(labels, 7, 0.0), labels)


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (1, 5, 5, 4)])
def test_wrong_latents(shape):
    model = LightningDiT(DiTConfig(**{**TINY.__dict__, "patch_size": 2}))
    with pytest.raises(ValueError, match="DiT input is"):
        model(torch.randn(shape), torch.rand(1), torch.tensor([0]))


def test_wrong_config(tmp_path):
    with pytest.raises(ValueError, match="wo_shift"):
        DiTConfig.from_published({"wo_shift": True})
    with pytest.raises(ValueError, match="'widht'"):
        DiTConfig.from_published({"widht": 3})
    with pytest.raises(ValueError, match="num_heads"):
        DiTConfig(hidden_size=100, num_heads=3)
    with pytest.raises(ValueError, match="no DiT"):
        LightningDiT.from_pretrained(tmp_path)
