"""Curves as inline SVG. Colours are CSS variables: one drawing serves the light page, the dark one and paper."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

POINTS = 500  # at most so many of a raw curve: more than there are pixels
DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))  # runs differ by more than colour
CSS_DASHES = ("none", "9 3", "3 3", "10 3 2 3")  # the same for the legend
# Matplotlib draws in these colours; the page says what they are.
INK, GRID, REFERENCE = "#010101", "#020202", "#030303"
RUNS = tuple(f"#0404{i:02x}" for i in range(4, 10))
_VARIABLES = {INK: "--muted", GRID: "--grid", REFERENCE: "--ink-2"} | {c: f"--run-{i}" for i, c in enumerate(RUNS)}


class Curve(NamedTuple):
    """One line: x (images seen) and y of equal length; `run` picks colour and dashes."""

    x: Float[ndarray, " n"]
    y: Float[ndarray, " n"]
    run: int
    name: str = ""  # written beside it, for curves of one run in one panel


def smooth(y: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Centred moving mean over a twentieth of the curve; windows shrink symmetrically at the ends."""
    half = len(y) // 40
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def panel(
    curves: Sequence[Curve],
    label: str,
    reference: tuple[float, str] | None = None,
    xlabel: str = "images seen",
    floor: float | None = None,
) -> str:
    """An SVG of curves over images seen: raw values faint, smoothed ones over them.

    Args:
        label: what is described, for those who cannot see it.
        reference: a horizontal line and its name.
        floor: a value the vertical axis must include.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    # The ids of clip paths must not depend on chance, or a page changes when nothing did.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{label}{len(curves)}",
        "path.simplify": True,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.7, 2.35), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(GRID)
        axes.tick_params(colors=INK, length=2.5, width=0.6)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        shown: list[Float[ndarray, " n"]] = []
        for curve in curves:
            colour, dashes = RUNS[curve.run % len(RUNS)], DASHES[curve.run % len(DASHES)]
            smoothed = smooth(curve.y)
            step = max(1, math.ceil(len(curve.x) / POINTS))
            axes.plot(curve.x[::step], curve.y[::step], color=colour, alpha=0.22, linewidth=0.7)
            axes.plot(curve.x[::step], smoothed[::step], color=colour, linewidth=1.7, linestyle=dashes)
            if len(curve.x) == 1:
                axes.plot(curve.x, curve.y, "o", color=colour, markersize=4)
            if curve.name:  # at opposite ends and sides: curves that lie close keep their names apart
                end, x, y, ha, va = ((0, 2, 5, "left", "bottom"), (-1, -2, -4, "right", "top"))[len(shown) % 2]
                place = (curve.x[end], smoothed[end])
                axes.annotate(curve.name, place, (x, y), textcoords="offset points", color=INK, ha=ha, va=va)
            shown.append(curve.y)
        low, high = _limits(np.concatenate(shown), reference, floor)
        axes.set_ylim(low, high)
        if reference is not None:
            axes.axhline(reference[0], color=REFERENCE, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.annotate(
                reference[1],
                (1, reference[0]),
                (-2, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=REFERENCE,
                ha="right",
                va="bottom",
            )
        axes.set_xlabel(xlabel, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), label)


def _limits(y: Float[ndarray, " n"], reference: tuple[float, str] | None, floor: float | None) -> tuple[float, float]:
    """Room for the curves without the first few wild steps, and for the reference."""
    values = [*np.quantile(y, (0.0, 0.98)).tolist(), float(np.median(y))]
    if reference is not None:
        values.append(reference[0])
    if floor is not None:
        values.append(floor)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) if high > low else 0.1 * abs(high) or 1.0
    room = 0 if reference is None or reference[0] < high else 0.09 * (high - low)  # for the reference's name
    return (low if low == floor else low - margin), high + margin + room


def _tick(value: float, _: int) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value / 1000:.3g}k"


def _inline(svg: str, label: str) -> str:
    """The drawing alone, without prolog and metadata, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :])
