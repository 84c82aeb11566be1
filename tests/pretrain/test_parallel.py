"""Two ranks with half of a batch each learn what one process learns from all of it, by DDP and by FSDP2."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from vtp import config
from vtp.data.loader import Loader
from vtp.data.sources import open_source
from vtp.engine import checkpoint
from vtp.engine.logging import MACHINE
from vtp.engine.parallel import ParallelConfig, whole
from vtp.pretrain import learner as learner_module
from vtp.pretrain.learner import PretrainLearner
from vtp.tokenizers import get_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def batches(cfg, n):
    loader = raw_batches(cfg)
    return [learner_module.finish(next(loader), cfg.augment, torch.Generator().manual_seed(i)) for i in range(n)]


def half(batch, rank):
    """Rows of this rank: half of the reconstructed views, half of the others."""
    rows = torch.arange(len(batch.clip.images)).tensor_split([batch.rec.shared])
    rows = torch.cat([part.chunk(2)[rank] for part in rows])
    lengths = tuple(batch.clip.lengths[i] for i in rows)
    clip = type(batch.clip)(batch.clip.images[rows], batch.clip.tokens[rows], lengths)
    masks = batch.ssl.masks.chunk(2, 1)[rank]
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(-1, keepdim=True)).expand_as(masks).flatten()[indices]
    crops = [x.chunk(2, 1)[rank] for x in (batch.ssl.global_crops, batch.ssl.local_crops)]
    shared = batch.rec.shared // 2
    return batch._replace(
        clip=clip,
        ssl=type(batch.ssl)(*crops, masks, indices, weights),
        rec=type(batch.rec)(clip.images[:shared], shared),
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
    cfg = replace(tiny, distil=replace(tiny.distil, centering="centering"))
    return cfg, batches(cfg, 3)


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
            if name == "ideal_seconds":  # at the rate that this process measured
                continue
            assert value == pytest.approx(sum(o[name] for o in others) / 2, rel=1e-5, abs=1e-5), name


def test_sharded_steps_in_bf16_learn_what_copied_ones_learn(setting, two_ranks):
    """Beside a float32 residual stream, as on a GPU; a CPU's norms refuse weights in bfloat16 there."""
    cfg, data = setting
    cfg = replace(cfg, precision="bf16", batch=replace(cfg.batch, clip=4, ssl=3, rec=2))
    copied, sharded = (
        two_ranks(on_rank, replace(cfg, parallel=ParallelConfig(shard=shard)), data)[0][1] for shard in (False, True)
    )
    for mine, theirs in zip(sharded, copied, strict=True):
        for name in ("total", "clip", "dino", "ibot", "l1", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=0.02), name


def kept_on_rank(rank, cfg, parts):
    """How many tensors' layouts torch remembers after each step."""
    learner_module.finish = lambda batch, *_: batch
    learner = PretrainLearner(cfg, torch.device("cpu"))
    kept = []
    for i, part in enumerate(parts):
        learner.step(half(part, rank), i + 1)
        gc.collect()
        kept.append(sum(type(thing) is DTensorSpec for thing in gc.get_objects()))
    return kept


def test_sharded_steps_leave_nothing_behind(setting, two_ranks):
    cfg, data = setting
    cfg = replace(cfg, batch=replace(cfg.batch, clip=4, ssl=3, rec=2), parallel=ParallelConfig(shard=True))
    for _, _, second, *later in two_ranks(kept_on_rank, cfg, data * 2):
        assert later == [second] * 3


def raw_batches(cfg):
    tokenizer = get_tokenizer(context_length=cfg.model.text.context_length)
    return Loader(open_source(cfg.data), cfg.views, cfg.active_batch, tokenizer, patch_size=4)


