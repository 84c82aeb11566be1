"""The loop with a learner of two numbers: resume, faults, records."""

import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from vtp import config
from vtp.config import ConfigError
from vtp.engine import checkpoint
from vtp.engine.logging import MACHINE, MetricsLog, say
from vtp.engine.loop import CONFIG, NEW_CONFIG, LoopConfig, NonFiniteError, open_run, train
from vtp.engine.optim import OptimConfig, adamw, optimizer_tensors, set_schedule, update


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "x"
    width: int = 4
    workers: int = 0
    resume: str = "auto"


class Counting:
    """Batches 0, 1, 2, ... with a position."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        while True:
            self.taken += 1
            yield torch.tensor(float(self.taken - 1))

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Line:
    """Fits w x + noise; the noise comes from the step's seed, so a wrong seed shows in the weights."""

    images_per_step = 3

    def __init__(self, poison_at=(), kill_at=None):
        torch.manual_seed(7)
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = adamw(self.model.named_parameters(), OptimConfig())
        self.poison_at, self.kill_at = poison_at, kill_at
        self.seen = []

    def step(self, batch, step):
        self.seen.append(float(batch))
        set_schedule(self.optimizer, OptimConfig(), step, 20)
        loss = (self.model(torch.randn(3, 4)) - batch / 10).square().mean()
        if step in self.poison_at:
            loss = loss * float("nan")
        loss.backward()
        norm = update(self.optimizer, list(self.model.parameters()), 1.0)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"total": loss.detach(), "grad_norm": norm}

    def tensors(self):
        return {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.optimizer, self.params())}

    def params(self):
        return self.model.named_parameters()


LOOP = LoopConfig(log_every=2, save_every=5, keep=2)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def science(path):
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines(path)]


def test_a_stopped_and_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    straight = Line()
    train(straight, Counting(), 20, 0, LOOP, tmp_path / "straight", "t")
    with pytest.raises(SystemExit) as stopped:
        train(Line(kill_at=12), Counting(), 20, 0, LOOP, tmp_path / "parts", "t")
    assert stopped.value.code == 0
    assert checkpoint.complete(tmp_path / "parts/checkpoints")[-1].name == "step_0000013"
    resumed = Line()
    train(resumed, Counting(), 20, 0, LOOP, tmp_path / "parts", "t")
    assert resumed.seen == [float(i) for i in range(13, 20)]
    assert torch.equal(straight.model.weight, resumed.model.weight)
    last = science(tmp_path / "parts")[-1]
    assert last == science(tmp_path / "straight")[-1]
    assert last["step"] == 20 and last["images"] == 60


def test_images_are_counted_over_a_change_of_their_number(tmp_path):
    loop = replace(LOOP, log_every=5)
    train(Line(), Counting(), 10, 0, loop, tmp_path, "t")
    more = Line()
    more.images_per_step *= 2
    train(more, Counting(), 20, 0, loop, tmp_path, "t")
    each = Line.images_per_step
    assert [line["images"] for line in lines(tmp_path)[-2:]] == [10 * each + 5 * 2 * each, 10 * each + 10 * 2 * each]


def test_a_run_without_a_terminal_says_its_steps(tmp_path, capsys):
    train(Line(), Counting(), 20, 0, replace(LOOP, log_every=5), tmp_path, "a run")
    said = [line for line in capsys.readouterr().err.splitlines() if " step " in line]
    assert [line.split("  ")[:2] for line in said] == [["a run", f"step {i} of 20"] for i in range(5, 21, 5)]
    assert all(re.fullmatch(r"loss [\d.]+  \d+ images/s  \d:\d\d:\d\d left", line.split("  ", 2)[2]) for line in said)


def test_a_run_is_not_taken_back(tmp_path):
    train(Line(), Counting(), 5, 0, LOOP, tmp_path, "t")
    with pytest.raises(ConfigError, match="step_0000005 is beyond steps=4"):
        train(Line(), Counting(), 4, 0, LOOP, tmp_path, "t")


