"""Samples in tar shards, opened and read by `shards`."""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from vtp.config import ConfigError
from vtp.data import shards
from vtp.data.samples import (
    CLASSES,
    IMAGE_SUFFIXES,
    Alone,
    Folders,
    Raw,
    Table,
    assemble,
    captions_beside,
    classes_of,
    ended,
    listed_classes,
    row_of,
    spaced,
    tell_of_places,
    templates_of,
)
from vtp.files import same_folder

LABELS = "labels.json"  # beside packed shards: {label: its class names}, for the labels in KEY.json
LOOKED_AT = 100  # samples of near shards, of as many shards as there are, for what is beside their pictures
MAX_CLASSES = 1_000_000  # a larger number in a KEY.cls is none
_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_TEXTS = frozenset(("txt", "json"))
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class TarSource(Alone):
    """Tar shards, opened and read by webdataset."""

    name: str
    shards: Sequence[str]
    table: Table | None = None
    random_access: bool = False
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        far = shards.REMOTE.match(self.shards[0]) is not None
        few = self._first_pictures(far)
        held = set[str]().union(*few)  # suffixes
        in_folders = any("/" in member["__key__"] for member in few)
        expected = not far or "cls" in held or (in_folders and not _TEXTS & held)
        names = self._beside(CLASSES, listed_classes, expected)
        scanned = names is None and not far
        folders: Iterable[str] = ()
        if scanned and in_folders and not {"txt", "json", "cls"} & held:
            folders = _scan(self.shards, lambda name, _: name.split("/")[-2] if "/" in name else None)
        if scanned and in_folders and 0 < (written := sum(bool(m.keys() & _TEXTS) for m in few)) < len(few) / 2:
            tell_of_places(f"{self.name}, the first samples", written, len(few))
        folders = sorted(set(folders))
        folders = folders if len(folders) > 1 else []  # one folder is a place, not a class
        self._folders = Folders.named(folders, names, f"{CLASSES} beside {self.shards[0]}")
        rows = [row for m in few if "captions" in (row := row_of(m.get("json", b"{}"), Counter()))]  # as packed ones
        expected = not far or any(row.keys() - {"key", "captions"} for row in rows)
        named = (self._beside(LABELS, _labels, expected) or {}) if rows else {}
        self._columns = {label: {name: i for i, name in enumerate(names)} for label, names in named.items()}
        own = named | self._folders.classes  # annotations may number the same labels otherwise
        words = list(self._folders.index) or own.get("class", ())  # that a KEY.cls may hold
        scan = _scan(self.shards, lambda name, text: text().strip() if _suffix(name) == "cls" else None)
        if scanned and "cls" in held and (found := set(scan) - {""}):
            words = _numbered(found, self.name)
            own["class"] = spaced(words)
            self._folders = replace(self._folders, classes=own)
        self._words = {word: i for i, word in enumerate(words)}
        # A number that is no word is an index, but where classes.json calls classes by numbers of its own.
        self._numbers = 0 if names is not None and any(map(str.isdecimal, names)) else len(words)
        self.classes = own | classes_of(self.table)
        self.templates = templates_of(self.classes)
        self._whole = Counter[str]()  # shards read to their end, and samples in them

    def _first_pictures(self, far: bool) -> list[dict[str, Any]]:
        """Members of shards, to see what is beside the pictures: one far away, near ones of shards spread evenly."""
        seen: Counter[str] = Counter()
        tried = self.shards[: shards.TRIED_FIRST] if far else self.shards

        def pictures(shard: str) -> Iterator[dict[str, Any]]:
            read = shards.members(shard, seen, patient=shard == tried[0])
            return (member for member in read if member.keys() & _SUFFIXES)

        some = [] if far else tried[:: -(-len(tried) // LOOKED_AT)]
        few = [member for shard in some for member in islice(pictures(shard), -(-LOOKED_AT // len(some)))]
        if not few:
            seen.clear()  # those are read once more
            few = list(islice((member for shard in tried for member in pictures(shard)), 1))
        if not few:
            raise ConfigError(
                f"no pictures in {self.name}: its shards should hold KEY.jpg|png|webp with KEY.txt|json|cls"
                + (f"; of the first {len(tried)} could not be read: {n}" if (n := seen["broken shard"]) else "")
            )
        return few

    def _beside(self, name: str, read: Callable[[bytes, str], T], expected: bool) -> T | None:
        """What `read` makes of a file beside the shards, if there is one.

        Whatever a server answers when it is asked for one that the first samples do not need is no error.
        """
        try:
            text = shards.beside(self.shards[0], name)
            return None if text is None else read(text, f"{name} beside {self.shards[0]}")
        except ConfigError as error:
            if expected:
                raise
            log.warning("%s; taken for none, as nothing in the first sample needs it", error)
            return None

    def keeps(self, folder: Path) -> bool:
        places = {Path(shard).parent for shard in self.shards if not shards.REMOTE.match(shard)}
        return any(same_folder(folder, place) for place in places)

    def read(self, shard: str, size: int | None = None) -> Iterator[Raw]:
        given, broken = 0, self.report["broken shard"]
        for raw in self._read(shard):
            given += 1
            if raw is not None:
                yield raw
        ended(given, self.report["broken shard"] == broken, self._whole, self.report)

    def _number(self, word: str) -> int | None:
        """The class that a KEY.cls names."""
        if word in self._words:
            return self._words[word]
        return int(word) if word.isdecimal() and len(word) < 10 and int(word) < self._numbers else None

    def _read(self, shard: str) -> Iterator[Raw | None]:
        for member in shards.members(shard, self.report):
            self.report["samples"] += 1
            images = [member[s] for s in IMAGE_SUFFIXES if s in member]
            if len(images) > 1:
                self.report["second picture"] += 1
            if not images:
                dotted = any(suffix.rpartition(".")[2] in _SUFFIXES for suffix in member)  # a key ends at the first dot
                self.report["dots in its name" if dotted else "no picture"] += 1
                yield None
                continue
            captions, row = captions_beside(
                member.get("txt"), member.get("json"), self.report, whole=bool(self._columns)
            )
            words = {c: str(row[c]) for c in self._columns if row.get(c) is not None}
            labels = {c: self._columns[c][word] for c, word in words.items() if word in self._columns[c]}
            word = member.get("cls", b"").decode("utf-8-sig", errors="replace").strip()
            if (number := self._number(word)) is not None:
                labels["class"] = number
            unknown = word != "" and number is None
            key = member["__key__"]
            folder = key.split("/")[-2] if "/" in key else None
            yield assemble(key, images[0], captions, labels, folder, self._folders, self.table, self.report, unknown)


def _labels(listed: bytes, file: str) -> dict[str, tuple[str, ...]]:
    """The labels that KEY.json files hold besides the class, with their class names."""
    try:
        found = json.loads(listed)
        if not all(isinstance(names, list) for names in found.values()):
            raise TypeError("a label without a list")
        return {label: tuple(map(str, names)) for label, names in found.items()}
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ConfigError(f'{file} is not {{"label": ["name", ...], ...}} ({error!r})') from None


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


def _suffix(name: str) -> str:
    """What lies behind the key, which ends at the first dot of a name."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _scan(paths: Sequence[str], found: Any) -> Iterator[str]:
    """What `found(member name, text reader)` says of each member of local shards.

    Only the headers are read, but for members whose text is asked for.
    """

    def reader(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
        return lambda: cast(Any, tar.extractfile(info)).read().decode("utf-8-sig", errors="replace")

    for shard in paths:
        try:
            with tarfile.open(shard) as tar:
                for info in tar:
                    value = found(info.name.removeprefix("./"), reader(tar, info))
                    if value is not None:
                        yield value
        except (tarfile.TarError, OSError, EOFError):
            continue  # counted when the shard is read for its samples
