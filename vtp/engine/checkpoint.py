"""Checkpoints to resume from: tensors by torch.distributed.checkpoint, the rest as JSON; written aside, then renamed.

A folder `step_0001000` exists only when everything in it does, and its manifest.json has the hash of each file. The
step in the name orders them, never time or size. Tensors have their global shape, so any number of ranks can load them.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as td
import torch.distributed.checkpoint as dcp

from vtp import dist
from vtp.engine.logging import say
from vtp.files import file_sha256, to_disk

PROGRESS, MANIFEST = "progress.json", "manifest.json"
_NAME = re.compile(r"step_\d{7,}")


class CheckpointError(RuntimeError):
    """The last checkpoint of a run could not be written, or none of those that are there can be read."""


class Checkpoints:
    """Writes a run's checkpoints while training goes on, one at a time. Every rank must make and call it alike.

    Args:
        folder: The run's checkpoints; what an interrupted save left in it is deleted.
        keep: How many of the newest stay.
        keep_every: Those at multiples of so many steps stay as well; 0: none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(".step_*.partial"):
                _discard(partial)
        # Its collectives run beside those of the step, so they need a group of their own.
        self._group = td.new_group(backend="gloo") if dist.world_size() > 1 else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Any], progress: dict[str, Any]) -> None:
        """Begin `step_NNNNNNN`; returns when the tensors are copied. A failure is said, and fatal only to `wait`.

        Args:
            step: Steps done.
            tensors: A nested dict whose leaves are tensors.
            progress: JSON values: what is not a tensor (loader position, clocks).
        """
        if self._pending is not None:
            self._pending.exception()  # waits; the failure was said when it happened
        partial = self.folder / f".step_{step:07d}.partial"
        if dist.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        _quiet()
        written = cast(
            "Future[Any]",
            dcp.async_save(tensors, checkpoint_id=partial, process_group=self._group, no_dist=self._group is None),
        )
        self._pending = self._pool.submit(self._finish, written, partial, step, progress)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        error = self._pending.exception() if self._pending is not None else None
        failed = error is not None
        if self._group is not None:  # what failed on one rank failed
            flags: list[Any] = [None] * dist.world_size()
            td.all_gather_object(flags, failed, group=self._group)
            failed = any(flags)
        if failed:
            raise CheckpointError(str(error or "the checkpoint could not be written by another rank"))

    def _finish(self, written: Future[Any], partial: Path, step: int, progress: dict[str, Any]) -> None:
        try:
            written.result()
            if not dist.is_main():
                return
            (partial / PROGRESS).write_text(json.dumps({"step": step, **progress}))
            _check_parts(partial)
            files = {path.name: file_sha256(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": files}, indent=2))
            for path in (*partial.iterdir(), partial):  # contents before names
                to_disk(path)
            final = self.folder / f"step_{step:07d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            to_disk(self.folder)
            self._remove_old()
        except BaseException as error:  # DCP wraps what a rank met in a class of its own that is no Exception
            reason = _reason(error)
            if dist.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            kept = complete(self.folder)
            last = f"{kept[-1]} is intact" if kept else "there is none before it"
            message = f"the checkpoint of step {step} could not be written ({reason}); {last}"
            say(message)
            raise CheckpointError(message) from None

    def _remove_old(self) -> None:
        for old in complete(self.folder)[: -self.keep]:
            if not self.keep_every or _step(old) % self.keep_every:
                _discard(old)


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were written whole, oldest first; what happened to their files since, `newest` finds out."""
    found = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))  # not step_best, somebody's copy
    return sorted(found, key=lambda path: (len(path.name), path.name))  # names have 7 digits or more


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the hashes of its manifest; damaged ones are named and set aside.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    choice: list[Any] = [None]
    if dist.is_main():
        damaged: list[tuple[Path, str]] = []
        for path in reversed(complete(folder)):
            damage = _damage(path)
            if damage is None:
                choice = [str(path)]
                break
            damaged.append((path, damage))
        if damaged and choice[0] is None:
            reasons = "; ".join(f"{path.name}: {damage}" for path, damage in damaged)
            choice = [CheckpointError(f"all checkpoints in {folder} are damaged ({reasons}); choose another out=")]
        for path, damage in damaged if isinstance(choice[0], str) else []:
            aside = folder / f"damaged_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"{path} is damaged ({damage}); set aside as {aside.name}, going back to the one before")
    if dist.world_size() > 1:
        td.broadcast_object_list(choice)
    if isinstance(choice[0], CheckpointError):
        raise choice[0]
    return None if choice[0] is None else Path(choice[0])


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint; returns its progress, with `step`.

    Raises:
        CheckpointError: a tensor is not in it, or of another shape.
    """
    _quiet()
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=dist.world_size() == 1)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # DCP's are no Exception
        raise CheckpointError(
            f"{path} does not fit this configuration ({_reason(error)}); give the one that the run began with, or "
            "another out="
        ) from None
    return json.loads((path / PROGRESS).read_text())


def _discard(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        say(f"{path} is not needed and could not be removed ({error.strerror or error})")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _check_parts(partial: Path) -> None:
    """That the tensors of all ranks are here, and not on a disk which this one does not see."""
    written = dcp.FileSystemReader(partial).read_metadata().storage_data or {}
    for name in sorted({info.relative_path for info in written.values()}):
        if not (partial / name).is_file():
            raise OSError(f"{name}, of another rank, is not in {partial}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["step"] != _step(path):  # its name would have newer ones removed
            return f"it is that of step {manifest['step']} under another name"
        expected = manifest["sha256"]
        for name, sha256 in expected.items():
            if file_sha256(path / name) != sha256:
                return f"{name} has changed"
        if not {PROGRESS, ".metadata"} <= expected.keys() or not any(name.endswith(".distcp") for name in expected):
            return f"{MANIFEST} does not name all files"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return None


def _reason(error: BaseException) -> str:
    """The system's words where the system failed, out of what DCP and torch's writer wrap around them."""
    failures = getattr(error, "failures", None)
    inner: BaseException | None = next(iter(failures.values()))[0] if failures else error
    while inner is not None:
        if isinstance(inner, OSError):
            return str(inner)
        error, inner = inner, inner.__cause__ or inner.__context__
    text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    # What another rank met comes without its cause; torch's writer says so when it could not write all of it.
    return "a file could not be written whole; is the disk full?" if "unexpected pos" in text else text


def _quiet() -> None:
    """One process is what a laptop has; torch warns about it at every call, in its own thread too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
