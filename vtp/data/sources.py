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
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from vtp.config import ConfigError
from vtp.data import scenes, shards
from vtp.data.decode import BadImage, decode
from vtp.data.shards import IMAGE_SUFFIXES

CAPTION_COLUMNS = ("text", "caption", "captions")
KEY_COLUMNS = ("key", "file_name")
# What a class is called in a caption or a zero-shot prompt where the data does not say it.
CLASS_TEMPLATES = ("a photo of a {}", "a picture of a {}", "a photo of the {}", "a close-up of a {}", "a {}")
# Columns of annotations are named in captions in many ways; the bare name is the one they share.
COLUMN_TEMPLATES = ("{}",)
MAX_CLASSES = 1_000_000  # a larger number in a KEY.cls is none
MAX_CAPTION = 2_000  # characters; far more than any text tower reads, and a page of text costs a worker its time
# What a report counts without anything being left out.
LOST = "lost with a shard (estimated)"
HARMLESS = frozenset({"samples", LOST, "caption cut", "caption not UTF-8", "broken json", "unknown class"})
SPLITS = frozenset(("train", "val", "valid", "validation", "test"))
_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_WEIGHT = re.compile(r"\d+(\.\d+)?")


class Raw(NamedTuple):
    """One sample before decoding."""

    key: str
    image: bytes | ndarray  # an image file, or [h, w, 3] uint8 where the source draws it
    captions: tuple[str, ...]  # any number; one is drawn each time
    labels: dict[str, int]  # indices into Source.classes; a label that does not apply is absent

    def pixels(self, report: Counter[str]) -> UInt8[ndarray, "h w 3"] | None:
        """The decoded picture; None where it cannot be, and the reason is counted."""
        try:
            return self.decoded()
        except BadImage as error:
            report[error.reason] += 1
            return None

    def decoded(self) -> UInt8[ndarray, "h w 3"]:
        """The decoded picture.

        Raises:
            BadImage: it cannot be.
        """
        return decode(self.image) if isinstance(self.image, bytes) else self.image


@runtime_checkable
class Source(Protocol):
    """Samples in shards. Reading is sequential within a shard and pure: the same shard gives the same samples.

    Attributes:
        name: the DATA string.
        shards: opaque and picklable; what a worker is given to read.
        random_access: every shard is a single sample, so that permuting shards shuffles completely.
        classes: for each label its class names; a label is an index into them.
        templates: for each label prompt templates with one {}.
        report: how many samples were seen ("samples") and skipped, by reason.
        parts: the sources that are mixed and their shares, which sum to 1; itself alone where nothing is mixed.
    """

    name: str
    shards: Sequence[Any]
    random_access: bool
    classes: dict[str, tuple[str, ...]]
    templates: dict[str, tuple[str, ...]]
    report: Counter[str]

    @property
    def parts(self) -> Sequence[tuple[Source, float]]: ...

    def read(self, shard: Any, size: int | None = None) -> Iterator[Raw]:
        """Samples of a shard. `size` is the side in pixels at which a source that draws its pictures should do so."""
        ...


def open_source(data: str, annotations: str | None = None) -> Source:
    """Open a DATA string; see the head of this file.

    Args:
        data: a path or one of the forms above.
        annotations: a jsonl file with "key" (or "file_name") and columns for each sample: "captions" or "text" replace
            its captions, other columns of words or whole numbers become labels.

    Raises:
        ConfigError: nothing there, no pictures in it, or an annotation file that cannot be read.
    """
    if not data:
        raise ConfigError("data is empty; give a folder, tar shards such as 'path/{000..099}.tar', hf:NAME, or scenes")
    if "::" in data:
        return Mixture(data, annotations)
    if data == "scenes" or data.startswith("scenes:"):
        if annotations is not None:
            raise ConfigError("scenes brings its own captions and labels; leave annotations out")
        return SceneSource(data)
    table = None if annotations is None else Table.load(Path(annotations), KEY_COLUMNS)
    if data.startswith("hf:") and not data.startswith("hf://"):
        return HubSource(data, table)
    path = Path(data).expanduser()
    if not shards.REMOTE.match(data) and path.is_dir():
        tars = sorted(str(p) for p in path.glob("*.tar"))
        return TarSource(data, tars, table) if tars else FolderSource(data, table)
    return TarSource(data, shards.expand(data), table)


