"""What a run says: metrics.jsonl is the record; the progress bar and TensorBoard only read what goes into it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtp import dist

console = Console(stderr=True)


def say(text: str) -> None:
    """One line for the user, from the first rank."""
    if dist.is_main():
        console.print(text)


class MetricsLog:
    """Append-only metrics.jsonl; opened for a resumed run, lines after the resumed step are dropped first."""

    def __init__(self, run: Path, resumed_step: int, tensorboard: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= resumed_step]
        if dist.is_main():
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.board: Any = None
        if tensorboard and dist.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the line a kill cut short
                continue
        return lines

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line; `values` by name."""
        if not dist.is_main():
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()


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
    return {
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": dist.world_size(),
        "versions": versions,
    }
