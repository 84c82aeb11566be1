"""What the benchmarks share: the line that they print, and the memory of a process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path


def line(name: str, value: float, unit: str, peer: str, peer_value: float, ratio: float, digits: int = 2) -> None:
    """Print one figure beside its peer's as JSON."""
    values = {"value": round(value, digits), "unit": unit, "peer": peer, "peer_value": round(peer_value, digits)}
    print(json.dumps({"name": name, **values, "ratio": round(ratio, digits)}), flush=True)


def watch_peak() -> Callable[[], float]:
    """From now on; the result says how many MB this process's peak is above what it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    return lambda: _resident("VmHWM") - before


def _resident(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, MB."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000
