"""A run folder -> what its files say. Anything may be missing: that is noted, and the page goes on without it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vtp.config import ConfigError


@dataclass
class Run:
    """One run, read."""

    path: Path
    name: str
    config: dict[str, Any]  # {} where there is none
    environment: dict[str, Any]
    metrics: list[dict[str, float]]  # finite numbers only, by step
    dit_metrics: list[dict[str, float]]
    results: dict[str, dict[str, Any]]  # eval/NAME.json by NAME
    notes: list[str] = field(default_factory=list)  # what is missing or broken, in sentences

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, None where a key is absent."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def losses(self) -> tuple[str, ...]:
        """Names that metrics.jsonl logged at least once, in order of first appearance."""
        return tuple(dict.fromkeys(name for line in self.metrics for name in line))

    def last(self, name: str) -> float | None:
        """The last logged value of `name`."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)

    def mean_of_last(self, name: str, share: float = 0.1) -> float | None:
        """Mean of the last tenth of the logged values of `name`: one noisy line decides nothing."""
        values = [line[name] for line in self.metrics if name in line]
        tail = values[-max(1, round(share * len(values))) :]
        return sum(tail) / len(tail) if tail else None

    @property
    def tokenizer(self) -> Path | None:
        """The published tokenizer's folder, if there."""
        folder = self.path / "tokenizer"
        return folder if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file() else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders; equal folder names are told apart by their parents' names.

    Raises:
        ConfigError: no run given, a folder that does not exist, or one without any of a run's files.
    """
    if not paths:
        raise ConfigError("report needs at least one run folder")
    resolved = [Path(path).resolve() for path in paths]
    names = [path.name for path in resolved]
    unique = [p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}" for p in resolved]
    return [_read(path, name) for path, name in zip(resolved, unique, strict=True)]


def _read(path: Path, name: str) -> Run:
    known = ("config.yaml", "environment.json", "metrics.jsonl", "tokenizer", "eval")
    if not path.is_dir():
        raise ConfigError(f"no run folder at {path}")
    if not any((path / file).exists() for file in known):
        raise ConfigError(f"{path} is no run folder: it holds none of {', '.join(known)}")
    notes: list[str] = []
    run = Run(
        path=path,
        name=name,
        config=_config(path / "config.yaml", notes),
        environment=_json(path / "environment.json", notes),
        metrics=_metrics(path / "metrics.jsonl", notes),
        dit_metrics=_metrics(path / "dit" / "metrics.jsonl", notes) if (path / "dit").is_dir() else [],
        results={},
        notes=notes,
    )
    for file in sorted((path / "eval").glob("*.json")):
        result = _json(file, notes)
        if isinstance(result.get("metrics"), Mapping):
            run.results[file.stem] = result
        elif result:
            notes.append(f"eval/{file.name} has no metrics and was left out.")
    if not run.results:
        notes.append("There is no result in eval/, so no figures are shown.")
    if run.tokenizer is None:
        notes.append("There is no tokenizer/ to open, so no pictures were computed.")
    return run


def _config(file: Path, notes: list[str]) -> dict[str, Any]:
    """The plain tree: a report also reads runs of other versions, whose keys may differ."""
    if not file.is_file():
        notes.append(f"{file.name} is missing.")
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # yaml's own error classes are not part of OmegaConf's interface
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _json(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        notes.append(f"{file.name} is missing.")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _metrics(file: Path, notes: list[str]) -> list[dict[str, float]]:
    shown = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        notes.append(f"{shown} is missing, so there are no curves of it.")
        return []
    lines, broken = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        line = _line(text)
        if line is None:
            broken += 1
        else:
            lines.append(line)
    if broken:
        notes.append(f"{shown}: {broken} broken line{'s' if broken > 1 else ''} skipped.")
    return sorted(lines, key=lambda line: line["step"])


def _line(text: str) -> dict[str, float] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not _finite(line.get("step")):
        return None
    return {name: float(value) for name, value in line.items() if _finite(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in a result's metrics, nested names joined by a dot."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}.")
        elif _finite(value):
            yield f"{prefix}{name}", float(value)
