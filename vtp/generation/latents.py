"""`vtp latents`: images -> a folder of latents with their classes and the statistics to normalise them by.

shard_00000.safetensors ...   latents [m, c, h, w] float32, latents_flip (the mirrored images'), labels [m] int64
                              (of data that have labels)
stats.json                    written last: a folder without it is unfinished
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtp.config import ConfigError
from vtp.data.samples import Source, in_vain
from vtp.data.sources import open_source
from vtp.engine.logging import progress_bar, say
from vtp.engine.optim import Asked, inference, pick_device, pick_precision
from vtp.files import as_new, file_sha256
from vtp.images import center_crop, normalise
from vtp.models.latent_stats import ChannelStats
from vtp.models.published import open_tokenizer, tokenizer_weights

STATS = "stats.json"


@dataclass(frozen=True, kw_only=True)
class LatentStats(ChannelStats):
    """What stats.json says of a folder of latents: how to normalise them and where they come from.

    Mean and standard deviation are over all unmirrored latents.
    """

    shape: tuple[int, int, int]  # channels, rows, columns
    count: int  # images
    size: int  # side of the images in pixels
    data: str
    flip: bool  # whether the mirrored images' latents are there too
    limit: int | None  # images asked for at most
    label: str | None  # which of the data's labels; None: they had none, and the shards hold no labels
    classes: tuple[str, ...]  # names of the label's values
    left_out: dict[str, int]  # samples of the data that are not here, by reason
    tokenizer: str
    tokenizer_sha256: str  # of its model.safetensors

    @staticmethod
    def read(file: Path) -> LatentStats:
        """From a stats.json.

        Raises:
            ConfigError: there is none, or it lacks something.
        """
        if not file.is_file():
            raise ConfigError(f"no {file}: make it with `vtp latents TOKENIZER --data DATA --out {file.parent}`")
        saved: dict[str, Any] = json.loads(file.read_text())
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        try:
            return LatentStats(**values)
        except TypeError as error:
            raise ConfigError(f"{file} does not describe latents: {error}") from None

    def write(self, file: Path) -> None:
        """To a stats.json."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


