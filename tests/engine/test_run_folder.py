"""The folder of a run: one process, one configuration, one place for all ranks."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from vtp import config
from vtp.config import ConfigError
from vtp.engine.run_folder import CONFIG, NEW_CONFIG, open_run


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "x"
    width: int = 4
    workers: int = 0
    resume: str = "auto"


def test_a_folder_is_trained_in_by_one_process(tmp_path):
    """The lock goes with its process, killed or not, though its children live on."""
    holds = """
import os, sys, time
from vtp.engine.run_folder import open_run
from tests.engine.test_run_folder import Config
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


def opened(cfg, resume="auto", ignore=()):
    with open_run(replace(cfg, resume=resume), "tokenizer", ignore) as out:
        (out / NEW_CONFIG).replace(out / CONFIG)  # as `train` does
        return out


def test_a_run_folder_may_be_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened(Config(out="~/run")) == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert opened(Config(out="~no_such_user/run")).is_relative_to("~no_such_user")  # as a shell does


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
        patch.setattr("vtp.engine.run_folder.SIGHT", 0.3)
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


def test_a_disk_that_is_full_when_a_run_begins_is_an_error_that_names_the_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="too large: .*config.yaml"), open_run(Config(out=str(tmp_path)), "tokenizer"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
