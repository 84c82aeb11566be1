"""What a source holds: counts, sizes, captions, duplicates, broken samples by reason, and a contact sheet."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtp.config import ConfigError
from vtp.data.decode import BadImage
from vtp.data.samples import LOST, Raw, Source, kept, left_out
from vtp.data.sources import shares
from vtp.images import center_crop

COLUMNS, ROWS, TILE, LINE, LINES, GAP = 8, 5, 160, 14, 2, 8  # of the contact sheet; pixels
GROUND = "#f4f4f4"
NAMED = 20  # broken and repeated samples that are named


def inspect(
    source: Source, limit: int | None = None, progress: Callable[[int], None] = lambda n: None
) -> tuple[dict[str, Any], list[tuple[Image.Image, str]]]:
    """Read a source once and decode every picture.

    Args:
        limit: samples at most; spread over the source where it has random access.
        progress: told how many samples were read.

    Returns:
        JSON values, and pictures spread over those read: squares, each with its first caption or its key.

    Raises:
        ConfigError: no picture can be read.
    """
    source.report.clear()
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    captions_each: Counter[int] = Counter()
    labels: dict[str, Counter[int]] = {label: Counter() for label in source.classes}
    broken: list[dict[str, str]] = []
    keys: dict[bytes, str] = {}
    repeated: list[dict[str, str]] = []
    repeats = size_in_bytes = 0
    shown: list[tuple[Image.Image, str]] = []
    every = 1  # a picture of every so many is kept; doubled whenever the sheet is full twice over
    whole: list[bool] = []  # of each part
    for n, raw in enumerate(_spread(source, limit, whole), start=1):
        progress(n)
        try:
            pixels = raw.decoded()
        except BadImage as error:
            source.report[error.reason] += 1
            if len(broken) < NAMED:
                broken.append({"key": raw.key, "reason": str(error)})
            continue
        data = raw.image if isinstance(raw.image, bytes) else raw.image.tobytes()
        size_in_bytes += len(data)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in keys:
            repeats += 1
            if len(repeated) < NAMED:
                repeated.append({"key": raw.key, "same_as": keys[digest]})
        keys.setdefault(digest, raw.key)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        captions_each[len(raw.captions)] += 1
        lengths += [len(caption.split()) for caption in raw.captions]
        for label, value in raw.labels.items():
            if label in labels:
                labels[label][value] += 1
        if (len(sizes) - 1) % every == 0:
            shown.append((center_crop(Image.fromarray(pixels), TILE), raw.captions[0] if raw.captions else raw.key))
            if len(shown) == 2 * COLUMNS * ROWS:
                shown, every = shown[::2], every * 2
    if not sizes:
        raise ConfigError(f"{source.name}: no picture can be read ({dict(left_out(source.report))})")
    width, height = np.array(sizes).T
    summary = {
        "data": source.name,
        "samples": source.report["samples"],
        "usable": len(sizes),
        "whole": all(whole),
        "left_out": dict(left_out(source.report).most_common()),
        "kept": kept(source.report),
        LOST: source.report[LOST],
        "broken": broken,
        "repeated": repeats,
        "repeats": repeated,
        "mean_kilobytes": round(size_in_bytes / len(sizes) / 1e3, 1),
        "width": _quantiles(width),
        "height": _quantiles(height),
        "aspect": _quantiles(width / height),
        "commonest_sizes": {f"{w} x {h}": n for (w, h), n in Counter(sizes).most_common(5)},
        "captions_a_picture": dict(sorted(captions_each.items())),
        "words_a_caption": _quantiles(np.array(lengths)) if lengths else None,
        "labels": {
            label: {
                "classes": len(source.classes[label]),
                "found": len(found),
                "commonest": {source.classes[label][i]: n for i, n in found.most_common(5)},
            }
            for label, found in labels.items()
        },
    }
    spread = np.linspace(0, len(shown) - 1, min(len(shown), COLUMNS * ROWS)).round().astype(int)
    return summary, [shown[i] for i in spread]


def _spread(source: Source, limit: int | None, whole: list[bool]) -> Iterator[Raw]:
    """At most `limit` samples, of each part of a mixture its share: in order, or at even distances with random access.

    `whole` is told of each part whether that is all of it.
    """
    for (part, _), n in zip(source.parts, shares(source, limit), strict=True):
        shards = part.shards
        if n is not None and part.random_access and n < len(shards):
            shards = [shards[i * len(shards) // n] for i in range(n)]
        read = 0
        for raw in islice((raw for shard in shards for raw in part.read(shard)), n):
            read += 1
            yield raw
        whole.append(n is None or (len(shards) == len(part.shards) and (read < n or part.random_access)))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
    return {name: round(float(np.percentile(values, q)), 2) for name, q in names.items()}


def contact_sheet(pictures: list[tuple[Image.Image, str]]) -> Image.Image:
    """Square pictures with two lines of text under each."""
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    right, down = TILE + GAP, TILE + LINES * LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * right, GAP + rows * down), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (picture, text) in enumerate(pictures):
        x, y = GAP + i % columns * right, GAP + i // columns * down
        sheet.paste(picture, (x, y))
        for n, line in enumerate(_lines(text, lambda part: draw.textlength(part, font) <= TILE)):
            draw.text((x, y + TILE + 1 + n * LINE), line, "black", font)
    return sheet


def _lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text in `LINES` lines, broken at words where that goes, and cut where it has more."""
    text, lines = " ".join(text.split())[:200], list[str]()
    while text and len(lines) < LINES:
        n = next(n for n in range(len(text), 0, -1) if n == 1 or fits(text[:n]))
        last = len(lines) == LINES - 1
        if n < len(text) and last:
            lines.append(text[: n - 1] + "…")
        elif n < len(text):
            n = text.rfind(" ", 0, n + 1) + 1 or n
            lines.append(text[:n])
        else:
            lines.append(text)
        text = text[n:]
    return lines
