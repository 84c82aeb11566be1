"""Checkpoints to resume from: tensors by torch.distributed.checkpoint, the rest as JSON; written aside, then renamed.

A folder `step_0001000` exists only when everything in it does. The step in the name orders them, never time or size.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from vtp import dist

PROGRESS = "progress.json"


def save(folder: Path, step: int, tensors: dict[str, Any], progress: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_NNNNNNN` and delete all but the newest `keep`.

    Args:
        folder: The run's checkpoints.
        step: Steps done.
        tensors: A nested dict whose leaves are tensors.
        progress: JSON values: what is not a tensor (loader position, clocks).
        keep: How many checkpoints stay.
    """
    final = folder / f"step_{step:07d}"
    partial = folder / f".{final.name}.partial"
    if dist.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        dcp.save(tensors, checkpoint_id=partial, no_dist=dist.world_size() == 1)
    if dist.is_main():
        (partial / PROGRESS).write_text(json.dumps({"step": step, **progress}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / PROGRESS).is_file())


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint; returns its progress, with `step`."""
    with _quiet():
        dcp.load(tensors, checkpoint_id=path, no_dist=dist.world_size() == 1)
    return json.loads((path / PROGRESS).read_text())


@contextmanager
def _quiet() -> Iterator[None]:
    """One process is what a laptop has; torch warns about it at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
