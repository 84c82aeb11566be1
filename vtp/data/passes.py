"""Plain passes over a source, for evaluation: every sample once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from vtp.config import ConfigError
from vtp.data.samples import Raw, Source
from vtp.data.sources import counts
from vtp.images import normalise, squash

Resize = Callable[[Image.Image, int], Image.Image]


def image_batches(
    source: Source, size: int, batch_size: int, resize: Resize = squash, limit: int | None = None
) -> Iterator[tuple[Float[Tensor, "b 3 size size"], list[str]]]:
    """(images, keys) of all readable samples in order, ImageNet-normalised; the last batch may be smaller.

    Args:
        resize: images.squash or images.center_crop.
        limit: take that many only, spread over the source where it has random access.
    """
    for images, raws in _passes(source, size, batch_size, resize, limit, lambda raw: True):
        yield images, [raw.key for raw in raws]


def captioned_batches(
    source: Source, size: int, batch_size: int, resize: Resize = squash, limit: int | None = None
) -> Iterator[tuple[Float[Tensor, "b 3 size size"], list[tuple[str, ...]]]]:
    """(images, captions of each) of all samples that have captions; otherwise as `image_batches`."""
    for images, raws in _passes(source, size, batch_size, resize, limit, lambda raw: bool(raw.captions)):
        yield images, [raw.captions for raw in raws]


def labelled_batches(
    source: Source,
    label: str,
    size: int,
    batch_size: int,
    top: int | None = None,
    resize: Resize = squash,
    limit: int | None = None,
) -> Iterator[tuple[Float[Tensor, "b 3 size size"], Int[Tensor, " b"]]]:
    """(images, labels) of all samples that have the label; a label is an index into `class_names(source, label, top)`.

    Otherwise as `image_batches`.
    """
    kept = _kept(source, label, top)
    number = {c: i for i, c in enumerate(kept)}
    for images, raws in _passes(source, size, batch_size, resize, limit, lambda raw: raw.labels.get(label) in number):
        yield images, torch.tensor([number[raw.labels[label]] for raw in raws])


def class_names(source: Source, label: str, top: int | None = None) -> tuple[str, ...]:
    """Names of a label's classes, or of its `top` commonest ones, in the order in which the source lists them."""
    return tuple(source.classes[label][i] for i in _kept(source, label, top))


def _kept(source: Source, label: str, top: int | None) -> list[int]:
    if label not in source.classes:
        known = ", ".join(source.classes) if source.classes else "none; give annotations=FILE.jsonl or class folders"
        raise ConfigError(f"{source.name} has no label '{label}' (its labels: {known})")
    n = len(source.classes[label])
    if top is not None and top < 1:
        raise ConfigError(f"top must be at least 1, not {top}")
    if top is None or top >= n:
        return list(range(n))
    return sorted(np.argsort(-counts(source, label), kind="stable")[:top].tolist())


def _passes(
    source: Source, size: int, batch_size: int, resize: Resize, limit: int | None, wanted: Callable[[Raw], bool]
) -> Iterator[tuple[Tensor, list[Raw]]]:
    order: Iterable[Any] = range(len(source.shards))
    if limit is not None and source.random_access:  # a folder sorted by class would give the first classes only
        order = np.random.default_rng(0).permutation(len(source.shards))
    found = (
        (raw._replace(image=b""), image)
        for i in order
        for raw in source.read(source.shards[int(i)], size)
        if wanted(raw) and (image := raw.pixels(source.report)) is not None
    )
    first = islice(found, limit)
    while rows := list(islice(first, batch_size)):
        images = np.stack([np.asarray(resize(Image.fromarray(image), size)) for _, image in rows])
        yield normalise(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()), [raw for raw, _ in rows]
