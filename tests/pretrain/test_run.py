"""Whole runs through the command line: published tokenizer, exact resume, and every mistake with one clear line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from vtp import config
from vtp.cli import main
from vtp.config import ConfigError
from vtp.engine import checkpoint
from vtp.engine.logging import MACHINE
from vtp.engine.loop import LoopConfig, NonFiniteError
from vtp.engine.optim import OptimConfig
from vtp.models.vtp_hf import VTPModel
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.learner import PretrainLearner
from vtp.pretrain.run import pretrain
from vtp.schedules import WarmupCosine

ROOT = Path(__file__).resolve().parents[2]


def science(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def picture(i, size=24):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def folder(path, n=40, captions=True):
    path.mkdir()
    rows = []
    for i in range(n):
        (path / f"{i}.jpg").write_bytes(picture(i))
        rows.append({"file_name": f"{i}.jpg"} | ({"text": f"picture number {i}"} if captions else {}))
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_another_network_does_not_resume_and_spoils_nothing(tiny, tmp_path):
    pretrain(replace(tiny, steps=3))
    run = Path(tiny.out)
    before = (run / "config.yaml").read_text()
    vision = replace(tiny.model.vision, depth=3)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this configuration .*blocks.2.*another out="):
        pretrain(replace(tiny, model=replace(tiny.model, vision=vision), resume="anyway"))
    assert (run / "config.yaml").read_text() == before
    pretrain(replace(tiny, steps=3))
    pretrain(replace(tiny, steps=4, resume="anyway"))
    assert "steps: 4" in (run / "config.yaml").read_text() and not list(run.glob(".config*"))


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_published_by_the_same_command(tiny, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("vtp.pretrain.run.publish", full)
        with pytest.raises(checkpoint.CheckpointError, match="could not be written .I/O error: No space"):
            pretrain(replace(tiny, steps=2))
    assert VTPModel.from_pretrained(pretrain(replace(tiny, steps=2))).config.vision_depth == 2


def test_a_tokenizer_is_replaced_by_a_whole_one_only(tiny, monkeypatch):
    folder = pretrain(tiny)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtp.models.vtp_hf.VTPImageProcessor.save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pretrain(replace(tiny, publish="teacher"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_run_publishes_a_tokenizer_and_resumes_bit_for_bit(tiny, tmp_path):
    published = pretrain(tiny)
    model = VTPModel.from_pretrained(published)
    image = AutoImageProcessor.from_pretrained(published)([Image.new("RGB", (30, 20), "red")] * 2)["pixel_values"]
    assert model.get_latents_decoded_images(model.get_reconstruction_latents(image)).shape == image.shape
    run = published.parent
    saved = config.load(run / "config.yaml", type(tiny)())
    assert replace(saved, out=tiny.out) == tiny
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] in torch.__version__

    again = replace(tiny, out=str(tmp_path / "again"))
    pretrain(again)
    weights = load_file(published / "model.safetensors")
    repeated = load_file(tmp_path / "again/tokenizer/model.safetensors")
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)  # the seed repeats a run

    (run / "checkpoints" / "step_0000006" / "progress.json").unlink()  # as if killed after step 3
    (published / "model.safetensors").unlink()
    before = science(run)
    pretrain(tiny)
    resumed = load_file(published / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert science(run)[-1] == before[-1]


def test_another_seed_and_worker_processes(tiny, tmp_path):
    cfg = replace(tiny, steps=3, seed=1, workers=2)
    pretrain(cfg)
    other = replace(tiny, steps=3, out=str(tmp_path / "other"), workers=2)
    pretrain(other)
    assert science(tmp_path / "run")[-1]["total"] != science(tmp_path / "other")[-1]["total"]


def test_reads_a_folder_with_captions_and_reports_what_it_left_out(tiny, tmp_path):
    data = folder(tmp_path / "data")
    (data / "7.jpg").write_bytes(picture(7)[:100])
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"key": "1", "text": "one"}')
    pretrain(replace(tiny, data=str(data), annotations=str(notes), steps=12))
    told = json.loads((tmp_path / "run/data.json").read_text())
    assert sum(told["broken"].values()) >= 1 and told["kept"].keys() == {"not in annotations"}


def test_an_interrupted_run_reports_what_it_left_out_as_well(tiny, tmp_path, monkeypatch):
    data = folder(tmp_path / "photos")
    for i in range(10):
        (data / f"{i}.jpg").write_bytes(b"broken")
    step = PretrainLearner.step

    def interrupted(learner, batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(learner, batch, number)

    monkeypatch.setattr(PretrainLearner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(replace(tiny, data=str(data)))
    first = json.loads((tmp_path / "run/data.json").read_text())["broken"]["not an image"]
    monkeypatch.setattr(PretrainLearner, "step", step)
    pretrain(replace(tiny, data=str(data)))  # and what a resumed run leaves out is added
    assert json.loads((tmp_path / "run/data.json").read_text())["broken"]["not an image"] > first > 0


def test_reads_a_truncated_shard_to_its_break(tiny, tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for i in range(30):
            for suffix, content in (("jpg", picture(i)), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shard = tmp_path / "s.tar"
    shard.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * 0.8)])
    pretrain(replace(tiny, data=str(shard), steps=3))
    assert json.loads((tmp_path / "run/data.json").read_text())["broken"]


def test_nan_stops_the_run_with_the_last_good_checkpoint(tiny):
    optim = OptimConfig(lr=WarmupCosine(peak=1e38, warmup=0.0), clip_grad=0.0)
    with pytest.raises(NonFiniteError, match="not finite in 6 steps in a row before step 7; no checkpoint"):
        pretrain(replace(tiny, steps=60, optim=optim))


def test_caption_missing(tiny, tmp_path):
    data = folder(tmp_path / "data", captions=False)
    with pytest.raises(ConfigError, match="no captions"):
        pretrain(replace(tiny, data=str(data)))


def wrong(capsys, *words, command="pretrain"):
    with pytest.raises(SystemExit) as stopped:
        main([command, *words])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("vtp: ") and "\n" not in message
    return message


def test_mistakes_are_one_line_each(tmp_path, capsys):
    out = f"out={tmp_path / 'x'}"
    assert "did you mean 'model.vision.depth'?" in wrong(capsys, "quickstart", out, "model.vision.depht=3")
    assert "did you mean 'steps'?" in wrong(capsys, "quickstart", out, "stepps=3")
    assert "did you mean 'quickstart'" in wrong(capsys, "quikstart", out)
    assert str(tmp_path / "nowhere") in wrong(capsys, "cpu", out, f"data={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in wrong(capsys, "cpu", out, f"data={tmp_path / 'empty'}")
    odd = wrong(capsys, "quickstart", out, "views.size=30", "model.image_size=30")
    assert "views.size=30" in odd and "multiple" in odd
    assert "no configuration file" in wrong(capsys, str(tmp_path / "none.yaml"))
    assert not (tmp_path / "x").exists()  # nothing was begun


@pytest.mark.parametrize(
    "data", ["{}/data", "~/data", "scenes::{}/data@3", "{}/tars/*.tar", "{}/tars/0.tar", "hf:{}/data"]
)
@pytest.mark.parametrize("out", ["link/data", "new/../link/data", "~/link/data"])
def test_a_run_does_not_write_among_its_data(data, out, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data")
    if "tars" in data:
        (tmp_path / "tars").mkdir()
        with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
            for file in sorted((tmp_path / "data").iterdir()):
                tar.add(file, file.name)
    (tmp_path / "link").symlink_to(tmp_path)

    def files():
        return sorted(p for p in tmp_path.rglob("*") if ".cache" not in p.parts)  # of datasets

    out = out.replace("data", "tars") if "tars" in data else out
    out += "/run" if "hf:" in data else ""  # which datasets would read, too
    there = files()
    data = f"data={data.format(tmp_path)}"
    for said in (wrong(capsys, "cpu", data, f"out={out}"), wrong(capsys, "cpu", data, "--out", out, command="profile")):
        assert "is where data are; name a folder for the run alone" in said
    assert files() == there


def test_a_run_folder_of_another_configuration_is_refused(tiny):
    pretrain(replace(tiny, steps=3))
    with pytest.raises(ConfigError, match="seed: 0 -> 5"):
        pretrain(replace(tiny, steps=3, seed=5))


def test_a_run_that_never_began_does_not_stand_in_the_way(tiny, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        pretrain(replace(tiny, perceptual=str(tmp_path / "gone.pt2")))
    assert pretrain(tiny).is_dir()


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(tmp_path, capsys):
    main(["pretrain", "base_clip_ae", f"out={tmp_path / 'x'}", "--dry-run", "batch.clip=64"])
    printed = capsys.readouterr().out
    assert "embed_dim: 768" in printed and "clip: 64" in printed and "ssl: 0.0" in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_mostly_broken_data_is_one_line(workers, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.jpg").write_bytes(picture(i) if i < 10 else b"not a picture")
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": f"number {i}"}) for i in range(60)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    words = [f"data={folder}", f"out={tmp_path / 'run'}", f"workers={workers}", "batch.clip=16", "batch.ssl=4"]
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "cpu", "batch.rec=4", "steps=50", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(r"vtp: .*broken: \d+ of \d+ samples cannot be used .*mend the data\n$", error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("weights.clip=-1", "weights.clip=-1.0 must be at least 0"),
        ("loop.log_every=0", "loop.log_every=0 must be at least 1"),
        ("weights={clip: 0, ssl: 0, rec: 0}", "weights.clip, weights.ssl and weights.rec are all 0"),
        ("batch.ssl=1", "batch.ssl=1 leaves koleo no neighbour"),
        ("batch.clip=1", "batch.clip=1 leaves a pair nothing"),
        ("model.train_clip=false", "model.train_clip=false is for weights.clip to decide; set weights.clip=0"),
        ("model.train_reconstruction=false", "model.train_reconstruction=false is for weights.rec to decide"),
        ("steps=100000000000000000000000000000", "must be at least 1 and at most 1e+10"),
        ("weights.clip=nan", "weights.clip=nan is not a finite number"),
        ("model.init_logit_scale=inf", "model.init_logit_scale=inf is not a finite number"),
        ("distil.prototypes=1", "distil.prototypes=1 must be at least 2"),
        ("distil.head_layers=0", "distil.head_layers=0 must be at least 1"),
        ("distil.student_temp=0", "distil.student_temp=0.0 must be above 0"),
        ("distil.momentum.end=1.5", "distil.momentum.end=1.5 must be at least 0 and at most 1"),
        ("drop_path.clip=1", "drop_path.clip=1.0 must be at least 0 and below 1"),
        ("optim.betas=[0.9,1.5]", "optim.betas=[0.9, 1.5] must be at least 0 and below 1"),
        ("optim.eps=0", "optim.eps=0.0 must be above 0"),
        ("optim.lr.peak=-1", "optim.lr.peak=-1.0 must be at least 0"),
        ("model.text.context_length=1", "model.text.context_length=1 must be at least 2"),
        ("model.text.vocab_size=10", "model.text.vocab_size=10 must be at least 49408"),
        ("views.mask_probability=0", "masks none of"),
        ("workers=-1", "workers=-1 must be at least 0 and at most 1024"),
        ("workers=100000", "workers=100000 must be at least 0 and at most 1024"),
        ("device=meta", "device=meta cannot be used"),
        ("device=tpu", "device=tpu cannot be used"),
    ],
)
def test_values_that_cannot_work_are_refused(word, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "cpu", "data=scenes", f"out={tmp_path / 'run'}", word])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_teachers_trunk_can_be_published_instead(tiny, tmp_path):
    """Of the same run: whose trunk is published changes nothing that is learned, and may be changed afterwards."""
    student = load_file(pretrain(tiny) / "model.safetensors")
    teacher = load_file(pretrain(replace(tiny, publish="teacher")) / "model.safetensors")
    different = {name for name in student if not torch.equal(student[name], teacher[name])}
    assert different and all(name.startswith("trunk.") for name in different)
    saved = load_state(tmp_path / "run/checkpoints/step_0000006", tiny)
    assert all(torch.equal(teacher[name], saved[f"teacher.{name}"]) for name in different)
    with pytest.raises(ConfigError, match="publish=teacher, but weights.ssl=0"):
        replace(tiny, publish="teacher", weights=replace(tiny.weights, ssl=0.0))


def load_state(checkpoint_folder, cfg):
    tensors = PretrainLearner(cfg, torch.device("cpu")).tensors()
    checkpoint.load(checkpoint_folder, tensors)
    return tensors["objectives"]


def test_forty_steps_are_seventeen_a_kill_and_twenty_three(tiny, tmp_path):
    """The joint model, all objectives, `kill -9` in step 18: the same losses and weights, bit for bit."""
    loop = LoopConfig(log_every=1, save_every=17)
    whole = replace(tiny, steps=40, loop=loop)
    straight = pretrain(whole)
    parts = replace(whole, out=str(tmp_path / "parts"))
    (tmp_path / "parts.yaml").write_text(config.dump(parts))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DIES, str(tmp_path / "parts.yaml")]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoint.complete(tmp_path / "parts/checkpoints")] == ["step_0000017"]
    resumed = pretrain(parts)
    assert science(tmp_path / "parts") == science(tmp_path / "run") and len(science(tmp_path / "run")) == 40
    weights, again = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    states = [load_state(tmp_path / run / "checkpoints/step_0000040", tiny) for run in ("run", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # the teacher as well


DIES = """
import os, signal, sys, time
from pathlib import Path
from vtp.cli import main
from vtp.engine import checkpoint
from vtp.pretrain.objectives import Pretraining
follow, steps = Pretraining.follow, []
def dying(self, momentum):
    steps.append(momentum)
    if len(steps) == 18:  # the optimiser has moved, the teacher has not
        while not checkpoint.complete(Path(self.cfg.out) / "checkpoints"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    follow(self, momentum)
Pretraining.follow = dying
main(["pretrain", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_run_and_its_workers_ends_it_behind_a_saved_step(tiny, tmp_path, sent, code):
    """As `scancel`, torchrun and a terminal send it: to all processes at once."""
    cfg = replace(tiny, workers=2, steps=100_000, loop=LoopConfig(log_every=1, save_every=5))
    (tmp_path / "tiny.yaml").write_text(config.dump(cfg))
    process = subprocess.Popen(
        # A shell's background jobs are deaf to SIGINT.
        [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
         "from vtp.cli import main; main(sys.argv[1:])", "pretrain", str(tmp_path / "tiny.yaml")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    folder, deadline = tmp_path / "run/checkpoints", time.monotonic() + 100
    while not checkpoint.complete(folder):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, sent)
    said = " ".join(process.communicate(timeout=60)[1].split())
    done = int(checkpoint.complete(folder)[-1].name.removeprefix("step_"))
    assert f"stopped at step {done} of 100000; the same command goes on from there" in said
    assert process.returncode == code and science(tmp_path / "run")[-1]["step"] == done, said


def test_a_run_writes_down_the_precision_that_it_took(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr("vtp.pretrain.run.pick_precision", lambda asked, device: "fp32")
    cfg = replace(tiny, precision="auto", steps=1, out=str(tmp_path / "run"))
    pretrain(cfg)
    assert config.load(tmp_path / "run" / "config.yaml", PretrainConfig()).precision == "fp32"
