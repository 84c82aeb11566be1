"""The results file: a figure never travels without its protocol, its weights, its data and its command."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vtp.config import ConfigError
from vtp.engine.logging import environment
from vtp.files import file_sha256
from vtp.images import to_uint8


class Seen:
    """What an evaluation looked at: counts and hashes pictures and labels as they pass, whatever the batch size."""

    def __init__(self) -> None:
        self.count = 0
        self._pictures, self._labels = hashlib.sha256(), hashlib.sha256()
        self.each: set[int] = set()  # a hash of each picture

    def passing(self, batches: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
        """The same batches of (normalised images, labels or keys)."""
        for images, labels in batches:
            self.count += len(images)
            pixels = to_uint8(images).cpu().numpy()
            self._pictures.update(pixels.tobytes())
            self.each.update(hash(picture.tobytes()) for picture in pixels)
            for label in labels.tolist() if isinstance(labels, Tensor) else labels:
                self._labels.update(f"{label}\n".encode())
            yield images, labels

    @property
    def sha256(self) -> str:
        """Of the pictures as the network saw them (as bytes), and of their labels."""
        return hashlib.sha256(self._pictures.digest() + self._labels.digest()).hexdigest()


def write_result(
    out: Path | None,
    *,
    task: str,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    weights: Path | None,
    data_sha256: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Make the results object, write it as JSON to `out` (in one piece) if given, and return it.

    Args:
        weights: the safetensors file that was evaluated; None where there was no model.

    Raises:
        ConfigError: a metric that is not a finite number; JSON has no word for it, and no reader should meet it.
    """
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise ConfigError(f"{task}: {wrong[0]} is {metrics[wrong[0]]}; the model or the data is broken")
    here = environment()
    result = {
        "task": task,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "protocol": dict(protocol),
        "model_sha256": None if weights is None else file_sha256(weights),
        "data_sha256": data_sha256,
        "seed": seed,
        "command": here["command"],
        "versions": {"python": here["python"], **here["versions"]},
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        part.replace(out)
    return result
