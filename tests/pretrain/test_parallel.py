"""Two ranks with half of a batch each learn what one process learns from all of it, by DDP and by FSDP2."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp.data.loader import Loader
from vtp.data.sources import open_source
from vtp.engine.parallel import ParallelConfig, whole
from vtp.pretrain import learner as learner_module
from vtp.pretrain.learner import PretrainLearner
from vtp.tokenizers import get_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def batches(cfg, n):
    tokenizer = get_tokenizer(context_length=cfg.model.text.context_length)
    loader = Loader(open_source(cfg.data), cfg.views, cfg.active_batch, tokenizer, patch_size=4)
    return [learner_module.finish(next(loader), cfg.augment, torch.Generator().manual_seed(i)) for i in range(n)]


def half(batch, rank):
    """Rows of this rank; the reconstruction views are those among its CLIP views."""
    clip = type(batch.clip)(*(x.chunk(2)[rank] for x in batch.clip))
    masks = batch.ssl.masks.chunk(2, 1)[rank]
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(-1, keepdim=True)).expand_as(masks).flatten()[indices]
    crops = [x.chunk(2, 1)[rank] for x in (batch.ssl.global_crops, batch.ssl.local_crops)]
    rows = batch.rec.rows.chunk(2)[rank] - rank * len(clip.images)
    return batch._replace(
        clip=clip, ssl=type(batch.ssl)(*crops, masks, indices, weights), rec=type(batch.rec)(clip.images[rows], rows)
    )


def learn(cfg, parts):
    """Weights, losses of each step and gradient norms."""
    learner_module.finish = lambda batch, *_: batch  # the views are finished already, alike for both sides
    torch.manual_seed(0)
    learner = PretrainLearner(cfg, torch.device("cpu"))
    records = [learner.step(part, i + 1) for i, part in enumerate(parts)]
    return whole(learner.objectives.state_dict()), [{k: float(v) for k, v in r.items()} for r in records]


def on_rank(rank, cfg, whole_batches):
    return learn(cfg, [half(batch, rank) for batch in whole_batches])


@pytest.fixture
def setting(tiny):
    rows = torch.tensor([0, 2, 5, 7])  # as many of each rank's views
    cfg = replace(tiny, distil=replace(tiny.distil, centering="centering"))
    return cfg, [b._replace(rec=b.rec._replace(rows=rows, images=b.clip.images[rows])) for b in batches(cfg, 3)]


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(shard=True, recompute=True)], ids=["ddp", "fsdp"]
)
def test_two_ranks_learn_what_one_learns(setting, two_ranks, parallel, centering, monkeypatch):
    cfg, data = setting
    cfg = replace(cfg, distil=replace(cfg.distil, centering=centering), parallel=parallel)
    monkeypatch.setattr(learner_module, "finish", learner_module.finish)
    alone, records = learn(cfg, data)
    ranks = two_ranks(on_rank, replace(cfg, batch=replace(cfg.batch, clip=4, ssl=3, rec=2)), data)
    assert all(torch.equal(ranks[0][0][name], ranks[1][0][name]) for name in alone)  # the ranks hold the same weights
    for name, weight in alone.items():
        torch.testing.assert_close(ranks[0][0][name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for record, *others in zip(records, *(r for _, r in ranks), strict=True):
        for name, value in record.items():
            assert value == pytest.approx(sum(o[name] for o in others) / 2, rel=1e-5, abs=1e-5), name


def torchrun(*words, ranks=2, options=(), **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return subprocess.run(
        [*launcher, "-m", "vtp", "pretrain", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        **kwargs,
    )


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_torchrun_trains_publishes_and_resumes(tiny, tmp_path, shard):
    from vtp import config

    (tmp_path / "tiny.yaml").write_text(config.dump(replace(tiny, parallel=ParallelConfig(shard=shard))))
    done = torchrun(str(tmp_path / "tiny.yaml"), "steps=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("embed_dim: 768") <= 1  # one rank prints
    run = Path(tiny.out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 4 * 2 * 8
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert all(x.isfinite().all() for x in load_file(run / "tokenizer/model.safetensors").values())
