"""What pages are made of: pictures, tables and legends as HTML. Text from data and files is escaped, always."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from vtp.report import findings, plots
from vtp.report.runs import Run

LOSSLESS = 128  # pixels: larger pictures are kept as JPEG, or the page grows heavy


def self_contained(title: str, body: str) -> str:
    """A whole page: `title` is text, `body` HTML."""
    here = resources.files("vtp.report")
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), css=(here / "page.css").read_text(encoding="utf-8"), body=body
    )


def figures_table(names: Sequence[str], body: str) -> str:
    """Rows of figures (HTML) under a column for each name."""
    heads = "".join(f'<th class="value">{escape(name)}</th>' for name in names)
    head = f"<thead><tr><th>figure</th>{heads}<th class='better'>better</th></tr></thead>"
    return f'<div class="scroll"><table class="figures">{head}<tbody>{body}</tbody></table></div>'


def figures_row(row: findings.Row, before: str = "") -> str:
    """One figure of all columns, the best one marked."""
    cells = "".join(
        f'<td class="value">{"&ndash;" if text is None else _best(escape(text), i == row.best)}</td>'
        for i, text in enumerate(row.shown)
    )
    better = {1: "higher", -1: "lower"}.get(row.better, "")
    return f'<tr><th>{escape(before + row.label)}</th>{cells}<td class="better">{better}</td></tr>'


def _best(text: str, best: bool) -> str:
    return f'<span class="best">{text}</span>' if best else text


def key(index: int, run: Run) -> str:
    """A run's name with its line's colour and dashes."""
    colour, dashes = f"var(--run-{index % len(plots.RUNS)})", plots.CSS_DASHES[index % len(plots.CSS_DASHES)]
    line = f'<line x1="0" y1="5" x2="34" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    return f'<span class="key"><svg viewBox="0 0 34 10" aria-hidden="true">{line}</svg>{escape(run.name)}</span>'


def legend(runs: Sequence[Run]) -> str:
    return "<p>" + "".join(key(i, run) for i, run in enumerate(runs)) + "</p>" if len(runs) > 1 else ""


def sheet(rows: Mapping[str, Sequence[UInt8[ndarray, "h w 3"]]]) -> str:
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{img(image, name, 128)}</td>' for image in images)}</tr>"
        for name, images in rows.items()
    )
    return f'<table class="sheet"><tbody>{body}</tbody></table>'


def card(tiles: str, captions: Sequence[str]) -> str:
    caption = f"<figcaption>{escape(captions[0][:160])}</figcaption>" if captions else ""
    return f'<figure class="card"><div class="row">{tiles}</div>{caption}</figure>'


def tile(image: UInt8[ndarray, "h w 3"], text: str) -> str:
    return f'<div class="tile">{img(image, text, 256)}<span>{escape(text)}</span></div>'


def img(pixels: UInt8[ndarray, "h w 3"], alt: str, limit: int, lossless: int = LOSSLESS) -> str:
    """A picture inside the page, at most `limit` pixels wide; small ones are enlarged without blur."""
    image = Image.fromarray(pixels)
    image.thumbnail((limit, limit))
    small = max(image.size) <= 64
    file = io.BytesIO()
    if max(image.size) <= lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=90)
    kind = "png" if max(image.size) <= lossless else "jpeg"
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{" class=small" * small} alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'
