"""An endless, exactly resumable stream of batches for training.

Everything random in batch k of worker w on rank r is drawn from (seed, r, w, k). A batch carries the position at which
its worker stands after it, so that a run resumes behind the last batch that was consumed, not the last one prefetched.
All workers of all ranks are streams of one epoch, which is split among them without gaps or repeats.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import distributed as td
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vtp import dist
from vtp.config import ConfigError
from vtp.data.batches import Batch, Tokenizer, build
from vtp.data.order import BATCH, Cursor, Layout, Place, positions
from vtp.data.samples import LOST, Raw, Source, in_vain, left_out
from vtp.data.sources import fingerprint, head
from vtp.data.views import BatchConfig, ViewsConfig, check

log = logging.getLogger(__name__)
_FORMAT = 2  # of what state_dict returns
_WINDOW = 100_000  # samples on which a run is judged; its good days must not outweigh a disk that is gone
_PATIENCE = 20_000  # unusable samples in a row: twice the largest usual shard


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
        max_broken: share of samples, of the last 100,000 or so, that may be unusable before the run is stopped.
        pin_memory: whether batches are to be copied to a GPU.
        others: sources of their own for the objectives "ssl" and "rec".
        anew: where a saved position is one in other data, begin this data at its first epoch instead of refusing it.

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
        anew: bool = False,
    ) -> None:
        check(views, batch, patch_size)
        self.seed, self.workers = seed, workers
        self._makers, self._max_broken = max(1, workers), max_broken
        self._streams = self._makers * dist.world_size()
        draws = _draws(source, others, batch, views)
        for draw in draws:
            for part, _ in draw.source.parts:
                _check_source(part, captions=draw.captions)
                if part.random_access and len(part.shards) < self._streams:
                    raise ConfigError(
                        f"{part.name} has {len(part.shards)} pictures for {self._streams} "
                        "loader processes; use fewer workers or more data"
                    )
        self._names = [part.name for draw in draws for part, _ in draw.source.parts]
        self._contents = [fingerprint(draw.source) for draw in draws]
        self._anew = anew
        self._dataset = _Batches(
            draws, views, batch, tokenizer, patch_size, seed, self._makers, shuffle, dist.rank(), self._streams
        )
        self._pin_memory = pin_memory
        self._iterator: Iterator[Batch] | None = None
        self._reports: dict[int, dict[str, int]] = {}
        self._before: Counter[str] = Counter()  # of all ranks before this process began
        self._saved: Counter[str] = Counter()  # of all ranks when the state was last saved
        self._reset_window()
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
        self._check_share(batch.cursor)
        self._next = (worker + 1) % self._makers
        return batch

    @property
    def report(self) -> Counter[str]:
        """Samples seen and skipped on this rank since the start of this process, by reason."""
        total: Counter[str] = Counter()
        for report in self._reports.values():
            total.update(report)
        return total

    @property
    def total(self) -> Counter[str]:
        """The same over all ranks since the run began; where there are several, as of the last `state_dict`."""
        return self._before + self.report if dist.world_size() == 1 else self._saved

    def _reset_window(self) -> None:
        self._since: list[Counter[str]] = [Counter()]  # reports; what came after the first is judged
        self._begun: dict[int, Cursor] = {}  # where each worker stood

    def _check_share(self, cursor: Cursor) -> None:
        """Over all workers, and not before half a window, or all the data, was seen: one bad shard of many may be the
        first."""
        begun = self._begun.setdefault(cursor.worker, cursor).places
        seen = self.report - self._since[0]
        samples = seen["samples"] + seen[LOST]
        whole = all(now[:3] >= (then.epoch + 1, *then[1:3]) for now, then in zip(cursor.places, begun, strict=True))
        if samples < _WINDOW // 2 and not whole:
            return
        broken = in_vain(seen)
        if broken.total() >= 20 and broken.total() > self._max_broken * samples:
            reasons = ", ".join(f"{n} {reason}" for reason, n in broken.most_common())
            raise ConfigError(
                f"{' and '.join(self._names)}: {broken.total()} of {samples} samples cannot be used "
                f"({reasons}), more than the share {self._max_broken} that a run bears; mend the data"
            )
        if samples >= _WINDOW // 2 and len(self._since) == 1:
            self._since.append(self.report)
        elif samples >= _WINDOW:
            self._since = [self._since[1], self.report]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on every rank: the positions of all ranks behind the last consumed batch.

        On several ranks this is a collective.
        """
        ranks: list[Any] = [(self._dataset.cursors, self.report)]
        if dist.world_size() > 1:
            ranks = [None] * dist.world_size()
            td.all_gather_object(ranks, (self._dataset.cursors, self.report))
        self._saved = sum((report for _, report in ranks), self._before)
        state: dict[str, Any] = {"format": _FORMAT, "seed": self.seed, "workers": self._makers, "next": self._next}
        state |= {"sources": self._names, "contents": self._contents}
        state |= {"cursors": [c for cursors, _ in ranks for c in cursors]}
        return state | {"past": list(self._dataset.past), "report": dict(self._saved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state_dict` was called.

        With as many ranks and workers as then, the batches are those of an uninterrupted run. With another number the
        rest of the epoch is dealt anew: nothing is left out, and of sources in shards each former worker repeats fewer
        than `shuffle` samples, those it had taken from the block it was shuffling; of others nothing is repeated.

        Raises:
            ConfigError: another seed, other sources (unless `anew`), or a state that another version of vtp wrote.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(
                "the checkpoint's position in the data was written by another version of vtp; go on with that "
                "version, or begin anew with another out="
            )
        names = " and ".join(self._names)
        if self._names != state["sources"]:
            changed = f"the position was saved in other data ({' and '.join(state['sources'])}) than {names}"
        elif self._contents != state["contents"]:
            changed = f"{names} has other files or annotations than when the position was saved"
        elif self.seed != state["seed"]:
            changed = f"the position in {names} was saved with seed={state['seed']}, not {self.seed}"
        else:
            changed = ""
        if changed and not self._anew:
            raise ConfigError(f"{changed}; by resume=anyway this data is begun at its first epoch")
        if (ranks := len(state["cursors"]) // state["workers"]) != dist.world_size() and dist.is_main():
            log.warning(
                "a step had the batches of %d ranks when the run was saved, and has those of %d now; batch.* are sizes "
                "a rank, and change with them (and resume=anyway) where a step is to stay as large",
                ranks,
                dist.world_size(),
            )
        self.close()
        self._reports = {}
        self._reset_window()
        self._before, self._saved = Counter(state["report"]), Counter(state["report"])
        if changed:
            log.warning("%s: it is begun at its first epoch", changed)
            return
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
                places.append(Place(epoch, used=sum(place.used for place in of) // self._streams))
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
            worker_init_fn=_outlive_signals,
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
        usable = usable or raw.pixels(Counter()) is not None
        if usable and (captioned or not captions):
            return
    if not usable:
        raise ConfigError(f"{source.name}: none of the first pictures can be read; is it the right data?")
    raise ConfigError(
        f"{source.name} has no captions, which the clip objective learns from; give each picture a text "
        '(metadata.jsonl: {"file_name": ..., "text": ...}, or KEY.txt or KEY.json beside KEY.jpg, as in shards), '
        "give annotations=FILE.jsonl, name its classes in a classes.json, "
        "name the data as ssl_data= or rec_data= instead, or switch the objective off with weights.clip=0"
    )


# --- what runs in a worker ---


def _outlive_signals(_: int) -> None:
    """A signal to all processes of a run ends it behind a step, which waits for batches; the workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":  # where nothing tells who sends a signal
        return
    trainer = os.getppid()

    def obey() -> None:
        # By its own SIGTERM Python ends the processes that are left when it exits.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads to come, too
    threading.Thread(target=obey, daemon=True).start()


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
            rng = np.random.default_rng([self.seed, BATCH, self.rank, worker, k])
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
        drawn, misses, since = sum(place.used for place in places) + 1, 0, places
        while True:
            i = max(range(len(parts)), key=lambda i: weights[i] * drawn - places[i].used)  # furthest behind its share
            raw, place = next(parts[i])
            used = places[i].used
            places = [*places[:i], place._replace(used=used), *places[i + 1 :]]
            if draw.captions and not raw.captions:
                report["no caption"] += 1
            elif (image := raw.pixels(report)) is not None:
                places[i] = place._replace(used=used + 1)
                drawn, misses, since = drawn + 1, 0, places
                yield raw, image, tuple(places)
                continue
            misses += 1
            if misses == _PATIENCE or all(p.epoch > old.epoch + 1 for p, old in zip(places, since, strict=True)):
                reasons = ", ".join(f"{n} {reason}" for reason, n in left_out(report).most_common())
                raise ConfigError(f"{sources[i].name}: {misses} samples in a row cannot be used ({reasons})")
