"""Jobs in processes of their own: what becomes of them when one ends early, or when nobody waits any more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtp.config import ConfigError
from vtp.studies.side_by_side import Stage, last_metrics, side_by_side


def waiting(name):
    return Stage("waiting", 0, 1)


def test_all_jobs_are_done_and_what_they_say_is_kept(tmp_path, capsys):
    jobs = {name: (print, (f"{name} speaks",)) for name in ("one", "other")}
    side_by_side(jobs, tmp_path, waiting)
    assert [(tmp_path / name / "log.txt").read_text() for name in jobs] == ["one speaks\n", "other speaks\n"]
    assert "one: waiting" in capsys.readouterr().err  # no terminal here: stages instead of bars


def test_a_job_that_was_told_to_stop_is_not_done(tmp_path):
    with pytest.raises(ConfigError, match="told stopped: .*log.txt"):
        side_by_side({"told": (sys.exit, (0,)), "other": (time.sleep, (60,))}, tmp_path, waiting)


def test_a_job_that_is_killed_is_named_with_the_signal(tmp_path):
    with pytest.raises(ConfigError, match="shot stopped: killed by signal 6; it said nothing"):
        side_by_side({"shot": (os.abort, ())}, tmp_path, waiting)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_no_job_outlives_its_parent(tmp_path, sent):
    code = (
        "import time; from pathlib import Path; from vtp.studies.side_by_side import *; "
        f"side_by_side({{'a': (time.sleep, (300,))}}, Path({str(tmp_path)!r}), lambda name: Stage('asleep', 0, 1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("this system does not tell a process's children")
    log = tmp_path / "a" / "log.txt"
    wait_for(log.exists)  # the job runs
    pids = [int(pid) for pid in children.read_text().split()]
    assert pids
    parent.send_signal(sent)
    parent.wait(30)
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("running", [False, True], ids=["while starting", "while running"])
def test_ctrl_c_ends_all_without_a_traceback(tmp_path, running):
    code = (
        "import signal, time; from pathlib import Path; from vtp.studies.side_by_side import *; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs are deaf to it
        f"side_by_side({{'a': (time.sleep, (300,))}}, Path({str(tmp_path)!r}), lambda name: Stage('asleep', 0, 1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for((tmp_path / "a" / "log.txt").exists if running else (tmp_path / "a").exists)
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 130
    assert "Traceback" not in said and "the same command goes on" in said


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_newest_complete_line_of_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_metrics(file) == {}
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_metrics(file) == {"step": 2}
