"""An endless, exactly resumable stream of batches for training, and plain passes over a source for evaluation.

Everything random in batch k of worker w on rank r is drawn from (seed, r, w, k). A batch carries the position at which
its worker stands after it, so that a run resumes behind the last batch that was consumed, not the last one prefetched.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vtp import dist
from vtp.config import ConfigError
from vtp.data.decode import BadImage, decode
from vtp.data.masks import block_masks, targets
from vtp.data.sources import Raw, Source, counts, head
from vtp.data.views import BatchConfig, ViewsConfig, caption_span, check, make
from vtp.images import normalise, squash

Tokenizer = Callable[[list[str]], Tensor]


class ClipBatch(NamedTuple):
    images: Tensor  # [Bc, 3, H, W]
    tokens: Tensor  # [Bc, L] int64, L that of the longest caption of the batch


class SSLBatch(NamedTuple):
    global_crops: Tensor  # [2, Bs, 3, G, G]
    local_crops: Tensor  # [n, Bs, 3, S, S]
    masks: Tensor  # [2, Bs, N] bool, True where the student sees the mask token
    mask_indices: Tensor  # [M] int64, the True positions of masks.flatten()
    mask_weights: Tensor  # [M] float32, 1 / (masked patches of that crop)


class RecBatch(NamedTuple):
    images: Tensor  # [Br, 3, H, W]; empty until `finish` where rows says which CLIP views they are
    rows: Tensor | None  # [Br] int64 into clip.images, or None where the view is its own


class Cursor(NamedTuple):
    """Where a worker stands: it has emitted `done` samples of the block that starts at sample `skip` of its shard
    number `first` of an epoch, and `batches` batches in all."""

    worker: int
    epoch: int = 0
    first: int = 0
    skip: int = 0
    done: int = 0
    batches: int = 0


class Batch(NamedTuple):
    """Views of one draw of pairs. Images are bytes until `augment.finish` makes them normalised floats."""

    clip: ClipBatch | None
    ssl: SSLBatch | None
    rec: RecBatch | None
    cursor: Cursor
    report: dict[str, int]  # of the worker so far: "samples" seen, and skipped ones by reason

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; the copy does not wait where memory is pinned."""

        def moved(part: Any) -> Any:
            if part is None:
                return None
            return type(part)(*(t if t is None else t.to(device, non_blocking=True) for t in part))

        return self._replace(clip=moved(self.clip), ssl=moved(self.ssl), rec=moved(self.rec))


class Loader:
    """Endless iterator of `Batch` for this rank.

    Args:
        source: where samples come from.
        views: which crops are made; an objective whose batch size is 0 gets none.
        batch: pairs per rank and step for each objective.
        tokenizer: captions -> [n, context] int64, zero behind the end token; may be None where batch.clip is 0.
        patch_size: checked against the sizes of the views, and the grid of the masks.
        workers: processes that decode and crop; 0 does it in this one.
        shuffle: samples a worker holds to shuffle within (sources with random access are shuffled completely).
        max_broken: share of samples that may be unusable before the run is stopped.
        pin_memory: whether batches are to be copied to a GPU.

    Raises:
        ConfigError: sizes that do not fit, no usable picture, or no captions where they are needed.
    """

    def __init__(
        self,
        source: Source,
        views: ViewsConfig,
        batch: BatchConfig,
        tokenizer: Tokenizer | None,
        *,
        patch_size: int,
        seed: int = 0,
        workers: int = 0,
        shuffle: int = 1024,
        max_broken: float = 0.5,
        pin_memory: bool = False,
    ) -> None:
        check(views, batch, patch_size)
        _check_source(source, captions=batch.clip > 0)
        self.source, self.seed, self.workers = source, seed, workers
        self._makers = max(1, workers)
        if source.random_access and len(source.shards) < self._makers * dist.world_size():
            raise ConfigError(
                f"{source.name} has {len(source.shards)} pictures for {self._makers * dist.world_size()} "
                "loader processes; use fewer workers or more data"
            )
        self._dataset = _Batches(
            source, views, batch, tokenizer, patch_size, seed, self._makers, shuffle, max_broken, dist.rank()
        )
        self._pin_memory = pin_memory
        self._iterator: Iterator[Batch] | None = None
        self._reports: dict[int, dict[str, int]] = {}
        self._next = 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except ConfigError as error:  # a worker's comes with its traceback in the text; the last line says it all
            raise ConfigError(str(error).strip().splitlines()[-1].split("ConfigError: ")[-1]) from None
        worker = batch.cursor.worker
        self._dataset.cursors[worker] = batch.cursor
        self._reports[worker] = batch.report
        self._next = (worker + 1) % self._makers
        return batch

    @property
    def report(self) -> Counter[str]:
        """Samples seen and skipped on this rank since the start of this process, by reason."""
        total: Counter[str] = Counter()
        for report in self._reports.values():
            total.update(report)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the position behind the last consumed batch."""
        cursors = [list(cursor) for cursor in self._dataset.cursors]
        return {"seed": self.seed, "world": dist.world_size(), "next": self._next, "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state_dict` was called.

        Raises:
            ConfigError: another seed, or another number of ranks or workers.
        """
        here = {"seed": self.seed, "world": dist.world_size(), "workers": self._makers}
        there = {"seed": state["seed"], "world": state["world"], "workers": len(state["cursors"])}
        if here != there:
            raise ConfigError(f"the loader's position was saved with {there}, but this run has {here}; make them equal")
        self.close()
        self._dataset.cursors = [Cursor(*numbers) for numbers in state["cursors"]]
        self._next = state["next"]

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        self._iterator = None

    def _start(self) -> Iterator[Batch]:
        self._dataset.turn = self._next
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            prefetch_factor=2 if self.workers else None,
            generator=torch.Generator(),  # otherwise starting, and so resuming, draws from the global one
        )
        with warnings.catch_warnings():
            # Python warns of any fork beside threads; the workers use no lock that a thread of ours could hold.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
            return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_source(source: Source, captions: bool) -> None:
    usable = captioned = False
    for raw in head(source, 100):
        captioned = captioned or bool(raw.captions)
        usable = usable or _pixels(raw, Counter()) is not None
        if usable and (captioned or not captions):
            return
    if not usable:
        raise ConfigError(f"{source.name}: none of the first pictures can be read; is it the right data?")
    raise ConfigError(
        f"{source.name} has no captions, which the clip objective learns from; give each picture a text "
        '(metadata.jsonl: {"file_name": ..., "text": ...}; shards: KEY.txt or KEY.json), give annotations=FILE.jsonl, '
        "or switch the objective off with weights.clip=0"
    )


