"""`vtp compare`: tokenizers side by side in the terminal, as JSON, as a picture and as one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from vtp.config import ConfigError
from vtp.evaluation.compare import common_size, compare
from vtp.evaluation.reconstruct_files import ERROR_GAIN, GROUND, error_map
from vtp.evaluation.run import EvalConfig
from vtp.images import center_crop, denormalise, normalise, to_uint8
from vtp.metrics.fidelity import psnr
from vtp.models.card import naming_parts
from vtp.report.findings import Row, kind, show
from vtp.report.markup import figures_row, figures_table, img, self_contained
from vtp.report.pictures import read_held_out

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 6  # pictures in the grid
TILE = 192  # pixels: smaller pictures are enlarged by a whole number up to about this
GAP, LINE = 6, 20  # pixels between tiles, and of a line of text
EVEN = 1.1  # a rate is the best only if it is more than a tenth above the next: less is the machine's mood

# By a tokenizer's name: its reconstructions, and the PSNR of each in dB.
Columns = dict[str, tuple[UInt8[ndarray, "n s s 3"], list[float]]]


def write_comparison(
    tokenizers: Sequence[Path], data: str, out: Path, *, extractor: str | None = None, cfg: EvalConfig
) -> list[dict[str, Any]]:
    """Compare tokenizers on the images of `data`; write OUT/compare.json, OUT/compare.png and OUT/compare.html.

    Args:
        tokenizers: folders of VTP or of diffusers' AutoencoderKL, each once.
        extractor: network of a Frechet distance, as in `vtp eval reconstruction`.
        cfg: size (None: the one the tokenizers agree on), limit, batch_size, device, precision and annotations.

    Returns:
        The results objects of `evaluation.compare.compare`.

    Raises:
        ConfigError: no such tokenizer or data, a tokenizer named twice, or no size that suits all.
    """
    folders = [folder.resolve() for folder in tokenizers]
    twice = next((folder for folder in tokenizers if folders.count(folder.resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; name each tokenizer once")
    size = common_size(tokenizers, cfg.size)
    out.mkdir(parents=True, exist_ok=True)  # before the work: it may fail
    samples = read_held_out(data, cfg.annotations, size).samples
    samples = samples[:: max(1, len(samples) // SHOWN)][:SHOWN]
    if not samples:
        raise ConfigError(f"{data} holds no picture that can be read")
    squares = np.stack([np.asarray(center_crop(Image.fromarray(s.image), size)) for s in samples])
    images = normalise(torch.from_numpy(squares).permute(0, 3, 1, 2))
    compared = compare(tokenizers, data, size, images, extractor=extractor, cfg=cfg)
    names, results = short_names(tokenizers), [c.result for c in compared]
    columns: Columns = {}
    for name, (_, back) in zip(names, compared, strict=True):
        decibels = psnr(denormalise(back), denormalise(images)).tolist()
        columns[name] = (to_uint8(back).permute(0, 2, 3, 1).numpy(), decibels)
    picture = grid(squares, columns)
    (out / "compare.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    picture.save(out / "compare.png")
    (out / "compare.html").write_text(_page(results, squares, columns), encoding="utf-8")
    return results


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart; RUN/tokenizer is called after the run."""
    named = [naming_parts(folder) for folder in folders]
    parts = named if len(set(named)) == len(named) else [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """What is compared, a row a figure."""
    found = []
    for metric in results[0]["metrics"]:
        values = [float(r["metrics"][metric]) for r in results]
        rate = metric.endswith("_per_second")
        better = 1 if rate else kind(metric).better
        label = metric.replace("_images_per_second", ", images/s") if rate else kind(metric).label
        first, *others = sorted(values, key=lambda v: -better * v)
        apart = bool(others) and (first > EVEN * others[0] if rate else first != others[0])
        best = values.index(first) if better and apart else None
        found.append(Row(metric, label, [show(metric, v) for v in values], list(values), better, best))

    def plain(label: str, texts: Sequence[str]) -> None:
        found.append(Row(label, label, list(texts), [None] * len(texts), 0, None))

    about = [r["tokenizer"] for r in results]
    plain("latent", [" x ".join(map(str, a["latent"])) for a in about])
    plain("pixel values a latent value", [f"{a['compression']:.1f}" for a in about])
    for part in ("encoder", "decoder"):
        plain(f"{part}, parameters", [f"{a['parameters'][part] / 1e6:.2f} M" for a in about])
    plain("make", [a["kind"] for a in about])
    return found


def table(tokenizers: Sequence[Path], results: Sequence[dict[str, Any]]) -> Table:
    """The comparison for the terminal: `rich.print(table(tokenizers, results))`."""
    from rich.markup import escape
    from rich.table import Column, Table

    columns = [Column(escape(name), justify="right", overflow="fold") for name in short_names(tokenizers)]
    shown = Table("figure", *columns, "better", caption=protocol(results))
    for row in rows(results):
        cells = [
            f"[bold]{escape(text)}[/]" if i == row.best else escape(text) for i, text in enumerate(row.shown) if text
        ]
        shown.add_row(escape(row.label), *cells, {1: "higher", -1: "lower"}.get(row.better, ""))
    return shown


def protocol(results: Sequence[dict[str, Any]]) -> str:
    """What all of them share, in one sentence."""
    p = results[0]["protocol"]
    distance = f"; distance in {p['extractor']}" if "extractor" in p else ""
    threads = f", threads: {p['threads']}" if "threads" in p else ""
    return (
        f"{p['images']:,} images of {p['data']}, centre crop at {p['size']} px{distance}; {p['precision']}, "
        f"batches of {p['batch_size']} on {p['device']}{threads}"
    )


def grid(originals: UInt8[ndarray, "n s s 3"], columns: Columns) -> Image.Image:
    """A row a picture: the original, then each tokenizer's (reconstructions, PSNR in dB) with its error map."""
    size = originals.shape[1]
    side = size * max(1, round(TILE / size))
    font = ImageFont.load_default(13)
    width, height = 1 + 2 * len(columns), len(originals)
    step_x, step_y = side + GAP, side + LINE + GAP
    top = 2 * LINE + GAP  # two lines of names
    sheet = Image.new("RGB", (width * step_x + GAP, top + height * step_y), GROUND)
    draw = ImageDraw.Draw(sheet)

    def put(x: int, y: int, pixels: UInt8[ndarray, "s s 3"], text: str) -> None:
        corner = (GAP + x * step_x, top + y * step_y)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), corner)
        draw.text((corner[0], corner[1] + side + 2), text, "black", font)

    draw.text((GAP, LINE + 3), "original", "black", font)
    for x, (name, (pictures, decibels)) in enumerate(columns.items()):
        left = GAP + (1 + 2 * x) * step_x
        while draw.textlength(name, font) > 2 * side:
            name = "…" + name.lstrip("…")[1:]
        draw.text((left, 3), name, "black", font)
        draw.text((left, LINE + 3), "reconstruction", "#555", font)
        draw.text((left + step_x, LINE + 3), f"error, x {ERROR_GAIN}", "#555", font)
        for y, picture in enumerate(pictures):
            put(1 + 2 * x, y, picture, f"{decibels[y]:.1f} dB")
            put(2 + 2 * x, y, error_map(originals[y], picture), "")
    for y, picture in enumerate(originals):
        put(0, y, picture, "")
    return sheet


