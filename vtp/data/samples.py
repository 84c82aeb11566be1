"""What a sample is, and how the sample itself, its folder and annotations make up its captions and labels."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray

from vtp.config import ConfigError
from vtp.data.decode import BadImage, decode

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions")
KEY_COLUMNS = ("key", "file_name")
CLASSES = "classes.json"  # beside folders or shards: [{"wnid": folder, "names": [...]}, ...]
# What a class is called in a caption or a zero-shot prompt where the data does not say it.
CLASS_TEMPLATES = ("a photo of a {}", "a picture of a {}", "a photo of the {}", "a close-up of a {}", "a {}")
# Columns of annotations are named in captions in many ways; the bare name is the one they share.
COLUMN_TEMPLATES = ("{}",)
MAX_CAPTION = 2_000  # characters; far more than any text tower reads, and a page of text costs a worker its time
LOST = "lost with a shard (estimated)"
# What a report counts of samples that are used all the same, and without anything being left out.
FLAWS = frozenset(
    ("caption cut", "caption not UTF-8", "broken json", "unknown class", "not in annotations", "second picture")
)
HARMLESS = FLAWS | {"samples", LOST}


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

    def keeps(self, folder: Path) -> bool:
        """Whether a folder, its path resolved, is one that the source has its files in."""
        ...

    def read(self, shard: Any, size: int | None = None) -> Iterator[Raw]:
        """Samples of a shard. `size` is the side in pixels at which a source that draws its pictures should do so."""
        ...


class Alone:
    """A source that mixes nothing."""

    @property
    def parts(self) -> tuple[tuple[Any, float], ...]:
        return ((self, 1.0),)

    def keeps(self, folder: Path) -> bool:
        return False


def left_out(report: Mapping[str, int]) -> Counter[str]:
    """The part of a report that counts what could not be used."""
    return Counter({reason: n for reason, n in report.items() if reason not in HARMLESS})


def kept(report: Mapping[str, int]) -> dict[str, int]:
    """The part that counts flaws of samples that are used all the same."""
    return {reason: n for reason, n in report.items() if reason in FLAWS}


def in_vain(report: Mapping[str, int]) -> Counter[str]:
    """The same, and what is thought to be lost with broken shards."""
    return left_out(report) + Counter({LOST: report.get(LOST, 0)})


def ended(given: int, well: bool, whole: Counter[str], report: Counter[str]) -> None:
    """A shard gave its last sample: count it among the whole ones, or what it lacks of their mean as lost."""
    if well:
        whole.update(shards=1, samples=given)
    elif lost := max(0, whole["samples"] // max(1, whole["shards"]) - given):
        report[LOST] += lost


@dataclass
class Table:
    """Captions and labels by key, from a jsonl file."""

    path: Path
    sha256: str  # of the file
    captions: dict[str, tuple[str, ...]]
    labels: dict[str, dict[str, int]]
    classes: dict[str, tuple[str, ...]]
    not_utf8: frozenset[str]  # keys whose rows were not
    of_files: dict[str, str]  # keys that are names of files, by what they are without suffix

    @classmethod
    def load(cls, path: Path, key_columns: Sequence[str]) -> Table:
        """Read one JSON object a line; several lines of one key add captions. Class names are the distinct values of a
        column, numbers first."""
        if not path.is_file():
            raise ConfigError(f"no annotation file at {path}")
        rows: dict[str, dict[str, Any]] = {}
        captions: dict[str, tuple[str, ...]] = {}
        not_utf8 = set()
        for number, line in enumerate((lines := path.read_bytes()).splitlines(), start=1):
            if not line.strip():
                continue
            broken: Counter[str] = Counter()
            try:
                row = json.loads(text_of(line, broken))
                named = {column: row.pop(column, None) for column in KEY_COLUMNS}  # a second name is no label
                key = str(next(named[c] for c in key_columns if named[c] is not None)).removeprefix("./")
            except (ValueError, RecursionError, StopIteration, AttributeError) as error:
                wanted = " or ".join(f'"{k}"' for k in key_columns)
                raise ConfigError(f"{path}, line {number}: not a JSON object with {wanted} ({error})") from None
            rows[key] = rows.get(key, {}) | row
            captions[key] = (*captions.get(key, ()), *captions_in(row))
            if broken:
                not_utf8.add(key)
        values: dict[str, set[Any]] = {}
        for row in rows.values():
            for column, value in row.items():
                if column not in CAPTION_COLUMNS and isinstance(value, str | int):
                    values.setdefault(column, set()).add(str(value))
        classes = {column: tuple(sorted(names, key=_in_order)) for column, names in values.items()}
        index = {column: {name: i for i, name in enumerate(names)} for column, names in classes.items()}
        return cls(
            path,
            hashlib.sha256(lines).hexdigest(),
            captions,
            {
                key: {c: index[c][str(v)] for c, v in row.items() if c in index and isinstance(v, str | int)}
                for key, row in rows.items()
            },
            {c: spaced(names) if c == "class" else tuple(map(mended, names)) for c, names in classes.items()},
            frozenset(not_utf8),
            {row.rpartition(".")[0]: row for row in reversed(rows) if row.rpartition(".")[2].lower() in IMAGE_SUFFIXES},
        )

    def find(self, key: str) -> str | None:
        """The row of a sample: by its whole key, or by its last part with or without the suffix."""
        for candidate in (key, key.rsplit("/", 1)[-1], key.rsplit(".", 1)[0], Path(key).stem):
            if candidate in self.labels:
                return candidate
        return self.of_files.get(key) or self.of_files.get(key.rsplit("/", 1)[-1])  # a key of a shard has no suffix

    def of(self, row: str, report: Counter[str]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Captions and labels of a row."""
        if row in self.not_utf8:
            report["caption not UTF-8"] += 1
        return self.captions[row], self.labels[row]


