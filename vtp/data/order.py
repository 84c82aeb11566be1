"""In which order samples are read: an epoch is dealt to streams without gaps or repeats, and is entered anywhere.

A stream is one loader process of one rank. A place says where it stands, so that a run goes on behind the last sample
it used, on as many streams or on another number of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from vtp.config import ConfigError
from vtp.data.samples import Raw, Source

EPOCH, BLOCK, BATCH = 1, 2, 3  # what a random stream is for, so that no two share their numbers


class Place(NamedTuple):
    """Where a stream stands in one source: behind `done` samples of the block that starts behind sample `skip` of the
    shard at position `first` in the order of an epoch."""

    epoch: int = 0
    first: int = 0
    skip: int = 0
    done: int = 0
    used: int = 0  # samples used in all, counted by the reader: what keeps the shares of a mixture


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
    epoch, first, skip, done, _ = place
    seen_in_part = max((end[0] for layout in past for end in layout.ends), default=-1)
    while True:
        order = np.random.default_rng([seed, EPOCH, epoch]).permutation(len(source.shards))
        samples = _epoch(source, size, order, epoch, (stream, streams), first, skip, past)
        empty = first == skip == done == 0 and epoch > seen_in_part
        before = source.report.copy()
        while held := list(islice(samples, block)):
            if done:  # the epoch's first block here, counted when it was read before
                _restore(source.report, before)
            empty = False
            key = [seed, BLOCK, stream, epoch, first, skip]
            shuffled = np.random.default_rng(key).permutation(len(held)).tolist() if block > 1 else [0]
            end = held[-1][1:] if len(held) == block else (len(order), 0)  # a short block is read to the epoch's end
            raws: list[Raw | None] = [raw for raw, _, _ in held]
            del held
            for j in range(done, len(raws)):
                raw, raws[shuffled[j]] = raws[shuffled[j]], None
                assert raw is not None
                within = (first, skip, j + 1) if j + 1 < len(raws) else (*end, 0)
                yield raw, Place(epoch, *within)
            (first, skip), done = end, 0
        if empty:
            raise ConfigError(
                f"{source.name}: an epoch gave no sample to loader process {stream} of {streams}; "
                "mend the data or use fewer workers"
            )
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
        in_part = not whole or bool(layouts) or (n == first and skip > 0)
        j, before = -1, source.report.copy() if in_part else Counter()
        for j, raw in enumerate(source.read(source.shards[int(order[n])], size)):
            if in_part:
                theirs = not (whole or (n + j) % streams == stream)
                if theirs or (n == first and j < skip) or _read(layouts, epoch, n, j):
                    _restore(source.report, before)
                    continue
            yield raw, n, j + 1
            if in_part:
                before = source.report.copy()
        if not (whole or (n + j + 1) % streams == stream):
            _restore(source.report, before)


def _read(layouts: Sequence[tuple[Layout, bool]], epoch: int, n: int, j: int) -> bool:
    """Whether sample j of the shard at position n was read under a layout of the past."""
    return any((epoch, n, j) < layout.ends[(n if by_shard else n + j) % layout.streams] for layout, by_shard in layouts)


def _restore(report: Counter[str], before: Counter[str]) -> None:
    """What another stream, or this one before it was resumed, has counted."""
    report.clear()
    report.update(before)


def _whole_shards(source: Source, streams: int) -> bool:
    return source.random_access or len(source.shards) >= 4 * streams
