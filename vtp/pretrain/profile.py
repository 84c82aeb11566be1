"""`vtp profile`: where a training step goes, by part and by operator, and a trace to look at."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from vtp import dist
from vtp.engine.logging import environment, say
from vtp.engine.loop import reseed
from vtp.engine.optim import pick_device
from vtp.engine.run_folder import make_folder
from vtp.engine.speed import reuse_memory
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.learner import PretrainLearner
from vtp.pretrain.run import open_loader

OBJECTIVES = ("clip", "rec", "ssl", "teacher")  # the ranges inside `forward`; the innermost counts
BACKWARD = "autograd::engine::evaluate_function"  # a node of the backward pass, and what it calls
WARM_UP, MOST = 2, 50  # steps before the first look, and before the last one where torch.compile is at work still
OPERATORS = 12


def profile_step(cfg: PretrainConfig, out: Path, steps: int) -> Group:
    """Run a few steps and write DIR/trace.json (chrome://tracing, Perfetto) and DIR/profile.json; returns the tables.

    Nothing is saved of what was learned. Times are the device's: on a GPU those of its kernels. Of several ranks all
    take the steps, and the first one's are told.

    Raises:
        ConfigError: data or views cannot be used, or `out` is a file or where data are.
    """
    device = pick_device(cfg.device)
    loader = open_loader(cfg, device, out)
    make_folder(out, "--out ")
    reseed(cfg.seed, 0, 0)
    reuse_memory(device)
    learner = PretrainLearner(cfg, device)
    stream = iter(loader)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # where there is no GPU it calls that an error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    done = 0

    def compiled() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if cfg.parallel.compile else 0

    def take(count: int) -> bool:
        """Take steps; whether a rank compiled anything in them."""
        nonlocal done
        before = compiled()
        for _ in range(count):
            reseed(cfg.seed, dist.rank(), done)
            with record_function("data"):
                batch = next(stream)
            learner.step(batch, done)
            done += 1
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return bool(dist.sum_(torch.tensor(compiled() - before)) > 0)

    if cfg.parallel.compile:
        say("compiling first, which takes minutes")
    take(WARM_UP)
    while True:
        with profile(activities=activities, acc_events=True) as profiler:
            start = time.perf_counter()
            new = take(steps)
            milliseconds = 1e3 * (time.perf_counter() - start) / steps
        if not new or done >= MOST:
            break
        while take(1) and done < MOST:  # captions of another length may have come
            pass
    if new:
        say(f"torch.compile is at work still in step {done}: the times are its own, too")
    timed = "cpu_time_total" if device.type == "cpu" else "device_time_total"
    parts = {name: us / 1e3 / steps for name, us in _parts(profiler.events() or (), timed).items()}
    parts["rest"] = milliseconds - sum(parts.values())
    average = sorted(
        (e for e in profiler.key_averages() if not e.is_user_annotation), key=lambda e: -getattr(e, f"self_{timed}")
    )
    operators = [(e.key, e.count / steps, getattr(e, f"self_{timed}") / 1e3 / steps) for e in average[:OPERATORS]]
    record = {"milliseconds": milliseconds, "parts": parts, "operators": operators, "environment": environment()}
    if dist.is_main():
        profiler.export_chrome_trace(str(out / "trace.json"))
        (out / "profile.json").write_text(json.dumps(record, indent=2))
    return Group(
        _table(f"a step: {milliseconds:.0f} ms", [(name, ms) for name, ms in parts.items()], milliseconds),
        _table("operators", [(f"{name} x {calls:.0f}", ms) for name, calls, ms in operators], milliseconds),
    )


def _parts(events: Any, timed: str) -> dict[str, float]:
    """Microseconds by part: what stands outside the forward and backward pass, then those passes by objective.

    A node of the backward pass belongs to the objective whose forward range made it: both have its sequence number.
    """
    spent: Counter[str] = Counter()
    made_by: dict[int, str] = {}
    nodes = []
    for event in events:
        us = getattr(event, timed)
        if event.name in ("data", "views", "backward", "optimiser", "ema"):
            spent[event.name] += us
        elif event.name == "forward" or event.name in OBJECTIVES:
            spent[f"forward {event.name}"] += us
            if event.name == "teacher":
                spent["forward ssl"] -= us
            if event.name != "forward" and event.name != "teacher":
                spent["forward forward"] -= us
        elif event.name.startswith(BACKWARD):
            nodes.append((event.sequence_nr, us))
        elif event.sequence_nr >= 0 and (objective := _range(event)) is not None:
            made_by[event.sequence_nr] = objective
    for number, us in nodes:
        if number in made_by:
            spent[f"backward {made_by[number]}"] += us
            spent["backward"] -= us
    spent["forward rest"], spent["backward rest"] = spent.pop("forward forward"), spent.pop("backward")
    order = ["data", "views", *(f"{way} {o}" for way in ("forward", "backward") for o in (*OBJECTIVES, "rest"))]
    return {name: spent[name] for name in (*order, "optimiser", "ema") if spent[name]}


def _range(event: Any) -> str | None:
    """The objective in whose forward range an operator ran."""
    while event is not None:
        if event.name in OBJECTIVES:
            return event.name
        event = event.cpu_parent
    return None


def _table(title: str, rows: list[tuple[str, float]], whole: float) -> Table:
    table = Table(title, "ms", "%")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, ms in rows:
        table.add_row(name, f"{ms:.1f}", f"{100 * ms / whole:.1f}")
    return table