_NUMBER = re.compile(r"-?\d+")


def _in_order(name: str) -> tuple[bool, int, str]:
    return not is_number(name), int(name) if is_number(name) and len(name) < 20 else 0, name


def is_number(name: str) -> bool:
    """Whether a class is but numbered."""
    return _NUMBER.fullmatch(name) is not None


def spaced(names: Sequence[str]) -> tuple[str, ...]:
    """Names as people write them, without underscores; as they are, where two would become the same."""
    whole = tuple(map(mended, names))
    written = tuple(name.replace("_", " ") for name in whole)
    return written if len(set(written)) == len(set(names)) else whole


def mended(text: str) -> str:
    """Without halves of characters, which JSON and names of files may hold and no file of text can."""
    return text.encode(errors="replace").decode()


def tell_of_places(name: str, written: int, pictures: int) -> None:
    """Say that a few texts beside pictures end the classes of their folders: with captions folders are places."""
    log.warning(
        "%s: %d of %d pictures have a text beside them, so its folders are taken for places, not classes; "
        "remove the texts, or name the classes in a %s",
        name,
        written,
        pictures,
        CLASSES,
    )


def classes_of(table: Table | None) -> dict[str, tuple[str, ...]]:
    return {} if table is None else table.classes


def listed_classes(text: bytes, file: str) -> dict[str, str]:
    """What a classes.json says: the name of each class, by its folder, in their order.

    Raises:
        ConfigError: it is none.
    """
    try:
        rows = json.loads(text)
        wrong = next((n for row in rows if not isinstance(n := row["names"], list) or n[0] is None), None)
        if wrong is not None:
            raise TypeError(f"names: {wrong!r}")
        return {str(row["wnid"]): mended(str(row["names"][0])) for row in rows}
    except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f'{file} is not a list of {{"wnid": ..., "names": [...]}} ({error!r})') from None


@dataclass(frozen=True)
class Folders:
    """Class folders in the order of their labels."""

    index: dict[str, int]
    classes: dict[str, tuple[str, ...]]  # {"class": names}, or nothing where there are no classes

    @classmethod
    def named(cls, folders: Sequence[str], names: dict[str, str] | None, file: str) -> Folders:
        """Number the folders, in sorted order or as a classes.json (`names`, of `file`) lists and names them.

        Raises:
            ConfigError: classes.json does not name a folder.
        """
        unknown = [f for f in folders if f not in names] if names is not None else []
        if unknown:
            raise ConfigError(f"{file} does not name the class {unknown[0]}; add it or remove the file")
        display = dict(zip(folders, spaced(folders), strict=True)) if names is None else names
        return cls({f: i for i, f in enumerate(display)}, {"class": tuple(display.values())} if display else {})


def templates_of(classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {label: CLASS_TEMPLATES if label == "class" else COLUMN_TEMPLATES for label in classes}


def assemble(
    key: str,
    image: bytes,
    captions: tuple[str, ...],
    labels: dict[str, int],
    folder: str | None,
    folders: Folders,
    table: Table | None,
    report: Counter[str],
    unknown: bool = False,
) -> Raw:
    """Put together what the sample itself, its folder and the annotations say; the annotations' words are the last.

    A class becomes captions where there are none. `unknown`: the sample names a class that there is not.
    """
    unknown = unknown or (bool(folders.index) and folder is not None and folder not in folders.index)
    if folder is not None and folder in folders.index:
        labels = labels | {"class": folders.index[folder]}
    called = _called(labels, folders.classes)
    if table is not None:
        labels = {label: n for label, n in labels.items() if label not in table.classes}  # which they number otherwise
        if (row := table.find(key)) is None:
            report["not in annotations"] += 1
        else:
            noted, more = table.of(row, report)
            captions, labels = noted or captions, labels | more
            called = _called(more, table.classes) or called
    if unknown and "class" not in labels:
        report["unknown class"] += 1
    if not captions and called is not None:
        captions = tuple(t.format(called) for t in CLASS_TEMPLATES)
    if any(len(caption) > MAX_CAPTION for caption in captions):
        report["caption cut"] += 1
        captions = tuple(caption[:MAX_CAPTION] for caption in captions)
    return Raw(key, image, captions, labels)


def _called(labels: Mapping[str, int], classes: Mapping[str, Sequence[str]]) -> str | None:
    """The name of the class, unless it is a number or blank."""
    name = classes["class"][labels["class"]] if "class" in labels and "class" in classes else ""
    return None if not name.strip() or is_number(name) else name


def captions_beside(
    text: bytes | None, row: bytes | None, report: Counter[str], whole: bool = False
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions of the text, or else of the JSON, beside a picture; and the JSON, read for them or if `whole`."""
    captions = () if text is None else captions_in({"text": text_of(text, report)})
    found = {} if row is None or (captions and not whole) else row_of(row, report)
    return captions or captions_in(found), found


def captions_in(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the first column that has any."""
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        texts = value if isinstance(value, list) else [value]
        if found := tuple(t.strip() for t in texts if isinstance(t, str) and t.strip()):
            return tuple(map(mended, found))
    return ()


def row_of(data: bytes, report: Counter[str]) -> dict[str, Any]:
    """The JSON object beside a picture; empty where there is none."""
    try:
        row = json.loads(text_of(data, report))
    except (ValueError, RecursionError):
        report["broken json"] += 1
        return {}
    return row if isinstance(row, dict) else {}


def text_of(data: bytes, report: Counter[str]) -> str:
    try:
        return data.decode("utf-8-sig")  # without the mark that some editors put first
    except UnicodeDecodeError:
        report["caption not UTF-8"] += 1
        return data.decode("utf-8", errors="replace")
