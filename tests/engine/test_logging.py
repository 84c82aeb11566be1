"""The record of a run and its readers."""

import errno
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.engine.test_loop import LOOP, Counting, Line, lines
from vtp.config import ConfigError
from vtp.engine.logging import MetricsLog, say
from vtp.engine.loop import LoopConfig, train


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
