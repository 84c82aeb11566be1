"""Samples of Hugging Face `datasets`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtp.config import ConfigError
from vtp.data import shards
from vtp.data.samples import (
    CAPTION_COLUMNS,
    Alone,
    Folders,
    Raw,
    Table,
    assemble,
    captions_in,
    classes_of,
    ended,
    is_number,
    spaced,
    templates_of,
)
from vtp.files import path_of, same_folder


@dataclass
class HubSource(Alone):
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
        folder = self._folder = path_of(path)
        try:
            if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
                found = datasets.load_from_disk(str(folder))
                rows = found
                if isinstance(found, datasets.DatasetDict):
                    if (split or "train") not in found:
                        raise ValueError(f"it has no split '{split or 'train'}', only {', '.join(found)}")
                    rows = found[split or "train"]
                elif split and split != str(found.split):
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
        named = {column: kind.names for column, kind in features.items() if hasattr(kind, "names")}
        labels = {column: spaced(names) for column, names in named.items()}
        self._captions = {column: labels.pop(column) for column in CAPTION_COLUMNS if column in labels}
        renamed = {} if "class" in labels else {"label": "class"}
        self._columns = {renamed.get(column, column): column for column in labels}
        classes = {label: labels[column] for label, column in self._columns.items()}
        self.classes = classes | classes_of(self.table)
        self.templates = templates_of(self.classes)
        self._folders = Folders({}, classes)
        self._whole = Counter[str]()

    def keeps(self, folder: Path) -> bool:
        return any(same_folder(place, self._folder) for place in (folder, *folder.parents))  # datasets reads it whole

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
            named = {c: names[row[c]] for c, names in self._captions.items() if row[c] not in (None, -1)}
            words = {c: name for c, name in named.items() if not is_number(name)}
            key = str(own) if (own := row.get("key")) is not None else key
            yield assemble(key, data, captions_in(row | words), labels, None, self._folders, self.table, self.report)

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
            ended(given, False, self._whole, self.report)
        else:
            if not self.random_access:  # or a shard is but a row
                ended(given, True, self._whole, self.report)