def torchrun(*words, options=()):
    """vtp pretrain WORDS on two ranks, or the program behind `-c` with the other words."""
    if words[0] == "-c":
        program, words = ["--no-python", sys.executable, "-c"], words[1:]
    else:
        program, words = ["-m", "vtp", "pretrain"], words
    command = [*LAUNCHER, *options, *program, *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def same_weights(*runs):
    one, other = (load_file(run / "tokenizer/model.safetensors") for run in runs)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_torchrun_trains_and_a_rank_that_dies_changes_nothing(tiny, tmp_path, shard):
    """Straight through; then with one rank killed by -9 behind the first checkpoint, and restarted by torchrun."""
    (tmp_path / "tiny.yaml").write_text(config.dump(replace(tiny, parallel=ParallelConfig(shard=shard))))
    done = torchrun(str(tmp_path / "tiny.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prototypes: 16") == 1  # one rank prints
    run, killed = Path(tiny.out), tmp_path / "killed"
    assert records(run)[-1]["images"] == 6 * 2 * 8
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2

    done = torchrun("-c", DIES_ONCE, str(tmp_path / "tiny.yaml"), f"out={killed}", options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr and records(killed) == records(run)
    assert same_weights(run, killed)


@pytest.mark.slow
def test_a_rank_that_dies_on_one_of_two_hosts_changes_nothing(tiny, tmp_path):
    """Each host has a torchrun that counts restarts for itself; here both are this one."""
    (tmp_path / "tiny.yaml").write_text(config.dump(tiny))
    run, killed = Path(tiny.out), tmp_path / "killed"
    assert torchrun(str(tmp_path / "tiny.yaml")).returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    program = ["--max-restarts=3", "--no-python", sys.executable, "-c", DIES_ONCE, str(tmp_path / "tiny.yaml")]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program, f"out={killed}"]
    apart = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    hosts = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=apart, cwd=ROOT) for _ in range(2)]
    said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "resumed" in "".join(said) and "in vain" not in "".join(said)
    assert killed.with_suffix(".died").exists() and records(killed) == records(run)
    assert same_weights(run, killed)


DIES_ONCE = """
import os, signal, sys, time
from pathlib import Path
from vtp.cli import main
from vtp.engine import checkpoint
from vtp.pretrain.learner import PretrainLearner
step = PretrainLearner.step
def dying(self, batch, i):
    died = Path(self.cfg.out).with_suffix(".died")
    if i == 4 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        while not checkpoint.complete(Path(self.cfg.out) / "checkpoints"):
            time.sleep(0.01)  # it is written beside the steps
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, i)
PretrainLearner.step = dying
main(["pretrain", *sys.argv[1:]])
"""


def state_on(rank, cfg, folder, source, step):
    """Load a checkpoint on this many ranks, save it again there, give the whole state."""
    learner = PretrainLearner(cfg, torch.device("cpu"))
    tensors = learner.tensors()
    if source is not None:
        checkpoint.load(source, tensors)
    saver = checkpoint.Checkpoints(folder, keep=9)
    saver.save(step, tensors, {})
    saver.wait()
    return whole({**tensors["objectives"], **{f"{n}.m": m["exp_avg"] for n, m in tensors["optimizer"].items()}})


def test_a_checkpoint_goes_from_one_rank_to_two_and_back(setting, two_ranks, tmp_path):
    cfg, data = setting
    torch.manual_seed(0)
    learner = PretrainLearner(cfg, torch.device("cpu"))
    for step in (1, 2):
        learner.step(next(raw_batches(cfg)), step)
    saver = checkpoint.Checkpoints(tmp_path, keep=9)
    saver.save(1, learner.tensors(), {})
    saver.wait()
    sharded = replace(cfg, parallel=ParallelConfig(shard=True))
    on_two = two_ranks(state_on, sharded, tmp_path, tmp_path / "step_0000001", 2)[0]
    on_one = state_on(0, cfg, tmp_path, tmp_path / "step_0000002", 3)
    tensors = learner.tensors()
    before = {**tensors["objectives"], **{f"{n}.m": m["exp_avg"] for n, m in tensors["optimizer"].items()}}
    for name, x in before.items():
        assert torch.equal(x, on_two[name]) and torch.equal(x, on_one[name]), name


