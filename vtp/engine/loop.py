"""The loop: cadence only. What a step is, the learner knows; what a batch is, the loader knows."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed.tensor import DTensor

from vtp import dist
from vtp.config import ConfigError, within
from vtp.engine import checkpoint
from vtp.engine.logging import MetricsLog, console, progress_bar, say
from vtp.engine.run_folder import keep_config
from vtp.engine.speed import peak_memory


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often things happen, in steps. None of it changes what is learned."""

    log_every: int = 20
    save_every: int = 500
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # those at multiples of so many steps stay as well; 0: none
    max_skipped: int = 5  # steps in a row without a finite gradient, and so without an update, that a run bears
    tensorboard: bool = False  # event files in the run's folder
    wandb: bool = False  # Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and the like are its own settings

    def __post_init__(self) -> None:
        within(self, "log_every save_every keep", 1)
        within(self, "keep_every max_skipped", 0)


@runtime_checkable
class Learner(Protocol):
    """One thing that learns: parameters, optimiser and whatever else it must remember."""

    images_per_step: int  # over all ranks

    def step(self, batch: Any, step: int) -> Mapping[str, Tensor | float]:
        """Learn from one batch; returns what to log, as tensors (no host synchronisation).

        Where `total` or `grad_norm` is not finite nothing was learned; other values need not be finite.
        `ideal_seconds`, if there, is what the step would last at the machine's matmul rate; it becomes `utilisation`.
        """

    def tensors(self) -> dict[str, Any]:
        """Nested dict of every tensor that a resumed run needs: saved from, and on resume filled in place."""


@runtime_checkable
class Batches(Protocol):
    """An endless stream that can say where it stands, in JSON values."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch taken."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class NonFiniteError(RuntimeError):
    """Losses or gradients stay NaN or infinite; the last good checkpoint is kept."""


DECISIVE = ("total", "grad_norm")


def train(learner: Learner, batches: Batches, steps: int, seed: int, loop: LoopConfig, out: Path, title: str) -> None:
    """Run `learner` to `steps` steps, resuming from the newest checkpoint in `out`.

    Step i of rank r draws all its randomness from (seed, r, i), so a resumed run is the uninterrupted run. Ctrl-C and
    SIGTERM finish the step, save, and leave.

    A step whose loss or gradient is not finite must leave the weights as they were (`optim.update` does; a teacher
    follows them as ever); it is counted in `skipped`, and not in the means of its window. A checkpoint that falls on
    such a step is written after the next finite one.

    Raises:
        NonFiniteError: more than `loop.max_skipped` such steps in a row, after the last finite one of which nothing is
            saved; or what is learned itself is not finite when it is to be saved.
        CheckpointError: no checkpoint can be read, or the last one not written.
        ConfigError: the newest checkpoint is of a later step than `steps`.
        SystemExit: code 0 after SIGTERM, 130 after Ctrl-C, both with a checkpoint written; SIGTERM is ignored then.
    """
    folder = out / "checkpoints"
    checkpoints = checkpoint.Checkpoints(folder, loop.keep, loop.keep_every)
    done, images, seconds, skipped, in_a_row = 0, 0, 0.0, 0, 0
    found = checkpoint.newest(folder)
    if found is not None:
        progress = checkpoint.load(found, learner.tensors())
        if progress["step"] > steps:
            raise ConfigError(f"{found} is beyond steps={steps}; ask for more steps, or choose another out=")
        batches.load_state_dict(progress["batches"])
        done, images, seconds, skipped = (progress[name] for name in ("step", "images", "seconds", "skipped"))
        in_a_row = progress.get("in_a_row", 0)  # a run of before it was kept
        say(f"resumed {found}")
    keep_config(out)
    log = MetricsLog(out, done, loop.tensorboard, loop.wandb)
    window: list[Mapping[str, Tensor | float]] = []
    due: _Reading | None = None
    owed = False  # a checkpoint, since a step that was skipped
    waited = 0.0  # for batches
    started = window_started = time.perf_counter()

    def clock() -> float:
        return seconds + time.perf_counter() - started

    def images_of(step: int) -> int:
        return images + (step - done) * learner.images_per_step

    def save(step: int) -> None:
        counts = {"seconds": clock(), "skipped": skipped, "in_a_row": in_a_row, "images": images_of(step)}
        tensors = learner.tensors()
        if bad := _not_finite(tensors):
            raise _stopped(bad, f"after step {step}", checkpoints)
        checkpoints.save(step, tensors, {"batches": batches.state_dict(), **counts})

    def hopeless() -> bool:
        return in_a_row > loop.max_skipped or skipped == steps

    def settle(reading: _Reading) -> bool:
        """Add a window to the record; whether its last step was finite."""
        nonlocal skipped, in_a_row, waited, window_started
        finite, values = reading.mean()
        for good in finite:
            skipped, in_a_row = skipped + (not good), 0 if good else in_a_row + 1
            if hopeless():
                break
        now = time.perf_counter()
        lasted = now - window_started
        if "ideal_seconds" in values:
            values["utilisation"] = values.pop("ideal_seconds") * len(finite) / lasted
        values["skipped"] = skipped
        values["images"] = images_of(reading.step)
        values["images_per_second"] = len(finite) * learner.images_per_step / lasted
        values["data_wait"] = waited / lasted
        values["memory_gb"] = peak_memory()
        values["seconds"] = clock()
        log.write(reading.step, values)
        if hopeless():
            bad = [name for name, value in values.items() if not np.isfinite(value)] or ["a loss or gradient"]
            raise _stopped(bad, f"in {in_a_row} steps in a row before step {reading.step}", checkpoints)
        waited, window_started = 0.0, now
        status = f"loss {values['total']:.3f}  {values['images_per_second']:.0f} images/s"
        status += f"  {skipped} skipped" if skipped else ""
        bar.update(task, status=status)
        if not console.is_terminal:  # a file, in which there are no bars
            left = timedelta(seconds=round((steps - reading.step) * lasted / len(finite)))
            say(f"{title}  step {reading.step} of {steps}  {status}  {left} left")
        return finite[-1]

    stream = iter(batches)
    with closing(log), progress_bar(title) as bar, _Stop() as stop:
        task = bar.add_task(title, total=steps, completed=done, status="")
        for step in range(done, steps):
            reseed(seed, dist.rank(), step)
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            window.append(learner.step(batch, step))
            if due is not None:  # the device has this step to do while the host waits for what came before
                settle(due)
                due = None
            stop.agree()
            last = step + 1 == steps or stop.agreed is not None
            saving = last or owed or (step + 1) % loop.save_every == 0
            if saving or (step + 1) % loop.log_every == 0:
                due, window = _Reading(step + 1, window), []
            if due is not None and (saving or due.here):
                good = settle(due) or last
                owed, saving, due = saving and not good, saving and good, None
            bar.update(task, completed=step + 1)
            if saving:
                save(step + 1)
            if stop.agreed is not None:
                stop.leaving = step + 1 < steps
                break
        checkpoints.wait()  # a second SIGTERM must not end the last save
    if skipped and done < steps:
        ends = f", the last {in_a_row} in a row: is what came of it what you want?" if in_a_row else ""
        say(f"{skipped} of {step + 1} steps learned nothing, for a loss or gradient was not finite{ends}")
    if stop.leaving:
        say(f"stopped at step {step + 1} of {steps}; the same command goes on from there")
        raise SystemExit(0 if stop.agreed == signal.SIGTERM else 130)


def reseed(seed: int, rank: int, step: int) -> None:
    """Seed Python, NumPy and torch from (seed, rank, step)."""
    state = int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state % 2**63)


class _Reading:
    """The values of a window's steps, on their way from the device to the host; asking for them is what waits."""

    def __init__(self, step: int, window: list[Mapping[str, Tensor | float]]) -> None:
        self.step = step  # steps done
        self._names = list(window[0])
        self._values = [v[n] for v in window for n in self._names]
        tensors = [x.detach().double() for x in self._values if isinstance(x, Tensor)]
        self._read = torch.stack(tensors).to("cpu", non_blocking=True) if tensors else torch.empty(0)
        self.here = not tensors or tensors[0].device.type == "cpu"
        self._copied = None if self.here else torch.Event(tensors[0].device.type)
        if self._copied is not None:
            self._copied.record()

    def mean(self) -> tuple[list[bool], dict[str, float]]:
        """(which steps were finite, mean of each value over those and the ranks; over all if none was)."""
        if self._copied is not None:
            self._copied.synchronize()
        read = iter(self._read.tolist())
        table = torch.tensor([next(read) if isinstance(x, Tensor) else x for x in self._values], dtype=torch.float64)
        table = table.view(-1, len(self._names))
        if dist.world_size() > 1:
            table = dist.sum_(table) / dist.world_size()
        finite = table[:, [name in DECISIVE for name in self._names]].isfinite().all(1)
        means = (table[finite] if finite.any() else table).mean(0)
        return finite.tolist(), dict(zip(self._names, means.tolist(), strict=True))


