"""The loop with a learner of two numbers: resume, faults, records."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vtp.config import ConfigError
from vtp.engine import checkpoint
from vtp.engine.logging import MACHINE
from vtp.engine.loop import LoopConfig, NonFiniteError, train
from vtp.engine.optim import OptimConfig, adamw, optimizer_tensors, set_schedule, update


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


def test_a_checkpoint_that_falls_on_a_skipped_step_follows_at_the_next_finite_one(tmp_path, capsys):
    train(Line(poison_at=[4, 5, 9]), Counting(), 10, 0, LOOP, tmp_path, "t")
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step_0000007", "step_0000010"]
    straight, said = science(tmp_path), " ".join(capsys.readouterr().err.split())
    assert "2 skipped" in said and "3 of 10 steps learned nothing" in said and "the last 1 in a row" in said
    shutil.rmtree(tmp_path / "checkpoints/step_0000010")
    again = Line(poison_at=[4, 5, 9])
    train(again, Counting(), 10, 0, LOOP, tmp_path, "t")
    assert again.seen == [7.0, 8.0, 9.0] and science(tmp_path) == straight


def test_a_streak_of_skipped_steps_goes_on_over_a_stop(tmp_path):
    """What ends with a checkpoint inside of it, as after SIGTERM, and is gone on with."""
    loop, poison = replace(LOOP, max_skipped=5), range(6, 20)
    train(Line(poison), Counting(), 9, 0, loop, tmp_path, "t")
    with pytest.raises(NonFiniteError, match="in 6 steps in a row before step 12"):
        train(Line(poison), Counting(), 20, 0, loop, tmp_path, "t")


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


def test_a_checkpoint_under_another_name_does_not_push_newer_ones_out(tmp_path, capsys):
    train(Line(), Counting(), 5, 0, LOOP, tmp_path, "t")
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_0000005", folder / "step_0000099")
    train(Line(), Counting(), 20, 0, LOOP, tmp_path, "t")
    assert "(it is that of step 5 under another name)" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in checkpoint.complete(folder)] == ["step_0000015", "step_0000020"]


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


@pytest.mark.parametrize(
    "manifest", ["[]", "3", '{"step": 1, "sha256": ["a"]}', '{"step": 1, "sha256": {}}', '{"step": 1}', "{}", "no JSON"]
)
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
