"""`vtp profile`: parts that add up to the step, a trace, nothing else left behind."""

import json

from vtp import config
from vtp.cli import main


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