def test_a_folder_is_trained_in_by_one_process(tmp_path):
    """The lock goes with its process, killed or not, though its children live on."""
    holds = """
import os, sys, time
from vtp.engine.loop import open_run
from tests.engine.test_loop import Config
with open_run(Config(out=sys.argv[1]), "tokenizer"):
    if os.fork() == 0:
        time.sleep(60)
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", holds, tmp_path], stdout=subprocess.PIPE, process_group=0) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"another process trains in {tmp_path}"):
            opened(Config(out=str(tmp_path), width=8))
        assert "width: 4" in (tmp_path / NEW_CONFIG).read_text()
        other.kill()
        other.wait()
        opened(Config(out=str(tmp_path)))
        os.killpg(other.pid, signal.SIGKILL)


def test_a_checkpoint_without_the_part_of_a_rank_is_none(tmp_path, monkeypatch):
    checked = checkpoint._check_parts

    def on_another_disk(partial):
        next(partial.glob("*.distcp")).rename(tmp_path / "elsewhere")
        checked(partial)

    monkeypatch.setattr(checkpoint, "_check_parts", on_another_disk)
    with pytest.raises(checkpoint.CheckpointError, match="__0_0.distcp, of another rank, is not in .*; there is none"):
        train(Line(), Counting(), 5, 0, LOOP, tmp_path, "t")
    assert checkpoint.complete(tmp_path / "checkpoints") == []


def test_a_second_sigterm_does_not_end_the_last_save(tmp_path, monkeypatch):
    waits, reached = checkpoint.Checkpoints.wait, []

    def wait(self):
        os.kill(os.getpid(), signal.SIGTERM)
        waits(self)

    before = signal.signal(signal.SIGTERM, lambda *_: reached.append("the process"))
    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    try:
        with pytest.raises(SystemExit) as stopped:
            train(Line(kill_at=3), Counting(), 20, 0, LOOP, tmp_path, "t")
        os.kill(os.getpid(), signal.SIGTERM)  # what a stopped run has yet to do is not ended either
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 0 and not reached
    assert checkpoint.complete(tmp_path / "checkpoints")[-1].name == "step_0000004"


def test_a_stop_in_the_last_step_leaves_signals_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(Line(kill_at=4), Counting(), 5, 0, LOOP, tmp_path, "t")
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_seed_is_another_run(tmp_path):
    a, b = Line(), Line()
    train(a, Counting(), 6, 0, LOOP, tmp_path / "a", "t")
    train(b, Counting(), 6, 1, LOOP, tmp_path / "b", "t")
    assert not torch.equal(a.model.weight, b.model.weight)


def test_one_nan_is_skipped_and_counted(tmp_path):
    """The step leaves no trace: not in the weights, not in the moments, not in the means of the record."""
    learner = Line(poison_at=[6])
    train(learner, Counting(), 7, 0, LOOP, tmp_path, "t")
    clean = Line()
    train(clean, Counting(), 6, 0, LOOP, tmp_path / "clean", "t")
    assert torch.equal(learner.model.weight, clean.model.weight)
    for p, q in zip(learner.model.parameters(), clean.model.parameters(), strict=True):
        for name, moment in learner.optimizer.state[p].items():
            assert torch.equal(moment, clean.optimizer.state[q][name])
    train(learner, Counting(), 10, 0, LOOP, tmp_path, "t")
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 0, 0, 1, 1, 1]
    assert [line["step"] for line in lines(tmp_path) if line["total"] is None] == [7]
    assert all(math.isfinite(line["total"]) for line in lines(tmp_path) if line["step"] != 7)


def test_many_nans_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="total, grad_norm not finite in 3 steps in a row.*step_0000005"):
        train(Line(poison_at=range(6, 20)), Counting(), 20, 0, replace(LOOP, max_skipped=2), tmp_path, "t")
    assert lines(tmp_path)[-1]["skipped"] == 3 and lines(tmp_path)[-1]["total"] is None  # what stopped it is on record
    kept = checkpoint.complete(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step_0000005"]
    learner = Line()
    checkpoint.load(kept[-1], learner.tensors())
    assert learner.model.weight.isfinite().all()


def test_a_reading_that_is_not_finite_is_no_step_without_an_update(tmp_path):
    class Blind(Line):
        def step(self, batch, step):
            return super().step(batch, step) | {"reading": torch.tensor(float("nan" if step >= 3 else 1))}

    train(Blind(), Counting(), 10, 0, replace(LOOP, max_skipped=2), tmp_path / "blind", "t")
    train(Line(), Counting(), 10, 0, replace(LOOP, max_skipped=2), tmp_path / "sighted", "t")
    blind, sighted = lines(tmp_path / "blind"), lines(tmp_path / "sighted")
    assert {line["step"]: line["reading"] for line in blind} == {2: 1, 4: None, 5: None, 6: None, 8: None, 10: None}
    assert [(line["skipped"], line["total"]) for line in blind] == [(0, line["total"]) for line in sighted]


@pytest.mark.parametrize("spoiled_at", [7, 19])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, spoiled_at):
    class Spoiled(Line):
        def step(self, batch, step):
            values = super().step(batch, step)  # losses are finite, and become NaN only in the next step
            if step == spoiled_at:
                self.model.weight.data[0, 0] = float("inf")
            return values

    with pytest.raises(NonFiniteError, match=r"model\.weight.* not finite (after|in)") as error:
        train(Spoiled(), Counting(), 20, 0, replace(LOOP, max_skipped=99), tmp_path, "t")
    kept = checkpoint.complete(tmp_path / "checkpoints")
    assert f"the last good checkpoint is {kept[-1]}" in str(error.value)
    learner = Line()
    checkpoint.load(kept[-1], learner.tensors())
    assert learner.model.weight.isfinite().all()


def test_every_kth_checkpoint_stays(tmp_path):
    train(Line(), Counting(), 8, 0, replace(LOOP, save_every=2, keep=1, keep_every=8), tmp_path, "t")
    copies = [tmp_path / "checkpoints" / name for name in ("step_0000006.bak", "step_best")]
    for copy in copies:  # a user's own
        shutil.copytree(tmp_path / "checkpoints/step_0000008", copy)
    train(Line(), Counting(), 20, 0, replace(LOOP, save_every=2, keep=1, keep_every=8), tmp_path, "t")
    assert all(copy.is_dir() for copy in copies)
    names = [path.name for path in checkpoint.complete(tmp_path / "checkpoints")]
    assert names == ["step_0000008", "step_0000016", "step_0000020"]


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, capsys):
    train(Line(), Counting(), 10, 0, LOOP, tmp_path, "t")
    straight = science(tmp_path)
    newest = tmp_path / "checkpoints/step_0000010"
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    shard.write_bytes(content)
    again = Line()
    train(again, Counting(), 10, 0, LOOP, tmp_path, "t")
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in said and "has changed" in said and "resumed" in said
    assert again.seen == [5.0, 6.0, 7.0, 8.0, 9.0] and science(tmp_path) == straight
    for path in checkpoint.complete(tmp_path / "checkpoints"):
        (path / "progress.json").write_text("{}")
    for _ in range(2):  # the second try does not begin anew either
        with pytest.raises(checkpoint.CheckpointError, match="all checkpoints in .* are damaged"):
            train(Line(), Counting(), 10, 0, LOOP, tmp_path, "t")
    assert science(tmp_path) == straight


def test_a_finished_run_does_nothing_more(tmp_path):
    train(Line(), Counting(), 6, 0, LOOP, tmp_path, "t")
    before = lines(tmp_path)
    again = Line()
    train(again, Counting(), 6, 0, LOOP, tmp_path, "t")
    assert again.seen == [] and lines(tmp_path) == before


def test_old_checkpoints_go_and_half_written_ones_and_copies_are_not_seen(tmp_path):
    train(Line(), Counting(), 20, 0, LOOP, tmp_path, "t")
    folder = tmp_path / "checkpoints"
    for other in ("step_best", ".step_0000099.partial", "damaged_step_0000099"):
        (folder / other).mkdir()
    assert [path.name for path in checkpoint.complete(folder)] == ["step_0000015", "step_0000020"]


def test_a_checkpoint_without_a_manifest_is_damaged_and_no_run_begins_anew_over_it(tmp_path, capsys):
    train(Line(), Counting(), 10, 0, LOOP, tmp_path, "t")
    straight = science(tmp_path)
    older, newer = checkpoint.complete(tmp_path / "checkpoints")
    (newer / checkpoint.MANIFEST).unlink()
    again = Line()
    train(again, Counting(), 10, 0, LOOP, tmp_path, "t")
    assert "is damaged (manifest.json: No such file" in " ".join(capsys.readouterr().err.split())
    assert again.seen == [5.0, 6.0, 7.0, 8.0, 9.0] and science(tmp_path) == straight
    for path in checkpoint.complete(tmp_path / "checkpoints"):
        (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="all checkpoints in .* are damaged"):
        train(Line(), Counting(), 10, 0, LOOP, tmp_path, "t")
    assert science(tmp_path) == straight


def test_a_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(tmp_path, monkeypatch, capsys):
    kept = ["step_0000005", ".step_0000001.partial"]
    (tmp_path / "checkpoints" / kept[1]).mkdir(parents=True)

    def refusing(path, remove=shutil.rmtree, **options):
        if Path(path).name in kept and Path(path).exists():
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    train(Line(), Counting(), 20, 0, LOOP, tmp_path, "t")
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"{name} is not needed and could not be removed (Permission denied)" in said for name in kept)
    assert checkpoint.complete(tmp_path / "checkpoints")[-1].name == "step_0000020"


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (9_999_998, 10_000_000, 2):
        (tmp_path / f"step_{step:07d}").mkdir()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_0000002", "step_9999998", "step_10000000"]


@pytest.mark.parametrize("manifest", ["[]", "3", '{"sha256": ["a"]}', '{"sha256": {}}', "{}", "not JSON"])
def test_a_manifest_of_another_shape_is_damage(tmp_path, manifest):
    (tmp_path / "step_0000001").mkdir()
    (tmp_path / "step_0000001" / checkpoint.MANIFEST).write_text(manifest)
    with pytest.raises(checkpoint.CheckpointError, match="all checkpoints in .* are damaged"):
        checkpoint.newest(tmp_path)


def test_a_manifest_that_names_not_all_tensors_is_damage(tmp_path, capsys):
    train(Line(), Counting(), 20, 0, LOOP, tmp_path, "t")
    *_, older, newer = checkpoint.complete(tmp_path / "checkpoints")
    manifest = json.loads((newer / checkpoint.MANIFEST).read_text())
    (newer / "__0_0.distcp").unlink()
    del manifest["sha256"]["__0_0.distcp"]
    (newer / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.newest(tmp_path / "checkpoints") == older
    assert "does not name all files" in " ".join(capsys.readouterr().err.split())


def test_lines_keep_brackets_and_length(capsys):
    line = "published " + "a_long_folder/" * 10 + "x[red]y/tokenizer"
    say(line)
    assert capsys.readouterr().err == line + "\n"


def test_metrics_after_the_checkpoint_are_dropped_and_a_cut_line_is_tolerated(tmp_path):
    with pytest.raises(SystemExit):
        train(Line(kill_at=7), Counting(), 20, 0, LOOP, tmp_path, "t")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "total": 1}\n{"loss": 1}\n[3]\n7\n{"step": 10')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    train(Line(), Counting(), 20, 0, LOOP, tmp_path, "t")
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def opened(cfg, resume="auto", ignore=()):
    with open_run(replace(cfg, resume=resume), "tokenizer", ignore) as out:
        (out / NEW_CONFIG).replace(out / CONFIG)  # as `train` does
        return out


def test_a_run_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "notes").write_text("in the way")
    with pytest.raises(ConfigError, match="out=.*notes is a file; name a folder"):
        opened(Config(out=str(tmp_path / "notes")))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="out=.*link is a link that leads nowhere; name a folder"):
        opened(Config(out=str(tmp_path / "link")))


@pytest.mark.parametrize("resume", ["auto", "never", "anyway"])
def test_what_a_run_has_published_is_not_replaced_by_one_that_begins_anew(tmp_path, resume):
    (tmp_path / "checkpoints/step_best").mkdir(parents=True)  # somebody's copy; the others were deleted to make room
    (tmp_path / "tokenizer").mkdir()
    message = "already holds a run" if resume == "never" else "tokenizer is there, but no checkpoint to go on from"
    with pytest.raises(ConfigError, match=message):
        opened(Config(out=str(tmp_path)), resume)


def on_a_disk_of_its_own(rank, folder, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtp.engine.loop.SIGHT", 0.3)
        try:
            with open_run(Config(out=str(folder / f"{name}{rank}/run")), "tokenizer") as out:
                return out
        except ConfigError as error:
            return str(error)


def test_a_run_folder_that_not_all_hosts_see_is_refused(tmp_path, two_ranks):
    for rank in range(2):  # what runs leave that are killed while they wait, the hosts numbered otherwise
        left = tmp_path / f"left{rank}/run"
        left.mkdir(parents=True)
        (left / NEW_CONFIG).touch()
        (left / ".seen_0123456789abcdef").touch()
    for name in ("host", "left"):
        for rank, said in enumerate(two_ranks(on_a_disk_of_its_own, tmp_path, name)):
            assert f"{name}{rank}/run is not one folder: rank 1 on " in said
            assert f" has a {tmp_path}/{name}1/run of its own; name one that all hosts and ranks share" in said
        assert [path.name for path in (tmp_path / f"{name}0/run").glob(".seen_*")] == []
    (tmp_path / "host1").symlink_to(tmp_path / "host0")  # where nothing was made
    assert two_ranks(on_a_disk_of_its_own, tmp_path, "host") == [tmp_path / "host0/run", tmp_path / "host1/run"]


def test_a_run_folder_refuses_another_configuration_unless_told(tmp_path, capsys):
    cfg = Config(out=str(tmp_path / "run"))
    opened(cfg)
    opened(Config(out=cfg.out, width=8), "auto")  # nothing was learned yet
    (tmp_path / "run/checkpoints/.step_0000001.partial").mkdir(parents=True)  # killed in the first save
    opened(cfg, "never")
    (tmp_path / "run/checkpoints/step_0000001").mkdir(parents=True)
    opened(Config(out=cfg.out, workers=3), ignore=("workers",))
    with pytest.raises(ConfigError, match="another configuration .width: 4 -> 8."):
        opened(Config(out=cfg.out, width=8), ignore=("workers",))
    opened(Config(out=cfg.out, width=8, workers=3), "anyway", ignore=("workers",))
    assert "resume: auto" in (tmp_path / "run" / CONFIG).read_text()  # anyway is not for the times to come
    said = capsys.readouterr().err
    assert "width: 4 -> 8" in said and "workers: 0 -> 3" in said
    cfg = Config(out=cfg.out, width=8)
    with pytest.raises(ConfigError, match="already holds a run"):
        opened(cfg, "never")
    with pytest.raises(ZeroDivisionError), open_run(Config(out=cfg.out, width=9, resume="anyway"), "tokenizer") as out:
        raise ZeroDivisionError  # before `train` has loaded a checkpoint
    assert "width: 8" in (out / CONFIG).read_text() and not (out / NEW_CONFIG).exists()
    for spoil, reason in (
        (lambda: (out / CONFIG).write_bytes(b"width: [\xff"), "is not valid YAML"),
        (lambda: (out / CONFIG).write_text("breadth: 8"), "unknown key 'breadth'"),
        (lambda: (out / CONFIG).write_text(""), "is empty"),
        (lambda: (out / CONFIG).unlink(), "no configuration file at"),
    ):
        spoil()
        with pytest.raises(ConfigError, match=f"holds checkpoints, .* is not known .*{reason}.* put config.yaml back"):
            opened(cfg)
        opened(cfg, "anyway")
        assert reason in capsys.readouterr().err and config.load(out / CONFIG, Config()).width == 8


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


def test_tensorboard_holds_what_the_record_holds(tmp_path):
    pytest.importorskip("tensorboard")
    train(Line(), Counting(), 4, 0, LoopConfig(log_every=2, save_every=4, tensorboard=True), tmp_path, "t")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in board.Scalars("total")]
    recorded = [(line["step"], line["total"]) for line in lines(tmp_path)]
    assert [s for s, _ in written] == [s for s, _ in recorded]
    torch.testing.assert_close(torch.tensor([v for _, v in written]), torch.tensor([v for _, v in recorded]))


@pytest.mark.slow
def test_weights_and_biases_is_told_what_the_record_holds(tmp_path, monkeypatch):
    """Offline, and one run of theirs for one folder of ours, also after a resume."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loop = LoopConfig(log_every=2, save_every=4, wandb=True)
    for steps in (4, 6):
        train(Line(), Counting(), steps, 0, loop, tmp_path, "t")
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{(tmp_path / 'wandb_id.txt').read_text()}.wandb"}
    told = b"".join(file.read_bytes() for file in files)
    assert all(repr(line["total"]).encode() in told for line in lines(tmp_path))


