"""Pictures as files in folders."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

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
    listed_classes,
    tell_of_places,
    templates_of,
)
from vtp.files import path_of, same_folder

log = logging.getLogger(__name__)
SPLITS = frozenset(("train", "val", "valid", "validation", "test"))


@dataclass
class FolderSource(Alone):
    """Files in folders; a shard is the number of one file in the sorted list."""

    name: str
    table: Table | None = None
    random_access: bool = True
    report: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        root = self._root = path_of(self.name)
        metadata, named = root / "metadata.jsonl", root / CLASSES
        # A metadata file says which files belong to the set; one that is missing is then a broken sample.
        self.metadata = Table.load(metadata, ("file_name",)) if metadata.is_file() else None
        if self.metadata is None:
            inside = list(_walk(root))
            found = [name for name in inside if _is_picture(name)]
            texts = {os.path.splitext(name)[0] for name in inside if not _is_picture(name)}
        else:
            found, texts = list(self.metadata.labels), set[str]()
        if self.metadata is None and (below := next(root.glob("*/metadata.jsonl"), None)):
            log.warning("%s is not read: it is of its folder alone; name that one, %s", below, below.parent)
        self.files = sorted(found)
        if not self.files:
            raise ConfigError(
                f"no pictures in {root}: it should hold class folders, a metadata.jsonl with its pictures, "
                f"tar shards, or files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        self.shards: Sequence[int] = range(len(self.files))
        folders = sorted({f.split("/", 1)[0] for f in found if "/" in f}) if self.metadata is None else []
        if folders and set(folders) <= SPLITS and all(f.count("/") > 1 for f in self.files):
            raise ConfigError(f"{root} holds splits, not classes; name one of them, as in {root / folders[0]}")
        # The captions of img2dataset's "files" and of many others: KEY.txt or KEY.json beside KEY.jpg.
        written = sum(os.path.splitext(f)[0] in texts for f in self.files)
        self._written = written > 0 or self.metadata is not None  # or may have
        names = listed_classes(named.read_bytes(), str(named)) if named.is_file() else None
        folders = folders if len(folders) > 1 else []  # a single one is a place
        if folders and names is None and 0 < written < len(self.files) / 2:
            tell_of_places(str(root), written, len(self.files))
        self._folders = Folders.named([] if self._written else folders, names, str(named))  # with captions: places
        if self.metadata is not None and "class" in self.metadata.classes:  # a classes.json numbers them otherwise
            self._folders = Folders({}, self.metadata.classes)
        self.classes = classes_of(self.metadata) | self._folders.classes | classes_of(self.table)
        self.templates = templates_of(self.classes)

    def keeps(self, folder: Path) -> bool:
        return same_folder(folder, self._root)

    def read(self, shard: int, size: int | None = None) -> Iterator[Raw]:
        key = self.files[shard]
        self.report["samples"] += 1
        if shards.unsafe(key) or Path(key).is_absolute():
            self.report["unsafe name"] += 1
            return
        file = self._root / key
        try:
            found = file.stat()
            regular, large = stat.S_ISREG(found.st_mode), found.st_size > shards.MAX_BYTES
            image = file.read_bytes() if regular and not large else b""
        except (OSError, ValueError):  # a name that no file can have
            self.report["unreadable file"] += 1
            return
        if large or not regular:
            self.report["file too large" if large else "link or device"] += 1
            return
        captions, labels = ((), {}) if self.metadata is None else self.metadata.of(key, self.report)
        if not captions and self._written:
            captions, _ = captions_beside(*_beside(file), self.report)
        folder = key.split("/", 1)[0] if "/" in key else None
        yield assemble(key, image, captions, labels, folder, self._folders, self.table, self.report)


def holds_pictures(root: Path) -> bool:
    """Whether there is a picture in a folder or below."""
    return any(map(_is_picture, _walk(root)))


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower()[1:] in IMAGE_SUFFIXES


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of the pictures under a folder, and of texts and JSON.

    Hidden files are none of them. Links to folders are followed, but not to one that holds the link.

    Raises:
        PermissionError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        above, place = os.path.realpath(folder), f"{Path(folder).relative_to(root).as_posix()}/".removeprefix("./")
        subfolders[:] = [
            s
            for s in subfolders
            if not s.startswith(".") and not f"{above}/".startswith(f"{os.path.realpath(os.path.join(folder, s))}/")
        ]
        for name in files:
            text = os.path.splitext(name)[1].lower() in (".txt", ".json")
            if text or (_is_picture(name) and not name.startswith(".")):
                yield place + name


def _beside(picture: Path) -> tuple[bytes | None, bytes | None]:
    """The text and the JSON of a picture's name."""

    def read(suffix: str) -> bytes | None:
        for file in (picture.with_suffix(suffix), picture.with_suffix(suffix.upper())):
            with suppress(OSError, ValueError):
                if file.is_file():
                    return file.read_bytes() or None
        return None

    return read(".txt"), read(".json")
