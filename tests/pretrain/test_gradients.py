"""Gradient caching and prototypes in chunks: losses and gradients are those of everything at once, on 1 rank or 2."""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.pretrain.test_parallel import batches, half
from vtp.config import ConfigError
from vtp.engine.parallel import ParallelConfig, whole
from vtp.objectives import prototypes
from vtp.pretrain import objectives as objectives_module
from vtp.pretrain.learner import PretrainLearner

CONTRASTS = ["clip", "siglip"]


def with_contrast(tiny, name):
    return replace(tiny, contrast=name, model=replace(tiny.model, init_logit_bias=-10.0 if name == "siglip" else None))


def cached(cfg, size, **parallel):
    return replace(cfg, parallel=ParallelConfig(micro_batch=size, **parallel))


def gradients(cfg, batch):
    """Losses and the whole gradient of every parameter, by name."""
    torch.manual_seed(0)
    learner = PretrainLearner(cfg, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
        losses, _ = learner.forward(batch, 0.05)
    sum(learner.weights[name] * loss for name, loss in losses.items()).backward()
    named = learner.objectives.named_parameters()
    grads = whole({name: p.grad for name, p in named if p.grad is not None})
    return {name: loss.detach() for name, loss in losses.items()}, grads


def assert_equal(got, want, tolerance=1e-6):
    """Losses, and all gradients as one vector, to this share of their size; no tensor is off by ten times as much."""
    for part, reference in zip(got, want, strict=True):
        assert part.keys() == reference.keys()
        difference = torch.stack([(part[name] - x).norm() for name, x in reference.items()]).norm()
        assert difference <= tolerance * torch.stack([x.norm() for x in reference.values()]).norm()
        for name, x in reference.items():
            atol = 10 * tolerance * max(1.0, float(x.abs().max()))
            torch.testing.assert_close(part[name], x, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("size, recompute", [(3, False), (2, True), (1, False)])
def test_cached_gradients_equal_those_of_one_pass(tiny, contrast, size, recompute):
    """8 pairs; of the reconstruction's 4 views some micro-batches hold all of theirs, one a part, others none."""
    cfg = with_contrast(tiny, contrast)
    [batch] = batches(cfg, 1)
    assert_equal(gradients(cached(cfg, size, recompute=recompute), batch), gradients(cfg, batch))


def test_the_random_state_of_the_views_device_is_kept(tiny, monkeypatch):
    """torch keeps the state of those devices on which it finds a tensor among what a checkpoint is called with."""
    cfg, given = cached(tiny, 3), []

    def spied(function, *args, **options):
        given.append([x for x in tree_leaves(args) if isinstance(x, torch.Tensor)])
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(objectives_module, "checkpoint", spied)
    [batch] = batches(cfg, 1)
    gradients(cfg, batch)
    assert [len(tensors[0]) for tensors in given] == [3, 3, 2]


def test_without_a_shared_view_and_alone(tiny):
    cfg = replace(tiny, views=replace(tiny.views, share=False))
    [batch] = batches(cfg, 1)
    assert batch.rec.shared == 0
    assert_equal(gradients(cached(cfg, 3), batch), gradients(cfg, batch))
    cfg = replace(tiny, weights=replace(tiny.weights, ssl=0.0, rec=0.0))
    [batch] = batches(cfg, 1)
    assert_equal(gradients(cached(cfg, 3), batch), gradients(cfg, batch))


def test_gradients_by_objective_are_those_of_one_pass(tiny):
    [batch] = batches(tiny, 1)

    def read(cfg):
        torch.manual_seed(0)
        values = PretrainLearner(cfg, torch.device("cpu")).learn(batch, 0)
        return {name: float(values[name]) for name in ("grad_clip", "grad_rec", "grad_ssl")}

    want = read(tiny)
    assert min(want.values()) > 0
    assert read(cached(tiny, 3)) == pytest.approx(want, rel=1e-5)


def on_rank(rank, cfg, batch):
    part = half(batch, rank)
    return gradients(cfg, part if cfg.weights.ssl > 0 else part._replace(ssl=None))


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("ssl", [0.0, 1.0])
def test_two_ranks_with_cached_gradients_equal_one_process_in_one_pass(tiny, two_ranks, contrast, shard, ssl):
    cfg = with_contrast(tiny, contrast)
    [batch] = batches(cfg, 1)
    if ssl == 0:
        cfg = replace(cfg, weights=replace(cfg.weights, ssl=0.0))
    halves = replace(cached(cfg, 3, shard=shard), batch=replace(cfg.batch, clip=4, ssl=3, rec=2))
    (losses0, grads0), (losses1, grads1) = two_ranks(on_rank, halves, batch)
    assert all(torch.equal(grads0[name], grads1[name]) for name in grads0)
    mean = {name: (losses0[name] + losses1[name]) / 2 for name in losses0}
    # Gradients of self-distillation are sums of hundreds of terms, in another order on two ranks: test_parallel's 1e-5.
    alone = gradients(cfg, batch if ssl > 0 else batch._replace(ssl=None))
    assert_equal((mean, grads0), alone, 1e-6 if ssl == 0 else 1e-5)


def on_rank_in_chunks(rank, cfg, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototypes, "LOGITS", 7 * cfg.distil.prototypes)
        patch.setattr(objectives_module.Pretraining, "_compare", None)  # not the plain losses
        return on_rank(rank, cfg, batch)


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_ranks_with_prototypes_in_chunks_equal_one_process(tiny, two_ranks, centering, shard):
    cfg = replace(tiny, distil=replace(tiny.distil, centering=centering))
    [batch] = batches(cfg, 1)
    masked = [int(masks.sum()) for masks in batch.ssl.masks.chunk(2, 1)]
    assert masked[0] != masked[1]
    halves = replace(cfg, parallel=ParallelConfig(shard=shard), batch=replace(cfg.batch, clip=4, ssl=3, rec=2))
    (losses0, grads0), (losses1, grads1) = two_ranks(on_rank_in_chunks, halves, batch)
    assert all(torch.equal(grads0[name], grads1[name]) for name in grads0)
    mean = {name: (losses0[name] + losses1[name]) / 2 for name in losses0}
    assert_equal((mean, grads0), gradients(cfg, batch), 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_pass_draws_the_same_stochastic_depth(tiny, precision, monkeypatch):
    cfg = cached(replace(tiny, precision=precision, drop_path=replace(tiny.drop_path, clip=0.5)), 3)
    [batch] = batches(cfg, 1)
    got = gradients(cfg, batch)
    monkeypatch.setattr(objectives_module, "checkpoint", lambda f, *args, **_: f(*args))  # all is kept: no second pass
    assert_equal(got, gradients(cfg, batch), 0)


@pytest.mark.parametrize("caches", [True, False])
def test_only_one_micro_batch_is_held_at_a_time(tiny, caches, monkeypatch):
    cfg = cached(replace(tiny, weights=replace(tiny.weights, ssl=0.0), perceptual="none"), 2)
    [batch] = batches(cfg, 1)
    model = objectives_module.Pretraining(cfg).train()
    tokens = 1 + (batch.clip.images.shape[-1] // cfg.model.vision.patch_size) ** 2
    activations, seen = [], []

    def watch(layer, args, out):
        others = sum(not a.expired() for a in activations)  # that are still there
        seen.append((len(out) // tokens, others))
        activations.append(StorageWeakRef(out.untyped_storage()))

    model.student.trunk.blocks[0].mlp.w1.register_forward_hook(watch)
    if not caches:
        monkeypatch.setattr(objectives_module, "checkpoint", lambda f, *args, **_: f(*args))
    losses, _ = model(batch, teacher_temp=0.05)
    if caches:
        sum(losses.values()).backward()
        assert seen == [(2, 0)] * 8  # each view once, then once more
    else:
        assert seen == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_a_negative_size_is_refused():
    with pytest.raises(ConfigError, match="micro_batch=-1"):
        ParallelConfig(micro_batch=-1)
