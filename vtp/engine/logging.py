"""What a run says: metrics.jsonl is the record; progress bar, TensorBoard and Weights & Biases only read it."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtp import dist
from vtp.config import ConfigError
from vtp.files import FULL

console = Console(stderr=True)


def say(text: str) -> None:
    """One line for the user, from the first rank."""
    if dist.is_main():
        console.print(text, markup=False, soft_wrap=True)


# What a line says of the machine: the rest is the same whenever a run is repeated.
MACHINE = ("seconds", "images_per_second", "utilisation", "data_wait", "memory_gb")


class MetricsLog:
    """Append-only metrics.jsonl; opened for a resumed run, lines after the resumed step are dropped first.

    Files are written, and TensorBoard and Weights & Biases told, by a thread: training does not wait for a disk. While
    that is full, lines wait in memory.
    """

    def __init__(self, run: Path, resumed_step: int, tensorboard: bool = False, wandb: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        if dist.is_main():
            kept = self._lines(resumed_step)
            part = self.path.with_suffix(".part")  # a kill or a full disk leaves the lines there are
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self.path)
        self._readers: list[_TensorBoard | _Wandb] = []
        if dist.is_main():
            self._readers += [_TensorBoard(run, resumed_step)] if tensorboard else []
            self._readers += [_Wandb(run)] if wandb else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._written: Future[None] | None = None
        self._waiting: list[str] = []

    def _lines(self, last: int) -> list[dict[str, Any]]:
        """Those up to a step; what is no line of this record, as a kill cut it short, is left out."""
        lines = []
        for text in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []:
            with suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                if line["step"] <= last:
                    lines.append(line)
        return lines

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line; `values` by name. A failure to write the line before is raised here."""
        if self._written is not None:
            self._written.result()
        if dist.is_main():
            self._written = self._thread.submit(self._write, step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        full = bool(self._waiting)  # since the line before
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._waiting.append(json.dumps({"step": step, **known}) + "\n")
        try:
            self._append()
            for reader in self._readers:
                reader.write(step, values)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not full:
                say(f"{self.path}: {error.strerror}; what is to be written waits until there is room")

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError:
            os.truncate(self.path, size)  # or the next line would follow a part of one
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Until all is written, or said to be lost."""
        self._thread.shutdown()
        if self._waiting:
            try:
                self._append()
            except OSError as error:
                say(f"{self.path}: {error.strerror}; its last {len(self._waiting)} lines are lost")
        for reader in self._readers:
            reader.close()


class _TensorBoard:
    def __init__(self, run: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "loop.tensorboard=true needs TensorBoard: pip install 'vtp[log]', or set it to false"
            ) from None
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def close(self) -> None:
        self.board.close()


class _Wandb:
    """One run of Weights & Biases for one run folder, also when that is resumed: wandb_id.txt says which."""

    def __init__(self, run: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "loop.wandb=true needs Weights & Biases: pip install 'vtp[wandb]', or set it to false"
            ) from None
        file = run / "wandb_id.txt"
        if not file.is_file():
            file.write_text(uuid4().hex)
        saved = run / "config.yaml"
        config = OmegaConf.to_container(OmegaConf.load(saved)) if saved.is_file() else None
        quiet = wandb.Settings(silent=True)  # it would write across the progress bar
        try:
            self.run = wandb.init(
                dir=run, name=run.name, id=file.read_text(), resume="allow", config=cast(Any, config), settings=quiet
            )
        except wandb.Error as error:
            raise ConfigError(f"loop.wandb=true: {str(error).rstrip('.')}; or set WANDB_MODE=offline") from None

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def progress_bar(title: str) -> Progress:
    """A bar with the loss, images per second and time left; silent on other ranks than the first."""
    return Progress(
        TextColumn(title.replace("{", "{{").replace("}", "}}"), markup=False),  # a name is not a format
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not dist.is_main(),
    )


def environment() -> dict[str, Any]:
    """What a figure depends on besides the configuration: versions, hardware, command, start."""
    names = ("vtp", "torch", "torchvision", "transformers", "numpy", "pillow", "webdataset", "omegaconf")
    versions = {name: metadata.version(name) for name in names}
    for name in ("diffusers", "torch-fidelity", "lpips", "datasets"):
        with suppress(metadata.PackageNotFoundError):  # extras
            versions[name] = metadata.version(name)
    return {
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": dist.world_size(),
        "versions": versions,
    }