class Latents:
    """A folder of latents, memory-mapped: rows are read from the disk as they are taken."""

    def __init__(self, folder: Path) -> None:
        self.stats = LatentStats.read(folder / STATS)
        self.shards = []
        for file in sorted(folder.glob("shard_*.safetensors")):
            with safe_open(file, "pt") as shard:
                self.shards.append({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118
        self.ends = torch.tensor([len(s["latents"]) for s in self.shards]).cumsum(0)
        if not self.shards or len(self) != self.stats.count:
            found = len(self) if self.shards else 0
            raise ConfigError(f"{folder} holds {found} latents, its {STATS} says {self.stats.count}: make it again")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(
        self, rows: Int[Tensor, " b"], mirrored: Bool[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        """Latents (of the mirrored image where asked) and labels of some rows; they must have labels."""
        shards = torch.searchsorted(self.ends, rows, right=True)
        latents, labels = torch.empty(len(rows), *self.stats.shape), torch.empty(len(rows), dtype=torch.int64)
        for i in shards.unique().tolist():
            inside = rows - (int(self.ends[i - 1]) if i > 0 else 0)
            for key, chosen in (("latents", ~mirrored), ("latents_flip", mirrored)):
                where = (shards == i) & chosen
                if where.any():
                    latents[where] = self.shards[i][key][inside[where]]
                    labels[where] = self.shards[i]["labels"][inside[where]]
        return latents, labels


def encode_latents(
    tokenizer: Path,
    data: str,
    out: Path,
    *,
    label: str | None = None,
    annotations: str | None = None,
    size: int | None = None,
    flip: bool = True,
    limit: int | None = None,
    batch_size: int = 64,
    shard_size: int = 10_000,
    device: str = "auto",
    precision: Asked = "fp32",
) -> Path:
    """Write the latents of `data` under a tokenizer to `out`, and return it.

    Args:
        tokenizer: a published tokenizer folder.
        data: any DATA string.
        label: which label of the data becomes the class; may be left out where there is only one, or none: then the
            latents have no labels.
        annotations: captions and labels by key, beside tar shards.
        size: side of the images, cropped as ADM does; the tokenizer's own if None.
        flip: also encode the mirrored images.
        limit: stop after so many images, in the data's order: give it for `scenes`, which has a million.
        batch_size: images encoded at once.
        shard_size: images in a file.

    A folder that already holds these latents is left as it is. Samples without the label and broken pictures are left
    out, and counted in stats.json.

    Raises:
        ConfigError: no such tokenizer, data or label, or `out` holds other latents.
    """
    weights = tokenizer_weights(tokenizer)
    source = open_source(data, annotations)
    label = _label(source, label)
    target = pick_device(device)
    model: Any = open_tokenizer(tokenizer)
    model.to(target)
    size, patch = model.config.image_size if size is None else size, model.config.vision_patch_size
    if size < patch or size % patch:
        raise ConfigError(f"size={size} is not a multiple of the tokenizer's patch size {patch}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    origin: dict[str, Any] = {
        "data": data,
        "label": label,
        "size": size,
        "flip": flip,
        "limit": limit,
        "tokenizer_sha256": file_sha256(weights),
    }
    if (out / STATS).is_file():
        there = asdict(LatentStats.read(out / STATS))
        changed = [f"{k}: {there[k]} -> {v}" for k, v in origin.items() if there[k] != v]
        if changed:
            raise ConfigError(f"{out} holds other latents ({'; '.join(changed)}); choose another --out")
        say(f"{out} already holds these latents")
        return out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("shard_*.safetensors"):  # of an unfinished run
        old.unlink()
    encode = inference(model.get_reconstruction_latents, target, pick_precision(precision, target))
    left_out: Counter[str] = Counter()
    samples = islice(_labelled(source, label, size, left_out), limit)
    sums = _Moments()
    parts: list[dict[str, Tensor]] = []
    count = shard = 0
    with progress_bar("latents") as bar:
        task = bar.add_task("latents", total=limit, status="")
        while rows := list(islice(samples, min(batch_size, shard_size - sum(len(p["latents"]) for p in parts)))):
            pixels = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2)
            images = normalise(pixels.to(target))
            part = {"latents": encode(images).cpu()}
            if label is not None:
                part["labels"] = torch.tensor([y for _, y in rows])
            if flip:
                part["latents_flip"] = encode(images.flip(-1)).cpu()
            sums.add(part["latents"])
            parts.append(part)
            count += len(rows)
            if sum(len(p["latents"]) for p in parts) == shard_size:
                _write_shard(out, shard, parts)
                shard, parts = shard + 1, []
            bar.update(task, completed=count)
    if parts:
        _write_shard(out, shard, parts)
    if count == 0:
        which = "" if label is None else f" has the label '{label}'"
        raise ConfigError(f"no usable picture in {data}{which}; left out: {dict(left_out)}")
    left_out.update(in_vain(source.report))
    channels, height, width = sums.shape
    mean, std = sums.mean_std()
    LatentStats(
        mean=mean,
        std=std,
        shape=(channels, height, width),
        count=count,
        classes=() if label is None else source.classes[label],
        left_out=dict(left_out),
        tokenizer=str(tokenizer.resolve()),
        **origin,
    ).write(out / STATS)
    unlabelled = ", without labels: the data have none" if label is None else ""
    say(f"{count} latents of {channels} x {height} x {width} in {out}{unlabelled}")
    return out


def _label(source: Source, label: str | None) -> str | None:
    names = sorted(source.classes)
    if label is None and len(names) < 2:
        return names[0] if names else None
    if label not in source.classes:
        asked = "has several labels" if label is None else f"has no label '{label}'"
        there = f"choose --label of {', '.join(names)}" if names else "give labels by class folders or --annotations"
        raise ConfigError(f"{source.name} {asked if names else 'has no labels'}; {there}")
    return label


def _labelled(
    source: Source, label: str | None, size: int, left_out: Counter[str]
) -> Iterator[tuple[UInt8[ndarray, "h w 3"], int | None]]:
    """Cropped pictures that have the label, with its value, and the others are counted; all of them for no label."""
    for shard in source.shards:
        for raw in source.read(shard, size):
            if label is not None and label not in raw.labels:
                left_out[f"no {label}"] += 1
                continue
            if (image := raw.pixels(left_out)) is not None:
                same = image.shape[:2] == (size, size)
                value = None if label is None else raw.labels[label]
                yield image if same else np.asarray(center_crop(Image.fromarray(image), size)), value


def _write_shard(out: Path, number: int, parts: Sequence[dict[str, Tensor]]) -> None:
    file = out / f"shard_{number:05d}.safetensors"
    save_file({key: torch.cat([p[key] for p in parts]).contiguous() for key in parts[0]}, file)
    as_new(file)


class _Moments:
    """Mean and standard deviation per channel of a stream, from float64 sums about the first batch's mean."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()

    def add(self, x: Float[Tensor, "b c h w"]) -> None:
        wide = x.double()
        if not self.shape:
            self.shape, self.n = tuple(x.shape[1:]), 0
            self.offset = wide.mean((0, 2, 3))
            self.first, self.second = torch.zeros_like(self.offset), torch.zeros_like(self.offset)
        wide = wide - self.offset[:, None, None]
        self.n += wide[:, 0].numel()
        self.first += wide.sum((0, 2, 3))
        self.second += wide.square().sum((0, 2, 3))

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = self.first / self.n
        variance = (self.second - self.n * mean.square()) / max(1, self.n - 1)
        return tuple((mean + self.offset).tolist()), tuple(variance.clamp(min=0).sqrt().tolist())