def _page(results: Sequence[dict[str, Any]], originals: UInt8[ndarray, "n s s 3"], columns: Columns) -> str:
    body = "".join(figures_row(row) for row in rows(results))
    title = "Tokenizers side by side"
    return self_contained(
        title,
        f'<header><h1>{title}</h1><p class="lead">{escape(protocol(results))}.</p></header>'
        f'<p class="note"><span class="best">best</span>, where one way is better; among rates only where it is more '
        f"than {EVEN - 1:.0%} ahead. Rates: {escape(results[0]['protocol']['rates'])}.</p>"
        f"{figures_table(list(columns), body)}"
        "<h2>Pictures</h2><p class='note'>Under each reconstruction its PSNR. Error: mean over colours of the absolute "
        f"difference, {ERROR_GAIN} times enlarged; black is none.</p>{_pictures(originals, columns)}"
        f"<details><summary>Results with their protocols</summary><pre>{escape(json.dumps(results, indent=2))}</pre>"
        "</details>",
    )


def _pictures(originals: UInt8[ndarray, "n s s 3"], columns: Columns) -> str:
    """The pictures of `grid` as a table that scrolls sideways under the originals."""

    def picture(pixels: UInt8[ndarray, "s s 3"], alt: str) -> str:
        return img(pixels, alt, limit=len(pixels), lossless=len(pixels))  # JPEG would add errors of its own

    names = "".join(f'<th colspan="2"><div>{escape(name)}</div></th>' for name in columns)
    kinds = f'<td class="note">reconstruction</td><td class="note">error, x {ERROR_GAIN}</td>' * len(columns)
    body = ""
    for i, original in enumerate(originals):
        body += f"<tr><th>{picture(original, 'original')}</th>"
        for name, (made, decibels) in columns.items():
            body += f"<td>{picture(made[i], name)}{decibels[i]:.1f} dB</td>"
            body += f"<td>{picture(error_map(original, made[i]), f'error of {name}')}</td>"
        body += "</tr>"
    head = f'<thead><tr><th rowspan="2">original</th>{names}</tr><tr>{kinds}</tr></thead>'
    return f'<div class="scroll"><table class="side">{head}<tbody>{body}</tbody></table></div>'