def fingerprint(source: Source) -> str:
    """Digest of what a source lists: file names, or shards (and of near ones the sizes), and classes.

    Not of the pictures themselves, which would have to be read.
    """
    described: list[Any] = []
    for part, _ in source.parts:
        listed = getattr(part, "files", part.shards)
        near = [os.path.getsize(s) for s in listed if isinstance(part, TarSource) and os.path.isfile(s)]
        described.append((listed if isinstance(listed, list) else repr(listed), near, part.classes))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def left_out(report: Mapping[str, int]) -> Counter[str]:
    """The part of a report that counts what could not be used."""
    return Counter({reason: n for reason, n in report.items() if reason not in HARMLESS})


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


@dataclass
class Table:
    """Captions and labels by key, from a jsonl file."""

    path: Path
    captions: dict[str, tuple[str, ...]]
    labels: dict[str, dict[str, int]]
    classes: dict[str, tuple[str, ...]]
    not_utf8: frozenset[str]  # keys whose rows were not

    @classmethod
    def load(cls, path: Path, key_columns: Sequence[str]) -> Table:
        """Read one JSON object a line; several lines of one key add captions. Class names are the sorted distinct
        values of a column."""
        if not path.is_file():
            raise ConfigError(f"no annotation file at {path}")
        rows: dict[str, dict[str, Any]] = {}
        captions: dict[str, tuple[str, ...]] = {}
        not_utf8 = set()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            broken: Counter[str] = Counter()
            try:
                row = json.loads(_text(line, broken))
                key = next(row.pop(k) for k in key_columns if k in row)
            except (ValueError, RecursionError, StopIteration, AttributeError) as error:
                wanted = " or ".join(f'"{k}"' for k in key_columns)
                raise ConfigError(f"{path}, line {number}: not a JSON object with {wanted} ({error})") from None
            rows[str(key)] = rows.get(str(key), {}) | row
            captions[str(key)] = (*captions.get(str(key), ()), *_captions(row))
            if broken:
                not_utf8.add(str(key))
        values: dict[str, set[Any]] = {}
        for row in rows.values():
            for column, value in row.items():
                if column not in CAPTION_COLUMNS and isinstance(value, str | int):
                    values.setdefault(column, set()).add(str(value))
        classes = {column: tuple(sorted(names)) for column, names in values.items()}
        index = {column: {name: i for i, name in enumerate(names)} for column, names in classes.items()}
        return cls(
            path,
            captions,
            {
                key: {c: index[c][str(v)] for c, v in row.items() if c in index and isinstance(v, str | int)}
                for key, row in rows.items()
            },
            classes,
            frozenset(not_utf8),
        )

    def find(self, key: str) -> str | None:
        """The row of a sample: by its whole key, or by its last part with or without the suffix."""
        for candidate in (key, key.rsplit("/", 1)[-1], key.rsplit(".", 1)[0], Path(key).stem):
            if candidate in self.labels:
                return candidate
        return None


def _captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            return tuple(t.strip() for t in texts if isinstance(t, str) and t.strip())
    return ()


# --- the sources ---


class _Alone:
    """A source that mixes nothing."""

    @property
    def parts(self) -> tuple[tuple[Any, float], ...]:
        return ((self, 1.0),)