def test_what_a_line_says_of_the_machine(tmp_path):
    class Slow(Counting):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    class Known(Line):
        def step(self, batch, step):
            time.sleep(0.02)
            return {**super().step(batch, step), "ideal_seconds": 0.01}

    train(Known(), Slow(), 6, 0, LoopConfig(log_every=3, save_every=6), tmp_path, "t")
    for line in lines(tmp_path):
        assert 0.2 < line["data_wait"] < 0.7  # of 20 ms each, and what else a step takes
        assert 0.01 / 0.2 < line["utilisation"] < 0.01 / 0.04
        assert 0.05 < line["memory_gb"] < 100
        assert "ideal_seconds" not in line


def test_a_reader_that_is_missing_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"loop.wandb=true needs .*pip install 'vtp\[wandb\]'"):
        train(Line(), Counting(), 1, 0, LoopConfig(wandb=True), tmp_path, "t")


def test_a_key_that_is_missing_is_one_clear_error(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match="loop.wandb=true: No API key configured.*or set WANDB_MODE=offline"):
        train(Line(), Counting(), 1, 0, LoopConfig(wandb=True), tmp_path, "t")


def test_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    log, opened, full = MetricsLog(tmp_path, 0), Path.open, True

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def write(self, text):
            self.file.write(text[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *_):
            self.file.close()

    def refuse(self, *args, **options):
        file = opened(self, *args, **options)
        return Full(file) if full else file

    monkeypatch.setattr(Path, "open", refuse)
    for step in (1, 2, 3):
        log.write(step, {"total": 1.0})
        log._written.result()
    full = False
    log.write(4, {"total": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert " ".join(capsys.readouterr().err.split()).count("waits until there is room") == 1


def test_a_record_that_cannot_be_written_stops_the_run(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.path.unlink()
    log.path.mkdir()  # as a folder taken away
    log.write(1, {"total": 1.0})
    with pytest.raises(OSError):
        log.write(2, {"total": 1.0})
    log.close()


def test_a_disk_that_is_full_when_a_run_begins_is_an_error_that_names_the_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="too large: .*config.yaml"), open_run(Config(out=str(tmp_path)), "tokenizer"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_is_full_when_a_run_resumes_keeps_its_record(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 200):
        log.write(step, {"total": 1.0})
    log.close()
    before = log.path.read_text()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError):
            MetricsLog(tmp_path, 150)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert log.path.read_text() == before
    MetricsLog(tmp_path, 150).close()
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 151)]
