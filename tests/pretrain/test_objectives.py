"""The joint forward: which losses, what they cost, and that each is what its equation says of the student's outputs."""

from dataclasses import replace

import pytest
import torch

from vtp.config import ConfigError
from vtp.data.augment import finish
from vtp.data.loader import Loader
from vtp.data.sources import open_source
from vtp.models import linear
from vtp.objectives import prototypes
from vtp.objectives.clip import clip_loss
from vtp.pretrain import learner as learner_module
from vtp.pretrain.config import Weights
from vtp.pretrain.learner import PretrainLearner
from vtp.pretrain.objectives import Pretraining
from vtp.recipes.pretrain import corner
from vtp.tokenizers import get_tokenizer


def a_batch(cfg):
    tokenizer = get_tokenizer(context_length=cfg.model.text.context_length)
    loader = Loader(open_source(cfg.data), cfg.views, cfg.active_batch, tokenizer, patch_size=4)
    return finish(next(loader), cfg.augment, torch.Generator().manual_seed(0))


def calls(module, log, name):
    module.register_forward_hook(lambda m, args, out: log.append((name, len(args[0]))))


def test_a_step_on_amd_is_the_same(tiny, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    model, batch = Pretraining(tiny), a_batch(tiny)
    monkeypatch.setattr(linear, "CONVOLVED_WIDTH", 1)

    def step(amd):
        monkeypatch.setattr(linear, "_mkl_on_amd", lambda: amd)
        torch.manual_seed(0)
        losses, _ = model(batch, teacher_temp=0.05)
        total = sum(losses.values())
        gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
        return total, torch.cat([g.flatten() for g in gradients])

    (mine, gradient), (theirs, expected) = step(True), step(False)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert 0 < (gradient - expected).norm() < 1e-5 * expected.norm()  # another kernel, the same gradient


CORNERS = {
    "ae": {"l1", "perceptual"},
    "clip_ae": {"clip", "l1", "perceptual"},
    "ssl_ae": {"dino", "ibot", "koleo", "l1", "perceptual"},
    "vtp": {"clip", "dino", "ibot", "koleo", "l1", "perceptual"},
}


@pytest.mark.parametrize("name", CORNERS)
def test_each_corner_has_its_losses_and_owns_nothing_else(tiny, name):
    cfg = corner(tiny, name)
    model = Pretraining(cfg)
    batch = a_batch(cfg)
    losses, _ = model(batch, teacher_temp=0.05)
    assert set(losses) == CORNERS[name] == set(cfg.weights.by_loss())
    assert all(loss.ndim == 0 and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert (batch.clip is None) == ("clip" not in losses) and (batch.ssl is None) == ("dino" not in losses)
    assert hasattr(model.student, "text_transformer") == ("clip" in losses)
    assert hasattr(model, "head") == ("dino" in losses)
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert not any(p.grad is not None for p in model.teacher.parameters())


@pytest.mark.parametrize("ae_only", [True, False], ids=["before the bottleneck", "behind it"])
@pytest.mark.parametrize("contrast", ["clip", "siglip"])
@pytest.mark.parametrize("off", ["", "clip", "ssl", "rec", "clip ssl", "clip rec", "ssl rec"])
def test_all_that_is_trained_has_a_gradient(tiny, off, contrast, ae_only, monkeypatch):
    """DDP waits for the gradient of every parameter that asks for one."""
    weights = replace(tiny.weights, **dict.fromkeys(off.split(), 0.0))
    vision = replace(tiny.model.vision, bottleneck_ae_only=ae_only)
    model = replace(tiny.model, vision=vision, init_logit_bias=-10.0)
    cfg = replace(tiny, weights=weights, contrast=contrast, model=model)
    without = []

    def update(optimizer, parameters, clip_grad):
        without.extend(p.shape for p in parameters if p.grad is None)
        return torch.zeros(())

    monkeypatch.setattr(learner_module, "update", update)
    PretrainLearner(cfg, torch.device("cpu")).learn(a_batch(cfg), 1)
    assert without == []


def test_without_a_perceptual_loss_an_auto_encoder_has_no_teacher(tiny):
    cfg = corner(replace(tiny, perceptual="none"), "ae")
    assert not hasattr(Pretraining(cfg), "teacher")
    no_decoder = Pretraining(replace(tiny, weights=Weights(rec=0.0)))
    assert no_decoder.student.pixel_decoder is None


def test_the_trunk_runs_once_on_each_distinct_view(tiny):
    model, batch, log = Pretraining(replace(tiny, perceptual="none")), a_batch(tiny), []
    calls(model.student.trunk.patch_embed, log, "student")
    calls(model.teacher["trunk"].patch_embed, log, "teacher")
    calls(model.head, log, "head")
    model(batch, teacher_temp=0.05)
    masked = len(batch.ssl.mask_indices)
    # CLIP's view (8) serves the reconstruction too; 2 x 6 global crops; 2 x 6 local ones; one pass of each head
    assert log == [("student", 8), ("teacher", 12), ("student", 12), ("student", 12), ("head", 24 + masked)]


def test_shared_and_separate_reconstruction_views_give_the_same_losses(tiny):
    model, batch = Pretraining(tiny), a_batch(tiny)
    shared, _ = model(batch, teacher_temp=0.05)
    own = batch._replace(rec=batch.rec._replace(shared=0))
    assert torch.equal(batch.rec.images, batch.clip.images[: batch.rec.shared])
    separate, _ = model(own, teacher_temp=0.05)
    for name in shared:
        torch.testing.assert_close(shared[name], separate[name], rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_published_methods(tiny):
    model, batch = Pretraining(tiny), a_batch(tiny)
    losses, readings = model(batch, teacher_temp=0.05)
    student = model.student
    image = student.get_clip_image_feature(batch.clip.images)
    text = student.get_clip_text_feature(batch.clip.tokens)
    torch.testing.assert_close(losses["clip"], clip_loss(image, text, student.logit_scale.exp()))
    decoded = student.get_latents_decoded_images(student.get_reconstruction_latents(batch.rec.images))
    torch.testing.assert_close(losses["l1"], (decoded - batch.rec.images).abs().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(readings["logit_scale"], torch.tensor(1 / 0.07))


def test_ibot_compares_the_masked_view_with_the_whole_one_place_by_place(tiny):
    """With a teacher that sees what the student sees (no masks), student and teacher logits are equal at each place."""
    model, batch = Pretraining(tiny), a_batch(tiny)
    seen = {}
    model.head.register_forward_hook(lambda m, args, out: seen.setdefault("student", out))
    model.teacher["head"].register_forward_hook(lambda m, args, out: seen.setdefault("teacher", out))
    unmasked = batch.ssl._replace(masks=torch.zeros_like(batch.ssl.masks))
    model(batch._replace(ssl=unmasked), teacher_temp=0.05)
    rows = len(seen["teacher"])  # 2 x 6 class tokens, then the patches at mask_indices
    torch.testing.assert_close(seen["student"][:rows], seen["teacher"], rtol=1e-4, atol=1e-4)


def test_teacher_is_the_student_at_first_and_then_follows(tiny):
    torch.manual_seed(0)
    learner = PretrainLearner(tiny, torch.device("cpu"))
    model = learner.objectives
    pairs = [(model.teacher["trunk"], model.student.trunk), (model.teacher["head"], model.head)]
    for teacher, student in pairs:
        for (_, t), (_, s) in zip(teacher.named_parameters(), student.named_parameters(), strict=True):
            assert torch.equal(t, s) and t.data_ptr() != s.data_ptr()
    before = {n: p.clone() for n, p in model.teacher["trunk"].named_parameters()}
    tokenizer = get_tokenizer(context_length=24)
    loader = Loader(open_source("scenes"), tiny.views, tiny.active_batch, tokenizer, patch_size=4)
    learner.step(next(loader), 5)
    momentum = tiny.distil.momentum(5 * 8, 6 * 8)
    students = dict(model.student.trunk.named_parameters())
    for name, t in model.teacher["trunk"].named_parameters():
        torch.testing.assert_close(t, momentum * before[name] + (1 - momentum) * students[name])


@pytest.mark.parametrize("ae_only", [True, False])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_variants_of_self_distillation(tiny, ae_only, centering):
    vision = replace(tiny.model.vision, bottleneck_ae_only=ae_only)
    cfg = replace(tiny, model=replace(tiny.model, vision=vision), distil=replace(tiny.distil, centering=centering))
    model = Pretraining(cfg).train()
    losses, readings = model(a_batch(cfg), teacher_temp=0.05)
    assert model.head.mlp[0].in_features == (32 if ae_only else 8)
    assert losses["dino"].isfinite() and 0 <= readings["teacher_entropy_single"] <= readings["teacher_entropy_mean"]
    assert model.center_cls.abs().sum().item() > 0 if centering == "centering" else True


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_many_logits_are_compared_in_chunks_to_the_same_result(tiny, centering, precision, monkeypatch):
    cfg = replace(tiny, distil=replace(tiny.distil, centering=centering))
    batch, results = a_batch(cfg), []
    for logits in (prototypes.LOGITS, 7 * cfg.distil.prototypes):
        monkeypatch.setattr(prototypes, "LOGITS", logits)
        torch.manual_seed(0)
        model, log = Pretraining(cfg).train(), []
        calls(model.head, log, "head")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses, readings = model(batch, teacher_temp=0.05)
        assert len(log) == (not results)  # the head makes logits of all rows, or of none
        (losses["dino"] + losses["ibot"]).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(losses | readings | grads | dict(model.named_buffers()))
    plain, chunked = results
    assert plain.keys() == chunked.keys()
    for name, x in plain.items():
        assert (chunked[name] - x).norm() <= {"fp32": 1e-5, "bf16": 0.05}[precision] * x.norm() + 1e-7, name


@pytest.mark.parametrize("chunked", [False, True])
def test_a_batch_that_is_not_finite_leaves_the_centres(tiny, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(prototypes, "LOGITS", 7 * tiny.distil.prototypes)
    model = Pretraining(replace(tiny, distil=replace(tiny.distil, centering="centering"))).train()
    batch = a_batch(tiny)
    model(batch, 0.05)
    before = model.center_cls.clone(), model.center_patch.clone()
    crops = batch.ssl.global_crops.clone()
    crops[0, 0, 0, 0, 0] = torch.nan
    model(batch._replace(ssl=batch.ssl._replace(global_crops=crops)), 0.05)
    assert torch.equal(model.center_cls, before[0]) and model.center_patch.isfinite().all()
    model(batch, 0.05)
    assert not torch.equal(model.center_cls, before[0]) and not torch.equal(model.center_patch, before[1])


def test_siglip_needs_and_uses_its_bias(tiny):
    with pytest.raises(ConfigError, match="init_logit_bias"):
        replace(tiny, contrast="siglip")
    cfg = replace(tiny, contrast="siglip", model=replace(tiny.model, init_logit_bias=-10.0))
    model = Pretraining(cfg)
    losses, _ = model(a_batch(cfg), teacher_temp=0.05)
    losses["clip"].backward()
    assert model.student.logit_bias.grad is not None


def test_one_step_under_bf16_with_stochastic_depth(tiny):
    drop = replace(tiny.drop_path, clip=0.3, ssl=0.3, rec=0.3)
    learner = PretrainLearner(replace(tiny, precision="bf16", drop_path=drop), torch.device("cpu"))
    loader = Loader(
        open_source("scenes"), tiny.views, tiny.active_batch, get_tokenizer(context_length=24), patch_size=4
    )
    metrics = learner.step(next(loader), 0)
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values())
    assert set(Weights().by_loss()) <= set(metrics)


def test_what_each_objective_sends_into_the_trunk(tiny):
    """`felt` is the gradient of its losses at the trunk's outputs, objective by objective, though they share a pass."""
    model, batch = Pretraining(tiny), a_batch(tiny)
    outputs = []

    def keep(_module, _args, tokens):
        outputs.append(tokens.clone())
        return outputs[-1]

    model.student.trunk.norm.register_forward_hook(keep)
    losses, _ = model(batch, teacher_temp=0.05)
    sum(losses.values()).backward(retain_graph=True)
    read = {"clip": outputs[:1], "rec": outputs[:1], "ssl": outputs[1:]}
    own = {"clip": ["clip"], "rec": ["l1", "perceptual"], "ssl": ["dino", "ibot", "koleo"]}
    found = {name: float(squares) for name, squares in model.felt.items()}
    assert found.keys() == own.keys()
    for name, parts in own.items():
        loss = sum(losses[part] for part in parts)
        gradients = torch.autograd.grad(loss, read[name], allow_unused=True, retain_graph=True)
        expected = sum(g.square().sum() for g in gradients if g is not None)
        assert found[name] == pytest.approx(float(expected), rel=1e-4)


def test_a_step_says_what_is_watched(tiny):
    cfg = replace(tiny, distil=replace(tiny.distil, centering="centering"))
    record = PretrainLearner(cfg, torch.device("cpu")).learn(a_batch(cfg), 1)
    watched = {"grad_norm", "grad_clip", "grad_ssl", "grad_rec", "logit_scale", "center_norm", "ideal_seconds"}
    watched |= {"teacher_entropy_mean", "teacher_entropy_single"}
    assert watched <= record.keys() and all(float(record[name]) > 0 for name in watched - {"center_norm"})
