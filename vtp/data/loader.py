"""An endless, exactly resumable stream of batches for training, and plain passes over a source for evaluation.

Everything random in batch k of worker w on rank r is drawn from (seed, r, w, k). A batch carries the position at which
its worker stands after it, so that a run resumes behind the last batch that was consumed, not the last one prefetched.
All workers of all ranks are streams of one epoch, which is split among them without gaps or repeats.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch import distributed as td
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vtp import dist
from vtp.config import ConfigError
from vtp.data.decode import BadImage, decode
from vtp.data.masks import block_masks, targets
from vtp.data.sources import Raw, Source, counts, head, left_out
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


class Place(NamedTuple):
    """Where a stream stands in one source: behind `done` samples of the block that starts behind sample `skip` of the
    shard at position `first` in the order of an epoch."""

    epoch: int = 0
    first: int = 0
    skip: int = 0
    done: int = 0
    drawn: int = 0  # samples read in all: what keeps the shares of a mixture


class Cursor(NamedTuple):
    """Where a worker stands: its place in every source, and the batches it has emitted."""

    worker: int
    places: tuple[Place, ...]
    batches: int = 0


class Layout(NamedTuple):
    """What `streams` streams had read of a source when a run went on with another number of them: each stream
    everything before its (epoch, position of the shard, sample)."""

    streams: int
    ends: tuple[tuple[int, int, int], ...]


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
        others: sources of their own for the objectives "ssl" and "rec".

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
        others: Mapping[str, Source] = MappingProxyType({}),
    ) -> None:
        check(views, batch, patch_size)
        self.seed, self.workers = seed, workers
        self._makers, self._max_broken = max(1, workers), max_broken
        self._streams = self._makers * dist.world_size()
        draws = _draws(source, others, batch, views)
        for draw in draws:
            _check_source(draw.source, captions=draw.captions)
            for part, _ in draw.source.parts:
                if part.random_access and len(part.shards) < self._streams:
                    raise ConfigError(
                        f"{part.name} has {len(part.shards)} pictures for {self._streams} "
                        "loader processes; use fewer workers or more data"
                    )
        self._names = [part.name for draw in draws for part, _ in draw.source.parts]
        self._dataset = _Batches(
            draws, views, batch, tokenizer, patch_size, seed, self._makers, shuffle, dist.rank(), self._streams
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
        if left_out(batch.report):
            self._check_share()
        self._next = (worker + 1) % self._makers
        return batch

    @property
    def report(self) -> Counter[str]:
        """Samples seen and skipped on this rank since the start of this process, by reason."""
        total: Counter[str] = Counter()
        for report in self._reports.values():
            total.update(report)
        return total

    def _check_share(self) -> None:
        """Over all workers: a single one may have begun with the one bad shard of many."""
        report = self.report
        broken = left_out(report)
        if broken.total() >= 20 and broken.total() > self._max_broken * report["samples"]:
            reasons = ", ".join(f"{n} {reason}" for reason, n in broken.most_common())
            raise ConfigError(
                f"{' and '.join(self._names)}: {broken.total()} of {report['samples']} samples cannot be used "
                f"({reasons}), more than the share {self._max_broken} that a run bears; mend the data"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on every rank: the positions of all ranks behind the last consumed batch.

        On several ranks this is a collective.
        """
        cursors = list(self._dataset.cursors)
        if dist.world_size() > 1:
            everyone: list[Any] = [None] * dist.world_size()
            td.all_gather_object(everyone, cursors)
            cursors = list(itertools.chain(*everyone))
        state = {"seed": self.seed, "workers": self._makers, "next": self._next, "sources": self._names}
        return state | {"cursors": cursors, "past": list(self._dataset.past)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state_dict` was called.

        With as many ranks and workers as then, the batches are those of an uninterrupted run. With another number the
        rest of the epoch is dealt anew: nothing is left out, and of sources in shards each former worker repeats fewer
        than `shuffle` samples, those it had taken from the block it was shuffling; of others nothing is repeated.

        Raises:
            ConfigError: another seed, or other sources.
        """
        here = {"seed": self.seed, "sources": self._names}
        there = {name: state[name] for name in here}
        if here != there:
            raise ConfigError(f"the loader's position was saved with {there}, but this run has {here}; make them equal")
        self.close()
        cursors = [Cursor(w, tuple(Place(*p) for p in places), n) for w, places, n in state["cursors"]]
        past = [tuple(Layout(n, tuple((e, f, s) for e, f, s in ends)) for n, ends in of) for of in state["past"]]
        if (len(cursors), state["workers"]) == (self._streams, self._makers):
            mine = slice(dist.rank() * self._makers, (dist.rank() + 1) * self._makers)
            self._dataset.cursors, self._next = cursors[mine], state["next"]
        else:
            places = []
            for i, of in enumerate(zip(*(cursor.places for cursor in cursors), strict=True)):
                layout = Layout(len(of), tuple(place[:3] for place in of))
                epoch = min(layout.ends)[0]
                past[i] = tuple(old for old in (*past[i], layout) if max(old.ends)[0] >= epoch)
                places.append(Place(epoch, drawn=sum(place.drawn for place in of) // self._streams))
            batches = max(cursor.batches for cursor in cursors)
            self._dataset.cursors = [Cursor(worker, tuple(places), batches) for worker in range(self._makers)]
            self._next = 0
        self._dataset.past = past

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


class _Draw(NamedTuple):
    """Objectives that share a draw of pairs."""

    source: Source
    objectives: tuple[str, ...]
    pairs: int
    captions: bool  # whether every pair must have one
    size: int  # pixels; at which a source that draws its pictures does so


def _draws(source: Source, others: Mapping[str, Source], batch: BatchConfig, views: ViewsConfig) -> list[_Draw]:
    active = [name for name in ("clip", "ssl", "rec") if getattr(batch, name)]
    of: dict[int, tuple[Source, list[str]]] = {}
    for name in active:
        own = others.get(name, source)
        of.setdefault(id(own), (own, []))[1].append(name)
    return [
        _Draw(
            own,
            tuple(names),
            max(getattr(batch, name) for name in names),
            "clip" in names,
            max(views.global_size if name == "ssl" else views.size for name in names),
        )
        for own, names in of.values()
    ]


class _Batches(IterableDataset[Batch]):
    def __init__(
        self,
        draws: list[_Draw],
        views: ViewsConfig,
        batch: BatchConfig,
        tokenizer: Tokenizer | None,
        patch_size: int,
        seed: int,
        workers: int,
        shuffle: int,
        rank: int,
        streams: int,
    ) -> None:
        self.draws, self.views, self.batch, self.tokenizer = draws, views, batch, tokenizer
        self.patch_size, self.seed, self.workers, self.shuffle = patch_size, seed, workers, shuffle
        self.rank, self.streams = rank, streams
        parts = sum(len(draw.source.parts) for draw in draws)
        self.cursors = [Cursor(worker, (Place(),) * parts) for worker in range(workers)]
        self.past: list[tuple[Layout, ...]] = [()] * parts  # for each source
        self.turn = 0  # the worker whose batch comes next

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = self.turn if info is None else (info.id + self.turn) % self.workers
        cursor = self.cursors[worker]
        places, past = iter(cursor.places), iter(self.past)
        streams = []
        for draw in self.draws:
            n = len(draw.source.parts)
            begin = list(itertools.islice(places, n)), list(itertools.islice(past, n))
            streams.append(self._usable(draw, self.rank * self.workers + worker, *begin))
            draw.source.report.clear()
        for k in itertools.count(cursor.batches):
            rng = np.random.default_rng([self.seed, _BATCH, self.rank, worker, k])
            pairs: dict[str, tuple[list[Raw], list[ndarray]]] = {}
            ends: tuple[Place, ...] = ()
            for draw, samples in zip(self.draws, streams, strict=True):
                raws, images, after = zip(*itertools.islice(samples, draw.pairs), strict=True)
                ends += after[-1]
                pairs |= dict.fromkeys(draw.objectives, (list(raws), list(images)))
            views = build(pairs, self.views, self.batch, self.tokenizer, self.patch_size, rng)
            report = sum((draw.source.report for draw in self.draws), Counter())
            yield Batch(*views, Cursor(worker, ends, k + 1), dict(report))

    def _usable(
        self, draw: _Draw, stream: int, places: list[Place], past: list[tuple[Layout, ...]]
    ) -> Iterator[tuple[Raw, ndarray, tuple[Place, ...]]]:
        """Samples of a stream that can be used, from the parts of a mixture by their weights, each with the places
        behind it."""
        report = draw.source.report
        sources, weights = zip(*draw.source.parts, strict=True)
        parts = [
            positions(s, draw.size, self.seed, stream, self.streams, 1 if s.random_access else self.shuffle, place, old)
            for s, place, old in zip(sources, places, past, strict=True)
        ]
        drawn, misses, since = sum(place.drawn for place in places), 0, places
        while True:
            drawn += 1
            i = max(range(len(parts)), key=lambda i: weights[i] * drawn - places[i].drawn)  # furthest behind its share
            raw, place = next(parts[i])
            places = [*places[:i], place, *places[i + 1 :]]
            if draw.captions and not raw.captions:
                report["no caption"] += 1
            elif (image := _pixels(raw, report)) is not None:
                misses, since = 0, places
                yield raw, image, tuple(places)
                continue
            misses += 1
            if misses == _PATIENCE or all(p.epoch > old.epoch + 1 for p, old in zip(places, since, strict=True)):
                reasons = ", ".join(f"{n} {reason}" for reason, n in left_out(report).most_common())
                raise ConfigError(f"{draw.source.name}: {misses} samples in a row cannot be used ({reasons})")


_PATIENCE = 20_000  # unusable samples in a row: twice the largest usual shard
_EPOCH, _BLOCK, _BATCH = 1, 2, 3  # what a random stream is for, so that no two share their numbers


def positions(
    source: Source,
    size: int,
    seed: int,
    stream: int,
    streams: int,
    block: int,
    place: Place,
    past: Sequence[Layout] = (),
) -> Iterator[tuple[Raw, Place]]:
    """Endless samples of one of `streams` disjoint streams, from a place on, each with the place behind it.

    Each epoch permutes the shards alike for all streams. Where there are enough of them a stream reads its own, else
    all streams read all shards and take turns with the samples. Samples are shuffled within blocks of `block`: a block
    can be read again, which makes resuming exact. What was read under one of the layouts of the past is passed over.
    """
    epoch, first, skip, done, drawn = place
    seen_in_part = max((end[0] for layout in past for end in layout.ends), default=-1)
    while True:
        order = np.random.default_rng([seed, _EPOCH, epoch]).permutation(len(source.shards))
        samples = _epoch(source, size, order, epoch, (stream, streams), first, skip, past)
        empty = first == skip == done == 0 and epoch > seen_in_part
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
                drawn += 1
                within = (first, skip, j + 1) if j + 1 < len(raws) else (*end, 0)
                yield raw, Place(epoch, *within, drawn)
            (first, skip), done = end, 0
        if empty:
            raise ConfigError(f"{source.name}: an epoch gave no sample to loader process {stream} of {streams}")
        epoch, first, skip, done = epoch + 1, 0, 0, 0


def _epoch(
    source: Source,
    size: int,
    order: Int[ndarray, " n"],
    epoch: int,
    share: tuple[int, int],
    first: int,
    skip: int,
    past: Sequence[Layout],
) -> Iterator[tuple[Raw, int, int]]:
    """(sample, position of its shard, samples of that shard read so far) of a stream's share of an epoch, behind
    `skip` samples of the shard at position `first`."""
    stream, streams = share
    whole = _whole_shards(source, streams)
    layouts = [(layout, _whole_shards(source, layout.streams)) for layout in past]
    begin, step = (first + (stream - first) % streams, streams) if whole else (first, 1)
    for n in range(begin, len(order), step):
        if any(
            (layout.ends[n % layout.streams] if by_shard else min(layout.ends)) >= (epoch, n + 1, 0)
            for layout, by_shard in layouts
        ):
            continue
        for j, raw in enumerate(source.read(source.shards[int(order[n])], size)):
            if (n == first and j < skip) or not (whole or (n + j) % streams == stream):
                continue
            if any(
                (epoch, n, j) < layout.ends[(n if by_shard else n + j) % layout.streams] for layout, by_shard in layouts
            ):
                continue
            yield raw, n, j + 1


def _whole_shards(source: Source, streams: int) -> bool:
    return source.random_access or len(source.shards) >= 4 * streams


def build(
    pairs: Mapping[str, tuple[list[Raw], list[ndarray]]],
    views: ViewsConfig,
    batch: BatchConfig,
    tokenizer: Tokenizer | None,
    patch_size: int,
    rng: np.random.Generator,
) -> tuple[ClipBatch | None, SSLBatch | None, RecBatch | None]:
    """The views of the pairs drawn for each objective."""
    clip, ssl, rec = None, None, None
    if batch.clip:
        raws, images = pairs["clip"]
        rows = _draw(len(images), batch.clip, rng)
        pictures = make([images[i] for i in rows], views.size, views.scale, views.flip, rng)[0]
        texts = [raws[i].captions[int(rng.integers(len(raws[i].captions)))] for i in rows]
        if views.caption_spans > 0:
            texts = [caption_span(text, rng) if rng.random() < views.caption_spans else text for text in texts]
        assert tokenizer is not None
        clip = ClipBatch(pictures, cut(tokenizer(texts)))
    if batch.rec and clip is not None and views.share and pairs["rec"] is pairs["clip"]:
        rec = RecBatch(clip.images[:0], torch.from_numpy(_draw(batch.clip, batch.rec, rng)))
    elif batch.rec:
        images = pairs["rec"][1]
        rows = _draw(len(images), batch.rec, rng)
        scale = views.scale if views.share else views.rec_scale
        rec = RecBatch(make([images[i] for i in rows], views.size, scale, views.flip, rng)[0], None)
    if batch.ssl:
        images = pairs["ssl"][1]
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
        if wanted(raw) and (image := _pixels(raw, source.report)) is not None
    )
    first = itertools.islice(found, limit)
    while rows := list(itertools.islice(first, batch_size)):
        images = np.stack([np.asarray(resize(Image.fromarray(image), size)) for _, image in rows])
        yield normalise(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()), [raw for raw, _ in rows]
