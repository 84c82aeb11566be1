"""The folder of a run: whose it is, who sees it, and by which configuration it is gone on with."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as td

from vtp import config, dist
from vtp.config import ConfigError
from vtp.engine import checkpoint
from vtp.engine.logging import environment, say
from vtp.files import path_of, to_disk, write_text

CONFIG, NEW_CONFIG = "config.yaml", ".config.yaml.new"
SIGHT = 90.0  # seconds; NFS remembers for up to a minute that something was not there


def make_folder(path: Path, key: str) -> None:
    """Make a folder to write to, before the work.

    Raises:
        ConfigError: there is something else; the message begins with `key`, behind which the user gave the path.
    """
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{key}{path} is a link that leads nowhere; name a folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{key}{path} is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a folder against other processes; the lock goes with this one, however it ends, and not to its children."""
    if not dist.is_main():
        yield
        return
    import fcntl  # which Windows does not have

    make_folder(out, "out=")
    with (out / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process trains in {out}; wait for it, end it, or choose another out=") from None
        except OSError:  # a file system without locks
            say(f"{out} cannot be locked: start no second run in it")
        yield


@contextmanager
def open_run(cfg: Any, published: str, ignore: tuple[str, ...] = ()) -> Iterator[Path]:
    """The run folder `cfg.out`, made or reopened and held against other processes while the block runs.

    config.yaml and environment.json are saved in it; the former by `keep_config`.

    Args:
        cfg: The program's configuration dataclass. `cfg.resume`: `auto` continues a run of the same configuration;
            `never` insists on a new folder; `anyway` continues with another configuration and says what has changed.
        published: What the program will write there in the end; beside no checkpoints it is kept from being replaced.
        ignore: Keys in which a resumed run may differ.

    A run that ended before its first checkpoint (a mistake, a loss that was never finite) has nothing to keep: the
    corrected command may use its folder.

    Raises:
        ConfigError: the folder holds a run with another configuration (the differences are listed), or is not to be
            resumed, or another process trains in it, or ranks on other hosts do not see it.
    """
    out = path_of(cfg.out)
    with _alone(out):
        _all_see(out)
        resumed = any((out / "checkpoints").glob("[!.]*"))  # hidden is a first save that was killed
        if resumed and cfg.resume == "never":
            raise ConfigError(f"{out} already holds a run; choose another out=, delete it, or set resume=auto")
        if (out / published).exists() and not checkpoint.complete(out / "checkpoints"):
            raise ConfigError(
                f"{out / published} is there, but no checkpoint to go on from: the run would begin anew and replace "
                "it; choose another out=, or delete it"
            )
        if resumed:
            _compare(out / CONFIG, cfg, ignore)
        dist.barrier()  # all ranks have looked before one writes
        try:
            if dist.is_main():
                write_text(out / NEW_CONFIG, config.dump(replace(cfg, resume="auto")))  # anyway is for this time
                write_text(out / "environment.json", json.dumps(environment(), indent=2))
            dist.barrier()
            yield out
        finally:
            if dist.is_main():
                (out / NEW_CONFIG).unlink(missing_ok=True)  # of a run that did not come to train


def keep_config(out: Path) -> None:
    """Let config.yaml be what this start was asked for: when the checkpoint, if there is one, was loaded."""
    new = out / NEW_CONFIG
    if dist.is_main() and new.is_file():
        to_disk(new)
        new.replace(out / CONFIG)


def _all_see(out: Path) -> None:
    """Refuse a folder that is another one on another host: its ranks would save their parts of checkpoints there."""
    if dist.world_size() == 1:
        return
    name = [f".seen_{secrets.token_hex(8)}"]  # as no run before has left it
    td.broadcast_object_list(name)
    mark, asked = out / name[0], time.monotonic()
    if dist.is_main():
        for old in out.glob(".seen_*"):  # of a run that was ended while it waited
            old.unlink()
        mark.touch()
    dist.barrier()
    told = False
    while not mark.is_file() and time.monotonic() < asked + SIGHT:
        if not told and time.monotonic() > asked + 3:
            print(f"{_here()} waits to see {out.absolute()}, as the first rank made it", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
    places: list[Any] = [None] * dist.world_size()
    td.all_gather_object(places, None if mark.is_file() else f"{_here()} has a {out.absolute()} of its own")
    if dist.is_main():
        mark.unlink()
    if blind := [place for place in places if place is not None]:
        more = f", and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise ConfigError(f"out={out} is not one folder: {blind[0]}{more}; name one that all hosts and ranks share")


def _here() -> str:
    return f"rank {dist.rank()} on {socket.gethostname()}"


def _compare(saved: Path, cfg: Any, ignore: tuple[str, ...]) -> None:
    """Say in what a run's saved configuration differs from `cfg`; refuse what may not, unless `cfg.resume` says so."""
    resume = cfg.resume
    try:
        before = config.load(saved, type(cfg)())
        if not saved.read_text().strip():
            raise ConfigError(f"{saved} is empty")
    except ConfigError as error:
        if resume == "anyway":
            say(f"{error}; what has changed since the run began cannot be told")
            return
        raise ConfigError(
            f"{saved.parent} holds checkpoints, and what they were trained by is not known ({error}); put {CONFIG} "
            "back, choose another out=, or go on with this configuration by resume=anyway"
        ) from None
    changed = config.differences(before, cfg, ignore=("resume", "out", *ignore))
    if changed and resume != "anyway":
        raise ConfigError(
            f"{saved.parent} holds a run with another configuration ({'; '.join(changed)}); choose another out= or "
            "delete it, or go on with the new one by resume=anyway"
        )
    for difference in config.differences(before, cfg, ignore=("resume", "out")):
        say(f"changed since the run began: {difference}")