def _pixels(raw: Raw, report: Counter[str]) -> ndarray | None:
    """Decoded picture [h, w, 3], or None and the reason counted."""
    if not isinstance(raw.image, bytes):
        return raw.image
    try:
        return decode(raw.image)
    except BadImage as error:
        report[error.reason] += 1
        return None


# --- what runs in a worker ---


class _Batches(IterableDataset[Batch]):
    def __init__(
        self,
        source: Source,
        views: ViewsConfig,
        batch: BatchConfig,
        tokenizer: Tokenizer | None,
        patch_size: int,
        seed: int,
        workers: int,
        shuffle: int,
        max_broken: float,
        rank: int,
    ) -> None:
        self.source, self.views, self.batch, self.tokenizer, self.patch_size = (
            source,
            views,
            batch,
            tokenizer,
            patch_size,
        )
        self.seed, self.rank, self.workers, self.shuffle, self.max_broken = seed, rank, workers, shuffle, max_broken
        self.streams = workers * dist.world_size()
        self.cursors = [Cursor(worker) for worker in range(workers)]
        self.turn = 0  # the worker whose batch comes next

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = self.turn if info is None else (info.id + self.turn) % self.workers
        cursor = self.cursors[worker]
        self.source.report.clear()
        samples = self._usable(cursor)
        for k in itertools.count(cursor.batches):
            rng = np.random.default_rng([self.seed, _BATCH, self.rank, worker, k])
            drawn = list(itertools.islice(samples, self.batch.pairs))
            cursor = drawn[-1][2]._replace(batches=k + 1)
            raws, images, _ = (list(column) for column in zip(*drawn, strict=True))
            parts = build(raws, images, self.views, self.batch, self.tokenizer, self.patch_size, rng)
            yield Batch(*parts, cursor, dict(self.source.report))

    def _usable(self, cursor: Cursor) -> Iterator[tuple[Raw, ndarray, Cursor]]:
        report = self.source.report
        size = max(
            self.views.size if self.batch.clip or self.batch.rec else 0, self.views.global_size * bool(self.batch.ssl)
        )
        stream = self.rank * self.workers + cursor.worker
        block = 1 if self.source.random_access else self.shuffle
        for raw, after in positions(self.source, size, self.seed, stream, self.streams, block, cursor):
            if self.batch.clip and not raw.captions:
                report["no caption"] += 1
            elif (image := _pixels(raw, report)) is not None:
                yield raw, image, after
            if len(report) > 1:
                self._check_share(report)

    def _check_share(self, report: Counter[str]) -> None:
        seen, broken = report["samples"], sum(n for reason, n in report.items() if reason != "samples")
        if broken > self.max_broken * seen and broken >= 20:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.most_common() if reason != "samples")
            raise ConfigError(
                f"{self.source.name}: {broken} of {seen} samples cannot be used ({reasons}), more than the share "
                f"{self.max_broken} that a run bears; mend the data"
            )


_EPOCH, _BLOCK, _BATCH = 1, 2, 3  # what a random stream is for, so that no two share their numbers