@dataclass
class SceneSource(_Alone):
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
class FolderSource(_Alone):
    """Files in folders; a shard is the number of one file in the sorted list."""

    name: str
    table: Table | None = None
    random_access: bool = True
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        root = Path(self.name).expanduser()
        metadata = root / "metadata.jsonl"
        if self.table is None and metadata.is_file():
            self.table = Table.load(metadata, ("file_name",))
        listed = self.table is not None and self.table.path == metadata
        # A metadata file says which files belong to the set; one that is missing is then a broken sample.
        self.files = sorted(self.table.labels) if listed and self.table is not None else sorted(_images(root))
        if not self.files:
            raise ConfigError(
                f"no pictures in {root}: it should hold class folders, a metadata.jsonl with its pictures, "
                f"tar shards, or files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        self.shards: Sequence[int] = range(len(self.files))
        folders = sorted({f.split("/", 1)[0] for f in self.files if "/" in f}) if not listed else []
        if folders and set(folders) <= SPLITS and all(f.count("/") > 1 for f in self.files):
            raise ConfigError(f"{root} holds splits, not classes; name one of them, as in {root / folders[0]}")
        # The captions of img2dataset's "files" and of many others: KEY.txt or KEY.json beside KEY.jpg.
        self._written = self.table is None and any(_beside(root / self.files[0]))
        folders = folders if len(folders) > 1 and not self._written else []  # of one, or with captions: places
        names = root / "classes.json"
        self._folders = Folders.named(folders, names.read_bytes() if names.is_file() else None, str(names))
        self.classes = ({} if self.table is None else self.table.classes) | self._folders.classes
        self.templates = _templates(self.classes)

    def read(self, shard: int, size: int | None = None) -> Iterator[Raw]:
        key = self.files[shard]
        self.report["samples"] += 1
        if shards.unsafe(key) or Path(key).is_absolute():
            self.report["unsafe name"] += 1
            return
        file = Path(self.name).expanduser() / key
        try:
            large = file.stat().st_size > shards.MAX_BYTES
            image = b"" if large else file.read_bytes()
        except OSError:
            self.report["unreadable file"] += 1
            return
        if large:
            self.report["file too large"] += 1
            return
        captions: tuple[str, ...] = ()
        if self._written:
            text, row = _beside(file)
            captions = _captions({"text": _text(text, self.report)}) if text else ()
            captions = captions or (_json_captions(row, self.report) if row else ())
        folder = key.split("/", 1)[0] if "/" in key else None
        yield _sample(key, image, captions, {}, folder, self._folders, self.table, self.report)


@dataclass
class TarSource(_Alone):
    """Tar shards, opened and read by webdataset."""

    name: str
    shards: Sequence[str]
    table: Table | None = None
    random_access: bool = False
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        tried = self.shards[: shards.TRIED_FIRST] if shards.REMOTE.match(self.shards[0]) else self.shards
        begun = (m for i, shard in enumerate(tried) for m in shards.members(shard, seen, patient=i == 0))
        first = next((m for m in begun if m.keys() & _SUFFIXES), None)
        if first is None:
            raise ConfigError(
                f"no pictures in {self.name}: its shards should hold KEY.jpg|png|webp with KEY.txt|json|cls"
                + (f"; of the first {len(tried)} could not be read: {n}" if (n := seen["broken shard"]) else "")
            )
        classed = "cls" in first or "/" in first["__key__"]
        names = shards.beside(self.shards[0], "classes.json") if classed else None
        scanned = names is None and not shards.REMOTE.match(self.shards[0])
        folders: Iterable[str] = ()
        if scanned and self.table is None and not {"txt", "json", "cls"} & first.keys() and "/" in first["__key__"]:
            folders = _scan(self.shards, lambda name, _: name.split("/")[-2] if "/" in name else None)
        folders = sorted(set(folders))
        folders = folders if len(folders) > 1 else []  # one folder is a place, not a class
        self._folders = Folders.named(folders, names, f"classes.json beside {self.shards[0]}")
        classes = {} if self.table is None else dict(self.table.classes)
        if scanned and "cls" in first and "class" not in classes:
            found = _scan(self.shards, lambda name, text: text().strip() if name.endswith(".cls") else None)
            classes["class"] = _numbered(set(found), self.name)
        self.classes = classes | self._folders.classes
        words = self._folders.index or {name: i for i, name in enumerate(classes.get("class", ()))}
        self._words = {name: i for name, i in words.items() if not name.isdigit()}
        self.templates = _templates(self.classes)
        self._whole = Counter[str]()  # shards read to their end, and samples in them

    def read(self, shard: str, size: int | None = None) -> Iterator[Raw]:
        given, broken = 0, self.report["broken shard"]
        for raw in self._read(shard):
            given += 1
            if raw is not None:
                yield raw
        _ended(given, self.report["broken shard"] == broken, self._whole, self.report)

    def _read(self, shard: str) -> Iterator[Raw | None]:
        for member in shards.members(shard, self.report):
            self.report["samples"] += 1
            image = next((member[s] for s in IMAGE_SUFFIXES if s in member), None)
            if image is None:
                dotted = any(suffix.rpartition(".")[2] in _SUFFIXES for suffix in member)  # a key ends at the first dot
                self.report["dots in its name" if dotted else "no picture"] += 1
                yield None
                continue
            captions: tuple[str, ...] = ()
            if "txt" in member:
                captions = _captions({"text": _text(member["txt"], self.report)})
            if not captions and "json" in member:
                captions = _json_captions(member["json"], self.report)
            labels = {}
            if "cls" in member:
                word = member["cls"].strip().decode(errors="replace")
                number = self._words.get(word, int(word) if word.isdecimal() and len(word) < 10 else -1)
                if 0 <= number < len(self.classes.get("class", ())):
                    labels["class"] = number
                else:
                    self.report["unknown class"] += 1
            key = member["__key__"]
            folder = key.split("/")[-2] if "/" in key else None
            yield _sample(key, image, captions, labels, folder, self._folders, self.table, self.report)


def _ended(given: int, well: bool, whole: Counter[str], report: Counter[str]) -> None:
    """A shard gave its last sample: count it among the whole ones, or what it lacks of their mean as lost."""
    if well:
        whole.update(shards=1, samples=given)
    elif lost := max(0, whole["samples"] // max(1, whole["shards"]) - given):
        report[LOST] += lost


@dataclass
class HubSource(_Alone):
    """A Hugging Face data set. A shard is a row of what save_to_disk wrote, else one of the set's files, streamed."""

    name: str
    table: Table | None = None
    random_access: bool = False
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"data={self.name} needs the datasets library; pip install 'vtp[datasets]'") from None
        path, _, split = self.name.removeprefix("hf:").partition(":")
        folder = Path(path).expanduser()
        try:
            if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
                found = datasets.load_from_disk(str(folder))
                rows = found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
                if rows is found and split and split != str(found.split):
                    raise ValueError(f"it is a single set, of no split or of '{found.split}'; leave :{split} out")
            else:
                place = str(folder) if folder.exists() else path
                rows = datasets.load_dataset(place, split=split or "train", streaming=True)
        except Exception as error:  # of the hub, of its files, of a split that is not there
            raise ConfigError(f"data={self.name} cannot be opened: {error}") from None
        features = rows.features or {}
        pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        if not pictures:
            raise ConfigError(f"{self.name} has no column of pictures, only {', '.join(features) or 'unknown ones'}")
        self._image = pictures[0]
        self._rows: Any = rows.cast_column(self._image, datasets.Image(decode=False))
        self.random_access = isinstance(rows, datasets.Dataset)
        self.shards: Sequence[int] = range(len(rows) if self.random_access else rows.num_shards)
        labels = {column: tuple(kind.names) for column, kind in features.items() if hasattr(kind, "names")}
        self._columns = {("class" if column == "label" else column): column for column in labels}
        classes = {label: labels[column] for label, column in self._columns.items()}
        self.classes = ({} if self.table is None else self.table.classes) | classes
        self.templates = _templates(self.classes)
        self._folders = Folders({}, {"class": classes["class"]} if "class" in classes else {})
        self._whole = Counter[str]()

    def read(self, shard: int, size: int | None = None) -> Iterator[Raw]:
        if self.random_access:
            rows: Iterable[dict[str, Any]] = (self._rows[shard],)
        else:
            # By blocks, because an iteration by rows splits itself once more among a loader's workers.
            blocks = self._rows.shard(num_shards=len(self.shards), index=shard).iter(batch_size=16)
            rows = (dict(zip(block, row, strict=True)) for block in blocks for row in zip(*block.values(), strict=True))
        for i, row in enumerate(self._to_its_end(shard, rows)):
            self.report["samples"] += 1
            picture, key = row[self._image], f"{shard:07d}" if self.random_access else f"{shard:05d}_{i:07d}"
            if picture is None:
                self.report["no picture"] += 1
                continue
            data = picture["bytes"]
            if data is None:
                try:
                    data = Path(picture["path"]).read_bytes()
                except OSError:
                    self.report["unreadable file"] += 1
                    continue
            labels = {label: row[column] for label, column in self._columns.items() if row[column] not in (None, -1)}
            key = str(row.get("key", key))
            yield _sample(key, data, _captions(row), labels, None, self._folders, self.table, self.report)

    def _to_its_end(self, shard: int, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows, up to where a file is broken or gone; the library has tried the hub again by then."""
        given = 0
        try:
            for row in rows:
                given += 1
                yield row
        except (OSError, ValueError) as error:  # of files and connections; of pyarrow
            shards.tell(f"{self.name}, file {shard}", given, error)
            self.report["broken shard"] += 1
            _ended(given, False, self._whole, self.report)
        else:
            if not self.random_access:  # or a shard is but a row
                _ended(given, True, self._whole, self.report)


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
            own = None if data.startswith("scenes") else self.annotations
            weighted.append((open_source(data, own), float(weight)))
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
        self._clashing = clashing
        self.classes = {label: names for label, names in self.classes.items() if label not in clashing}
        templates = {label: found for source in sources for label, found in source.templates.items()}
        self.templates = {label: templates[label] for label in self.classes}

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


@dataclass(frozen=True)
class Folders:
    """Class folders in the order of their labels."""

    index: dict[str, int]
    classes: dict[str, tuple[str, ...]]  # {"class": names}, or nothing where there are no classes

    @classmethod
    def named(cls, folders: Sequence[str], names: bytes | None, file: str) -> Folders:
        """Number the folders, in sorted order or as classes.json (`names`, of `file`) lists and names them.

        Raises:
            ConfigError: classes.json is none, or does not name a folder.
        """
        display = {f: f.replace("_", " ") for f in folders}
        if names is not None:
            try:
                listed = {row["wnid"]: row["names"][0] for row in json.loads(names)}
            except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
                raise ConfigError(f'{file} is not a list of {{"wnid": ..., "names": [...]}} ({error!r})') from None
            unknown = [f for f in folders if f not in listed]
            if unknown:
                raise ConfigError(f"{file} does not name the class {unknown[0]}; add it or remove the file")
            display = listed
        return cls({f: i for i, f in enumerate(display)}, {"class": tuple(display.values())} if display else {})


def _templates(classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {label: CLASS_TEMPLATES if label == "class" else COLUMN_TEMPLATES for label in classes}


def _sample(
    key: str,
    image: bytes,
    captions: tuple[str, ...],
    labels: dict[str, int],
    folder: str | None,
    folders: Folders,
    table: Table | None,
    report: Counter[str],
) -> Raw:
    """Put together what the sample itself, its folder and the annotations say. A class becomes captions if need be."""
    if folder is not None and folder in folders.index:
        labels = labels | {"class": folders.index[folder]}
    row = None if table is None else table.find(key)
    if table is not None and row is not None:
        captions, labels = table.captions[row] or captions, labels | table.labels[row]
        if row in table.not_utf8:
            report["caption not UTF-8"] += 1
    if not captions and "class" in labels and folders.classes:
        captions = tuple(t.format(folders.classes["class"][labels["class"]]) for t in CLASS_TEMPLATES)
    if any(len(caption) > MAX_CAPTION for caption in captions):
        report["caption cut"] += 1
        captions = tuple(caption[:MAX_CAPTION] for caption in captions)
    return Raw(key, image, captions, labels)


def _text(data: bytes, report: Counter[str]) -> str:
    try:
        return data.decode("utf-8-sig")  # without the mark that some editors put first
    except UnicodeDecodeError:
        report["caption not UTF-8"] += 1
        return data.decode("utf-8", errors="replace")


def _images(root: Path) -> Iterator[str]:
    """Relative paths of the picture files under a folder; hidden files are none of them. Links to folders are followed,
    but not to one that holds the link.

    Raises:
        PermissionError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        above = os.path.realpath(folder)
        subfolders[:] = [
            s
            for s in subfolders
            if not s.startswith(".") and not f"{above}/".startswith(f"{os.path.realpath(os.path.join(folder, s))}/")
        ]
        for name in files:
            if name.lower().endswith(tuple(f".{s}" for s in IMAGE_SUFFIXES)) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _numbered(found: set[str], data: str) -> tuple[str, ...]:
    """The names of the classes that KEY.cls files give: numbers, or where none is a number the words themselves.

    Raises:
        ConfigError: a number too large to be one of a class.
    """
    numbers = [int(word) for word in found if word.isdecimal()]
    if not numbers:
        return tuple(sorted(found))
    if max(numbers) >= MAX_CLASSES:
        raise ConfigError(
            f"{data}: a KEY.cls holds {max(numbers)}; classes are numbered from 0 to {MAX_CLASSES - 1} at most"
        )
    return tuple(str(i) for i in range(max(numbers) + 1))


def _scan(paths: Sequence[str], found: Any) -> Iterator[str]:
    """What `found(member name, text reader)` says of each member of local shards.

    Only the headers are read, but for members whose text is asked for.
    """

    def reader(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
        return lambda: cast(Any, tar.extractfile(info)).read().decode(errors="replace")

    for shard in paths:
        try:
            with tarfile.open(shard) as tar:
                for info in tar:
                    value = found(info.name.removeprefix("./"), reader(tar, info))
                    if value is not None:
                        yield value
        except tarfile.TarError:
            continue  # counted when the shard is read for its samples


def _beside(picture: Path) -> tuple[bytes, bytes]:
    """The text and the JSON of a picture's name; empty where there is none."""

    def read(suffix: str) -> bytes:
        try:
            return picture.with_suffix(suffix).read_bytes()
        except OSError:
            return b""

    return read(".txt"), read(".json")


def _json_captions(data: bytes, report: Counter[str]) -> tuple[str, ...]:
    try:
        row = json.loads(_text(data, report))
    except (ValueError, RecursionError):
        report["broken json"] += 1
        return ()
    return _captions(row) if isinstance(row, dict) else ()


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
