"""Several runs at once, each in a process of its own on its share of the cores, with one display for all.

Networks that fit a laptop are made of operations too small for many threads: two such runs side by side, on half of the
cores each, finish well before the same two in turn.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtp.config import ConfigError
from vtp.engine.logging import console, say

LOG = "log.txt"
STOPPED = 3  # exit code of a job that was told to stop
PATIENCE = 20.0  # seconds that an interrupted job has to save before it is told again


class Stage(NamedTuple):
    """What a run is doing now."""

    name: str
    done: int
    total: int
    status: str = ""


Watch = Callable[[str], Stage]


def side_by_side(jobs: Mapping[str, tuple[Callable[..., None], tuple[Any, ...]]], out: Path, watch: Watch) -> None:
    """Call all functions at once and return when all have; what job NAME prints goes to out/NAME/log.txt.

    Args:
        jobs: by name, a function that a new process can import, and its arguments.
        watch: tells from the files of a job what it is doing.

    Raises:
        ConfigError: a job failed; the others are stopped, and their checkpoints kept.
        SystemExit: interrupted; every job has written its checkpoint.
    """
    import torch

    threads = max(1, torch.get_num_threads() // len(jobs))
    context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of this process's threads
    processes: dict[str, BaseProcess] = {}
    with _terminable():
        try:
            for name, (function, arguments) in jobs.items():
                (out / name).mkdir(parents=True, exist_ok=True)
                arguments = (out / name / LOG, threads, function, arguments)
                processes[name] = context.Process(target=_in_process, args=arguments, name=name)
                with _deaf_to_interrupts():
                    processes[name].start()
            _show(processes, watch)
            for name, process in processes.items():
                if process.exitcode:
                    log = out / name / LOG
                    killed = f"killed by signal {-process.exitcode}; " if process.exitcode < 0 else ""
                    raise ConfigError(f"{name} stopped: {killed}{_last_line(log)} (all of it: {log})")
        except KeyboardInterrupt:  # the jobs finish their step and save
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.join(PATIENCE)
            say("interrupted; the same command goes on from the last checkpoints")
            raise SystemExit(130) from None
        finally:
            for process in processes.values():
                if process.is_alive():
                    process.terminate()
            for process in processes.values():
                process.join()


def _in_process(log: Path, threads: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """One job: its words go to the log, and a mistake is its last line."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        function(*arguments)
    except SystemExit:  # told to stop: its checkpoint is written, but the job is not done
        raise SystemExit(STOPPED) from None
    except Exception as error:
        if not isinstance(error, ConfigError):
            import traceback

            traceback.print_exc()
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        raise SystemExit(2) from None


def _stop_with_parent() -> None:
    """Nobody waits for a job whose parent was killed: it saves and ends, before the same command starts it again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _show(processes: Mapping[str, BaseProcess], watch: Watch) -> None:
    """Bars until all have ended, or one has failed."""
    columns = (
        TextColumn("{task.fields[job]}"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks = {name: bars.add_task("starting", total=1, job=name, status="") for name in processes}
        said = dict.fromkeys(processes, "")
        while True:
            alive = [p for p in processes.values() if p.is_alive()]
            for name, task in tasks.items():
                stage = watch(name)
                if stage.name != said[name]:
                    said[name] = stage.name
                    bars.reset(task, description=stage.name)
                    if not console.is_terminal:  # no bars there: say at least where it stands
                        say(f"{name}: {stage.name}")
                bars.update(task, completed=stage.done, total=stage.total, status=stage.status)
            if not alive or any(p.exitcode for p in processes.values()):
                return
            time.sleep(0.5)


def last_metrics(file: Path) -> dict[str, Any]:
    """The newest complete line of a metrics.jsonl, empty before the first."""
    if file.is_file():
        for line in reversed(file.read_text().splitlines()):
            try:
                return json.loads(line)
            except json.JSONDecodeError:  # being written
                continue
    return {}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else "it said nothing"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process the orderly way, so that its jobs are told."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started here inherits that Ctrl-C means nothing to it: the terminal sends it to all, but one must act."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
