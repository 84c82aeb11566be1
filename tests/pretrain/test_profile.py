"""`vtp profile`: parts that add up to the step, a trace, nothing else left behind."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from vtp import config
from vtp.cli import main
from vtp.config import ConfigError
from vtp.engine.parallel import ParallelConfig
from vtp.pretrain.learner import PretrainLearner
from vtp.pretrain.profile import profile_step


def test_where_a_step_goes(tiny, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(config.dump(tiny))
    main(["profile", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "profile"), "--steps", "2"])
    said = capsys.readouterr().out
    assert "forward teacher" in said and "operators" in said and "trace.json" in said
    record = json.loads((tmp_path / "profile/profile.json").read_text())
    parts = record["parts"]
    ways = {f"{way} {objective}" for way in ("forward", "backward") for objective in ("clip", "rec", "ssl")}
    assert ways | {"data", "views", "forward teacher", "optimiser", "ema", "rest"} <= parts.keys()
    assert "backward teacher" not in parts  # it takes no gradient
    assert all(ms > -0.01 for ms in parts.values())
    assert abs(sum(parts.values()) - record["milliseconds"]) < 1e-6
    assert parts["rest"] < 0.3 * record["milliseconds"]
    names = " ".join(name for name, _, _ in record["operators"])
    assert "aten::" in names and "ssl" not in names and "Loader" not in names
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert {"forward", "backward", "teacher"} <= {event.get("name") for event in events}
    assert not (tmp_path / "run").exists()


def test_steps_that_compiled_are_not_what_is_shown(tiny, tmp_path, monkeypatch):
    """A block is compiled again when captions of another length come: here in steps 3 and 5."""
    counted, taken, whole = Counter(), [], PretrainLearner.step

    def step(self, batch, i):
        taken.append(i)
        counted["unique_graphs"] += i in (3, 5)
        return whole(self, batch, i)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setitem(torch._dynamo.utils.counters, "stats", counted)
    monkeypatch.setattr(PretrainLearner, "step", step)
    cfg = replace(tiny, parallel=ParallelConfig(compile=True))
    profile_step(cfg, tmp_path / "profile", steps=2)
    # Looked at are 2 and 3, 5 and 6, and, without a compiler at work, 8 and 9.
    assert taken == list(range(10))
    trace = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "forward" and event.get("ph") == "X" for event in trace) == 2


def test_an_out_that_is_a_file_is_refused_before_the_work(tiny, tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="--out .*notes is a file; name a folder"):
        profile_step(tiny, tmp_path / "notes", steps=1)
