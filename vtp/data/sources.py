"""Where pictures come from: one DATA string -> a `Source` that yields raw samples, shard by shard.

    path/                    class folders: CLASS/FILE.jpg, or pictures without classes
    path/ + metadata.jsonl   {"file_name": ..., "text": caption or captions, other columns: labels}
    path/{00..99}.tar        webdataset shards: KEY.jpg|png|webp + KEY.txt|json|cls, or CLASS/FILE.jpg; also globs,
                             a folder of tars, and pipe:, https:, ... as webdataset opens them
    hf:NAME, hf:PATH:SPLIT   Hugging Face `datasets`: a name on the hub (streamed), what save_to_disk wrote, or a folder
                             of parquet files; the split is `train` unless given
    scenes, scenes:test      the embedded set and its held-out part
    A@3::B@1                 a mixture of any of these: three samples of A for one of B; without @ a weight is 1

Files that hold classes may lie beside a classes.json that names them: a list of {"wnid": folder, "names": [...]}.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtp.config import ConfigError
from vtp.data import scenes, shards
from vtp.data.folders import FolderSource, holds_pictures
from vtp.data.hub import HubSource
from vtp.data.samples import KEY_COLUMNS, Alone, Raw, Source, Table
from vtp.data.tars import TarSource
from vtp.files import path_of

log = logging.getLogger(__name__)
_WEIGHT = re.compile(r"\d+(\.\d+)?")


def open_source(data: str, annotations: str | None = None) -> Source:
    """Open a DATA string; see the head of this file.

    Args:
        data: a path or one of the forms above.
        annotations: a jsonl file with "key" (or "file_name") and columns for each sample: "captions" or "text" replace
            its captions, other columns of words or whole numbers become labels.

    Raises:
        ConfigError: nothing there, no pictures in it, or an annotation file that cannot be read.
    """
    source = _open(data, annotations)
    if annotations is not None:
        noted = [(part, table) for part, _ in source.parts if (table := getattr(part, "table", None))]
        if not any(table.find(raw.key) for part, table in noted for raw in head(part, 100)):
            log.warning(
                "%s has no line for any of the first pictures of %s: the key of a line is a picture's name, with or "
                "without its folder and suffix",
                annotations,
                data,
            )
        for part, _ in noted:
            part.report.clear()
    return source


def _open(data: str, annotations: str | None) -> Source:
    if not data:
        raise ConfigError("data is empty; give a folder, tar shards such as 'path/{000..099}.tar', hf:NAME, or scenes")
    if "::" in data:
        return Mixture(data, annotations)
    if _embedded(data):
        if annotations is not None:
            raise ConfigError("scenes brings its own captions and labels; leave annotations out")
        return SceneSource(data)
    table = None if annotations is None else Table.load(path_of(annotations), KEY_COLUMNS)
    if data.startswith("hf:") and not data.startswith("hf://"):
        return HubSource(data, table)
    path = path_of(data)
    if not shards.REMOTE.match(data) and path.is_dir():
        inside = [p for p in path.iterdir() if not p.name.startswith(".")]
        tars = {
            shards.TAR.sub("", p.name): p
            for p in sorted(inside, reverse=True)
            if shards.TAR.search(p.name) and not p.is_dir()
        }
        # One of 0.tar and 0.tar.gz, which are the same; and packed ones beside pictures are what held them.
        plain = any(p.suffix.lower() == ".tar" for p in tars.values())
        if plain and any(p.is_dir() and holds_pictures(p) for p in inside):
            log.warning("%s holds tar shards, which are read, and pictures in folders, which are not", data)
        if plain or (tars and not holds_pictures(path)):
            return TarSource(data, sorted(map(str, tars.values())), table)
        return FolderSource(data, table)
    return TarSource(data, shards.expand(data), table)


def _embedded(data: str) -> bool:
    return data.partition(":")[0] == "scenes"


@dataclass
class SceneSource(Alone):
    """The embedded set; a shard is an index."""

    name: str
    random_access: bool = True
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.name not in ("scenes", "scenes:test"):
            raise ConfigError(f"data={self.name}: the embedded set is 'scenes', its held-out part 'scenes:test'")
        self.shards: Sequence[int] = scenes.TEST if self.name == "scenes:test" else scenes.TRAIN
        self.classes = dict(scenes.CLASSES)
        self.templates = dict(scenes.TEMPLATES)

    def read(self, shard: int, size: int | None = None) -> Iterator[Raw]:
        self.report["samples"] += 1
        image, caption, labels = scenes.draw(shard, 64 if size is None else size)
        yield Raw(f"scene_{shard:07d}", image, (caption,), labels)


@dataclass
class Mixture:
    """Several sources with weights. Read plainly they come one after another; training mixes them.

    A label that two of them number differently is left out.
    """

    name: str
    annotations: str | None = None
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        weighted = []
        for word in self.name.split("::"):
            data, at, weight = word.rpartition("@")
            if not at or not _WEIGHT.fullmatch(weight):
                data, weight = word, "1"
            if not data or float(weight) == 0:
                raise ConfigError(f"data={self.name}: write a mixture as A@3::B@1, with weights above 0")
            own = None if _embedded(data) else self.annotations
            weighted.append((_open(data, own), float(weight)))
        total = sum(weight for _, weight in weighted)
        self.parts: Sequence[tuple[Any, float]] = tuple((source, weight / total) for source, weight in weighted)
        for source, _ in self.parts:
            source.report = self.report
        sources = [source for source, _ in self.parts]
        self.random_access = all(source.random_access for source in sources)
        self.shards: Sequence[tuple[int, Any]] = _Chained([source.shards for source in sources])
        self.classes: dict[str, tuple[str, ...]] = {}
        clashing = set()
        for source in sources:
            clashing |= {
                label
                for label in source.classes
                if self.classes.get(label, source.classes[label]) != source.classes[label]
            }
            self.classes |= source.classes
        if clashing:
            log.warning("%s: its parts number the labels %s differently: left out", self.name, sorted(clashing))
        self._clashing = clashing
        self.classes = {label: names for label, names in self.classes.items() if label not in clashing}
        templates = {label: found for source in sources for label, found in source.templates.items()}
        self.templates = {label: templates[label] for label in self.classes}

    def keeps(self, folder: Path) -> bool:
        return any(source.keeps(folder) for source, _ in self.parts)

    def read(self, shard: tuple[int, Any], size: int | None = None) -> Iterator[Raw]:
        for raw in self.parts[shard[0]][0].read(shard[1], size):
            yield raw._replace(labels={label: n for label, n in raw.labels.items() if label not in self._clashing})


class _Chained(Sequence[Any]):
    """(number of the sequence, its item) of several sequences, one after another."""

    def __init__(self, of: Sequence[Sequence[Any]]) -> None:
        self._of = of

    def __len__(self) -> int:
        return sum(map(len, self._of))

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        for number, items in enumerate(self._of):
            if i < len(items):
                return number, items[i]
            i -= len(items)
        raise IndexError(i)


def shares(source: Source, limit: int | None) -> list[int | None]:
    """How many of `limit` samples fall to each part of a source, by their weights; None: all that it has."""
    if limit is None:
        return [None] * len(source.parts)
    ends = np.rint(limit * np.cumsum([0.0, *(weight for _, weight in source.parts)])).astype(int)
    return np.diff(ends).tolist()


def fingerprint(source: Source) -> str:
    """Digest of what a source lists: file names, or shards (and of near ones the sizes), classes, and annotations.

    Not of the pictures themselves, which would have to be read.
    """
    described: list[Any] = []
    for part, _ in source.parts:
        listed = getattr(part, "files", part.shards)
        near = [os.path.getsize(s) for s in listed if isinstance(part, TarSource) and os.path.isfile(s)]
        tables = [table.sha256 for name in ("table", "metadata") if (table := getattr(part, name, None)) is not None]
        described.append((listed if isinstance(listed, list) else repr(listed), near, part.classes, tables))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def captioned(source: Source) -> bool:
    """Whether any of the first samples has a caption."""
    return any(raw.captions for raw in head(source, 100))


def head(source: Source, n: int) -> Iterator[Raw]:
    """The first `n` samples, in the order of the shards."""
    for shard in source.shards:
        for raw in source.read(shard):
            yield raw
            n -= 1
            if n <= 0:
                return


def counts(source: Source, label: str) -> np.ndarray:
    """How many samples of a source each class of a label has, [classes] int64.

    Where labels come from an annotation file the counts are of the whole file, so that all splits of a set agree;
    those of the embedded set are of its first 10,000 pictures.
    """
    table = getattr(source, "table", None)
    if table is not None and label in table.classes:
        found: Iterable[dict[str, int]] = table.labels.values()
    else:
        shards = source.shards[:10_000] if isinstance(source, SceneSource) else source.shards  # drawn alike for ever
        found = (raw.labels for shard in shards for raw in source.read(shard, 16))
    total = Counter(labels[label] for labels in found if label in labels)
    return np.array([total[i] for i in range(len(source.classes[label]))], np.int64)