@pytest.mark.slow
def test_sigterm_to_one_rank_under_torchrun(tiny, tmp_path):
    """The ranks agree on a step, save, say how to go on, and all exit with 0: torchrun's is 0."""
    cfg = replace(tiny, steps=100_000, loop=replace(tiny.loop, save_every=5))
    (tmp_path / "tiny.yaml").write_text(config.dump(cfg))
    run = Path(tiny.out)
    process = subprocess.Popen(
        [*LAUNCHER, "-m", "vtp", "pretrain", str(tmp_path / "tiny.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 100
    while not checkpoint.complete(run / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    said = " ".join(process.communicate(timeout=60)[1].split())
    done = int(checkpoint.complete(run / "checkpoints")[-1].name.removeprefix("step_"))
    assert f"stopped at step {done} of 100000; the same command goes on from there" in said
    assert records(run)[-1]["step"] == done
    assert process.returncode == 0, said


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("ranks", "recompute"), [("one", False), ("one", True), ("ddp", False), ("fsdp", False), ("fsdp", True)]
)
def test_compiled_blocks_learn_the_same_and_compile_no_more_after_warming_up(tiny, tmp_path, ranks, recompute):
    """In processes of their own: here the shapes in annotations are checked, which torch.compile cannot trace.

    Captions come in three groups, whose lengths change from batch to batch.
    """
    compiled = replace(
        tiny,
        batch=replace(tiny.batch, clip=24),
        parallel=ParallelConfig(compile=True, shard=ranks == "fsdp", recompute=recompute),
    )
    (tmp_path / "tiny.yaml").write_text(config.dump(compiled))
    words = ["-c", COMPILED, "compiled", str(tmp_path / "tiny.yaml")]
    command = [sys.executable, *words] if ranks == "one" else [*LAUNCHER, "--no-python", sys.executable, *words]
    here = {
        **ENVIRONMENT,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # not what a killed run left half-written
    done = subprocess.run(command, capture_output=True, text=True, env=here, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr


COMPILED = """
import sys
from pathlib import Path
from tests.pretrain import test_parallel
from vtp import config, dist
from vtp.pretrain.config import PretrainConfig
with dist.group():
    getattr(test_parallel, sys.argv[1])(config.load(Path(sys.argv[2]), PretrainConfig()))
"""


@pytest.mark.slow
def test_no_kind_of_block_is_left_uncompiled(tiny, tmp_path):
    """Micro-batches, whose last is smaller, make more shapes than the compiler takes of one function by itself."""
    cfg = replace(
        tiny, batch=replace(tiny.batch, clip=16), parallel=ParallelConfig(compile=True, micro_batch=5), precision="fp32"
    )
    (tmp_path / "tiny.yaml").write_text(config.dump(cfg))
    command = [sys.executable, "-c", COMPILED, "variants", str(tmp_path / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=True)
    assert "recompile_limit" not in done.stderr and int(done.stdout.split()[-1]) > 8


def variants(cfg):
    """Three steps, traced by Dynamo but run by torch; the number of graphs."""
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile(module, backend="eager")
    learner = PretrainLearner(cfg, torch.device("cpu"))
    for i, batch in enumerate(batches(cfg, 3)):
        learner.learn(batch, i)
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(cfg):
    """Four steps compiled and plain have the same losses; four more batches compile nothing."""
    data = batches(cfg, 8)
    assert len({tuple(len(text[0]) for text in batch.clip.texts()) for batch in data[4:]}) > 1
    losses = []
    for each in (cfg, replace(cfg, parallel=replace(cfg.parallel, compile=False))):
        torch.manual_seed(0)
        learner = PretrainLearner(each, torch.device("cpu"))
        losses.append([float(learner.learn(batch, i)["total"]) for i, batch in enumerate(data[:4])])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i, batch in enumerate(data[4:]):
                learner.learn(batch, 4 + i)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    # fused, a rotation is rounded to bfloat16 once; plain, after each of its operations
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
