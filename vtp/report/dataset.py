"""`vtp data inspect`: what a source holds, in the terminal, as JSON, as a picture and as one page."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp.data.inspection import NAMED, TILE, contact_sheet, inspect
from vtp.data.samples import LOST
from vtp.data.sources import open_source
from vtp.report.markup import card, img, self_contained

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table


def write_inspection(data: str, annotations: str | None, limit: int | None, out: Path) -> dict[str, Any]:
    """Read `data` once; write OUT/inspect.json, OUT/contact_sheet.png and OUT/inspect.html.

    Raises:
        ConfigError: no such data, or no picture in it can be read.
    """
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from vtp.engine.logging import console

    source = open_source(data, annotations)
    out.mkdir(parents=True, exist_ok=True)  # before the work: it may fail
    total = limit or (len(source.shards) if source.random_access else None)
    name = TextColumn("{task.description}", markup=False)  # braces and brackets stand in names of shards
    columns = (SpinnerColumn(), name, MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(data, total=total)
        summary, pictures = inspect(source, limit, lambda n: bar.update(task, completed=n))
        bar.update(task, completed=summary["samples"], total=summary["samples"])  # those left out on the way as well
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (out / "inspect.json").write_text(text, encoding="utf-8", errors="replace")  # names of files need not be UTF-8
    contact_sheet(pictures).save(out / "contact_sheet.png", optimize=True)
    (out / "inspect.html").write_text(_page(summary, pictures), encoding="utf-8", errors="replace")
    return summary


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the terminal and the page show: (name, text)."""

    def spread(values: dict[str, float] | None) -> str:
        shown = [f"{name} {value:,.2f}".removesuffix(".00") for name, value in (values or {}).items()]
        return ", ".join(shown) or "none"

    def listed(counts: dict[Any, int]) -> str:
        return ", ".join(f"{name}: {n:,}" for name, n in counts.items())

    found = [
        ("samples read", f"{summary['samples']:,}" + ("" if summary["whole"] else " (a part)")),
        ("usable pictures", f"{summary['usable']:,}, {summary['mean_kilobytes']:,} kB on average"),
        ("samples or files left out", listed(summary["left_out"]) or "none"),
        (LOST, f"{summary[LOST]:,}"),
        ("counted, but kept", listed(summary["kept"]) or "none"),
        ("same bytes as another", f"{summary['repeated']:,}"),
        ("width", spread(summary["width"])),
        ("height", spread(summary["height"])),
        ("width / height", spread(summary["aspect"])),
        ("commonest sizes", listed(summary["commonest_sizes"])),
        ("captions a picture", listed({f"{k} each": n for k, n in summary["captions_a_picture"].items()})),
        ("words a caption", spread(summary["words_a_caption"])),
    ]
    for label, about in summary["labels"].items():
        classes = f"{about['found']:,} of {about['classes']:,} classes"
        found.append((f"label {label}", f"{classes}; {listed(about['commonest'])}"))
    found += [(f"broken: {b['key']}", b["reason"]) for b in summary["broken"]]
    found += [(f"repeated: {r['key']}", f"same bytes as {r['same_as']}") for r in summary["repeats"]]
    if NAMED in (len(summary["broken"]), len(summary["repeats"])):
        found.append(("", f"of broken and repeated ones the first {NAMED} are named"))
    return found


def table(summary: dict[str, Any]) -> Table:
    """The inspection for the terminal: `rich.print(table(summary))`."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table("", escape(summary["data"]), show_lines=False)
    for name, text in rows(summary):
        shown.add_row(escape(name), escape(text))
    return shown


def _page(summary: dict[str, Any], pictures: list[tuple[Image.Image, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows(summary))
    cards = "".join(card(img(np.asarray(picture), "", limit=TILE), [text]) for picture, text in pictures)
    return self_contained(
        f"Data: {summary['data']}",
        f"<header><h1>{escape(summary['data'])}</h1></header>"
        f'<div class="scroll"><table class="figures"><tbody>{body}</tbody></table></div><h2>Pictures</h2>'
        f'<div class="cards" style="--tiles: 1.6">{cards}</div>'
        f"<details><summary>inspect.json</summary><pre>{escape(json.dumps(summary, indent=2))}</pre></details>",
    )
