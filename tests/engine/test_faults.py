"""Runs that are really killed, and disks that are really full: another process learns, this one watches and kills."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.engine.test_loop import Counting, Line, science
from vtp.engine import checkpoint
from vtp.engine.loop import LoopConfig, train

ROOT = Path(__file__).resolve().parents[2]
LOOP = LoopConfig(log_every=1, save_every=3, keep=2)
PROGRAM = """
import sys, resource
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.engine.test_faults import LOOP, Wide
from tests.engine.test_loop import Counting
from vtp.engine.loop import train
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
train(Wide(), Counting(), int(sys.argv[2]), 0, LOOP, Path(sys.argv[1]), "t")
"""


class Wide(Line):
    """Twelve megabytes of parameters, so that a save takes a while."""

    def __init__(self):
        super().__init__()
        self.ballast = torch.nn.Parameter(torch.zeros(3_000_000))

    def tensors(self):
        return {**super().tensors(), "ballast": self.ballast.data}


def start(out, steps, *limit):
    command = [sys.executable, "-c", PROGRAM, str(out), str(steps), *map(str, limit)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def when(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.0005)


def resumes_to_the_same(tmp_path, out, steps):
    resumed, straight = Wide(), Wide()
    train(resumed, Counting(), steps, 0, LOOP, out, "t")
    train(straight, Counting(), steps, 0, LOOP, tmp_path / "straight", "t")
    assert torch.equal(resumed.model.weight, straight.model.weight)
    assert science(out) == science(tmp_path / "straight")
    return resumed.seen


@pytest.mark.parametrize("moment", ["in a step", "in a save"])
def test_killed_with_9(tmp_path, moment):
    out = tmp_path / "run"
    folder = out / "checkpoints"
    process = start(out, 1_000_000)
    when(lambda: checkpoint.complete(folder), process)
    if moment == "in a save":
        when(lambda: list(folder.glob(".step_*.partial/*")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = checkpoint.complete(folder)
    assert left and (moment == "in a step" or list(folder.glob(".step_*.partial")))
    done = int(left[-1].name.removeprefix("step_"))
    assert len(resumes_to_the_same(tmp_path, out, done + 2)) == 2
    assert not list(folder.glob(".step_*.partial"))


def test_sigterm_saves_says_how_to_go_on_and_exits_0(tmp_path):
    out = tmp_path / "run"
    process = start(out, 1_000_000)
    when(lambda: checkpoint.complete(out / "checkpoints"), process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "the same command goes on from there" in " ".join(said.split())
    done = int(checkpoint.complete(out / "checkpoints")[-1].name.removeprefix("step_"))
    assert f"stopped at step {done} of" in " ".join(said.split())
    assert len(resumes_to_the_same(tmp_path, out, done + 2)) == 2


def test_disk_full_leaves_earlier_checkpoints_and_says_so(tmp_path):
    out = tmp_path / "run"
    train(Wide(), Counting(), 3, 0, LOOP, out, "t")
    process = start(out, 9, 4_000_000)  # no file beyond 4 MB from here on
    _, said = process.communicate(timeout=60)
    said = " ".join(said.split())
    assert process.returncode != 0
    assert "the checkpoint of step 6 could not be written" in said and "File too large" in said
    assert "step_0000003 is intact" in said
    folder = out / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_0000003"]  # and nothing half-written
    assert resumes_to_the_same(tmp_path, out, 9) == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_a_save_holds_the_tensors_of_its_step_whatever_follows(tmp_path):
    tensors = {"x": torch.zeros(1_000_000)}
    saver = checkpoint.Checkpoints(tmp_path, keep=1)
    saver.save(1, tensors, {})
    tensors["x"] += 1  # while the thread writes
    saver.wait()
    checkpoint.load(checkpoint.newest(tmp_path), tensors)
    assert not tensors["x"].any()