def positions(
    source: Source, size: int, seed: int, stream: int, streams: int, block: int, cursor: Cursor
) -> Iterator[tuple[Raw, Cursor]]:
    """Endless samples of one of `streams` disjoint streams, from a cursor on, each with the cursor behind it.

    Each epoch permutes the shards alike for all streams. Where there are enough of them a stream reads its own, else
    all streams read all shards and take turns with the samples. Samples are shuffled within blocks of `block`: a block
    can be read again, which makes resuming exact.
    """
    whole_shards = source.random_access or len(source.shards) >= 4 * streams
    _, epoch, first, skip, done, _ = cursor
    while True:
        order = np.random.default_rng([seed, _EPOCH, epoch]).permutation(len(source.shards))
        mine = order[stream::streams] if whole_shards else order
        share = None if whole_shards else (stream, streams)
        samples = _epoch(source, size, mine, share, first, skip)
        empty = first == skip == done == 0
        while held := list(itertools.islice(samples, block)):
            empty = False
            key = [seed, _BLOCK, stream, epoch, first, skip]
            shuffled = np.random.default_rng(key).permutation(len(held)).tolist() if block > 1 else [0]
            end = held[-1][1:]
            raws: list[Raw | None] = [raw for raw, _, _ in held]
            del held
            for j in range(done, len(raws)):
                raw, raws[shuffled[j]] = raws[shuffled[j]], None
                assert raw is not None
                yield raw, cursor._replace(epoch=epoch, first=first, skip=skip, done=j + 1)
            (first, skip), done = end, 0
        if empty:
            raise ConfigError(f"{source.name}: an epoch gave no sample to loader process {stream} of {streams}")
        epoch, first, skip, done = epoch + 1, 0, 0, 0


def _epoch(
    source: Source, size: int, mine: Int[ndarray, " n"], share: tuple[int, int] | None, first: int, skip: int
) -> Iterator[tuple[Raw, int, int]]:
    """(sample, shard number, samples of that shard read so far) behind `skip` samples of shard number `first`."""
    for n in range(first, len(mine)):
        for j, raw in enumerate(source.read(source.shards[int(mine[n])], size)):
            if (n > first or j >= skip) and (share is None or (n + j) % share[1] == share[0]):
                yield raw, n, j + 1


def build(
    raws: Sequence[Raw],
    images: list[ndarray],
    views: ViewsConfig,
    batch: BatchConfig,
    tokenizer: Tokenizer | None,
    patch_size: int,
    rng: np.random.Generator,
) -> tuple[ClipBatch | None, SSLBatch | None, RecBatch | None]:
    """The views of one draw of pairs."""
    clip, ssl, rec = None, None, None
    if batch.clip:
        rows = _draw(len(images), batch.clip, rng)
        pictures = make([images[i] for i in rows], views.size, views.scale, views.flip, rng)[0]
        texts = [raws[i].captions[int(rng.integers(len(raws[i].captions)))] for i in rows]
        if views.caption_spans > 0:
            texts = [caption_span(text, rng) if rng.random() < views.caption_spans else text for text in texts]
        assert tokenizer is not None
        clip = ClipBatch(pictures, cut(tokenizer(texts)))
    if batch.rec and clip is not None and views.share:
        rec = RecBatch(clip.images[:0], torch.from_numpy(_draw(batch.clip, batch.rec, rng)))
    elif batch.rec:
        rows = _draw(len(images), batch.rec, rng)
        scale = views.scale if views.share else views.rec_scale
        rec = RecBatch(make([images[i] for i in rows], views.size, scale, views.flip, rng)[0], None)
    if batch.ssl:
        chosen = [images[i] for i in _draw(len(images), batch.ssl, rng)]
        global_crops = make(chosen, views.global_size, views.global_scale, views.ssl_flip, rng, 2)
        local_crops = make(chosen, views.local_size, views.local_scale, views.ssl_flip, rng, views.local_crops)
        side = views.global_size // patch_size
        masks = block_masks(2 * batch.ssl, (side, side), views.mask_probability, views.mask_ratio, rng)
        indices, weights = (torch.from_numpy(a) for a in targets(masks))
        masks_ = torch.from_numpy(masks).view(2, batch.ssl, side * side)
        ssl = SSLBatch(global_crops, local_crops, masks_, indices, weights)
    return clip, ssl, rec


def _draw(n: int, k: int, rng: np.random.Generator) -> Int[ndarray, " k"]:
    """k of n rows, in order; all of them without a draw."""
    return np.arange(n) if k == n else np.sort(rng.permutation(n)[:k])


def cut(tokens: Int[Tensor, "b context"]) -> Int[Tensor, "b length"]:
    """Cut the padding that every row has: a causal text tower that pools at the end token never needs it."""
    return tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1].contiguous()


# --- plain passes, for evaluation ---

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
        if wanted(raw) and (image := _pixels(raw, source.report)) is not None
    )
    first = itertools.islice(found, limit)
    while rows := list(itertools.islice(first, batch_size)):
        images = np.stack([np.asarray(resize(Image.fromarray(image), size)) for _, image in rows])
        yield normalise(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()), [raw for raw, _ in rows]