def _not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a nested dict that hold NaN or infinities on any rank; waits for the device."""

    def leaves(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, x in tree.items():
            if isinstance(x, Mapping):
                yield from leaves(x, f"{at}{name}.")
            else:
                yield f"{at}{name}", x.to_local() if isinstance(x, DTensor) else x

    named = dict(leaves(tensors))
    bad = torch.stack([(~x.isfinite()).any().float() for x in named.values()])
    return [name for name, n in zip(named, dist.sum_(bad).tolist(), strict=True) if n > 0]


def _stopped(bad: list[str], when: str, checkpoints: checkpoint.Checkpoints) -> NonFiniteError:
    with suppress(checkpoint.CheckpointError):  # which was said
        checkpoints.wait()
    named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    found = checkpoint.complete(checkpoints.folder)
    kept = f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written yet"
    return NonFiniteError(
        f"{named} not finite {when}; {kept}. Lower optim.lr.peak, clip harder (optim.clip_grad), or set precision=fp32"
    )


class _Stop:
    """Catches SIGINT and SIGTERM, so that the step under way is finished and saved; a second Ctrl-C interrupts.

    Ranks agree on the step: each asks at every step, and reads the answer a step later, so that no step waits for it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # what this rank has caught
        self.agreed: int | None = None  # what all ranks know that one has caught
        self.leaving = False  # for that
        self._caught_at = 0.0
        self._asked: tuple[Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # whoever started this run answers for it
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._caught_at = number, now
        elif number == signal.SIGINT and now - self._caught_at > 1:  # torchrun passes on what a terminal sent as well
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Set `agreed`; every rank calls this once a step."""
        if dist.world_size() == 1:
            self.agreed = self.signal
            return
        if self._asked is not None:
            answer, work = self._asked
            work.wait()
            self.agreed = int(answer) or None
        answer = torch.tensor(self.signal or 0)
        self._asked = answer, td.all_reduce(answer, td.ReduceOp.MAX, async_op=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._asked is not None and kind is None:
            self._asked[1].wait()
        for number, handler in self._before.items():
            # Another one must not end what a process has yet to do that leaves; Python's handlers would end before it.
            signal.signal(number, signal.SIG_IGN if self.leaving and number == signal.SIGTERM else handler)
