"""Any source -> tar shards of equal counts, each written by one process, with checksums; an interrupted run goes on."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtp.config import ConfigError
from vtp.data.decode import BadImage, image_format
from vtp.data.samples import CLASSES, Raw, Source, kept, left_out
from vtp.data.sources import fingerprint, open_source, shares
from vtp.data.tars import LABELS
from vtp.files import file_sha256

PLAN, COUNTS, SUMS = "pack.json", "counts.jsonl", "SHA256SUMS"
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "MPO": "jpg"}  # MPO: several JPEGs in one file, as phones write


def pack(
    data: str,
    out: Path,
    *,
    annotations: str | None = None,
    shard_size: int = 1_000,
    limit: int | None = None,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, Any]:
    """Write OUT/00000.tar, ..., classes.json and labels.json where there are classes and other labels, and SHA256SUMS
    (`sha256sum -c` reads it).

    Files are copied as they are; pictures that cannot be decoded are left out. Sources with random access are shuffled,
    others keep their order and, in a mixture, lie behind. A shard is renamed to its name when it is whole, so the same
    command goes on.

    Args:
        shard_size: samples a shard at most.
        limit: samples at most; of each part of a mixture its share.
        workers: processes; 1 is this one.
        progress: told the task ("counting" the samples of shards, "packing") and how many shards of how many are done.

    Returns:
        {"shards", "samples", "left_out": {reason: count}, "kept": {flaw: count}}.

    Raises:
        ConfigError: no such data, or `out` holds something else.
    """
    source = open_source(data, annotations)
    out.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {"data": data, "annotations": annotations, "shard_size": shard_size, "limit": limit}
    plan["source"] = fingerprint(source)
    file = out / PLAN
    if file.is_file():
        saved = json.loads(file.read_text())
        if {key: saved.get(key) for key in plan} != plan:
            changed = "; ".join(
                f"{key}: {saved.get(key)} -> {plan[key]}" for key in plan if saved.get(key) != plan[key]
            )
            raise ConfigError(
                f"{out} holds shards of another pack, or of data that has changed since ({changed}); "
                "choose another --out or delete it"
            )
        plan = saved
    elif any(out.glob("*.tar")):
        raise ConfigError(f"{out} holds shards already; choose another --out")
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:

        def spread(doing: str, task: Callable[..., Any], jobs: list[tuple[Any, ...]], total: int) -> Iterator[Any]:
            """Results as they come."""
            progress(doing, total - len(jobs), total)
            if workers == 1:
                results = (task(*job) for job in jobs)
            else:
                results = (work.result() for work in as_completed([pool.submit(task, *job) for job in jobs]))
            for done, result in enumerate(results, start=1 + total - len(jobs)):
                yield result
                progress(doing, done, total)

        if not file.is_file():
            _write(file, json.dumps(plan))
        streamed = _streamed(source)
        counts = _known(out / COUNTS)
        if streamed:
            jobs: list[tuple[Any, ...]] = [(data, annotations, i) for i in streamed if i not in counts]
            with (out / COUNTS).open("a") as lines:
                for shard, n, well in spread("counting", _count, jobs, len(streamed)):
                    counts[shard] = n
                    if well:  # or the next run asks again
                        lines.write(f"\n{json.dumps([shard, n])}")  # not behind a line that was cut short
                        lines.flush()
            _write(out / COUNTS, "".join(f"{json.dumps(line)}\n" for line in sorted(counts.items())))
        single, several = _chosen(source, limit, counts)
        total = len(single) + sum(taken for _, taken in several)
        if total == 0:
            raise ConfigError(f"{data} holds no picture")
        shards = -(-total // shard_size)
        bounds = [total * i // shards for i in range(shards + 1)]
        missing = [i for i in range(shards) if not all((out / f"{i:05d}.{e}").is_file() for e in ("tar", "json"))]
        jobs = [(data, annotations, out, i, *bounds[i : i + 2], limit, counts) for i in missing]
        for _ in spread("packing", _shard, jobs, shards):
            pass
    reports = [json.loads((out / f"{i:05d}.json").read_text()) for i in range(shards)]
    _write(out / SUMS, "".join(f"{report['sha256']}  {i:05d}.tar\n" for i, report in enumerate(reports)))
    if "class" in source.classes:
        listed = [{"wnid": str(i), "names": [name]} for i, name in enumerate(source.classes["class"])]
        _write(out / CLASSES, json.dumps(listed, indent=1))
    others = {label: names for label, names in source.classes.items() if label != "class"}
    if others:
        _write(out / LABELS, json.dumps(others, indent=1, ensure_ascii=False))
    broken = {number for report in reports for number in report["broken"]}  # which several may have read
    lost, flaws = (sum((Counter(report[name]) for report in reports), Counter()) for name in ("left_out", "kept"))
    if broken:
        lost["broken shard"] = len(broken)
    samples = sum(report["samples"] for report in reports)
    if samples == 0:
        raise ConfigError(f"{data}: no picture can be read ({dict(lost)})")
    return {"shards": shards, "samples": samples, "left_out": dict(lost), "kept": dict(flaws)}


def _end_with_parent() -> None:
    """A process whose parent was killed would write on beside the run that goes on."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _known(file: Path) -> dict[int, int]:
    """Samples of the shards that were counted before; a line cut short by the end of a run is none."""
    known: dict[int, int] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        with suppress(ValueError):
            known |= [json.loads(line)]
    return known


def _streamed(source: Source) -> list[int]:
    """Numbers of the shards that have to be read for how many samples they hold."""
    access = (part.random_access for part, _ in source.parts for _ in range(len(part.shards)))
    return [i for i, at_random in enumerate(access) if not at_random]


def _chosen(source: Source, limit: int | None, counts: dict[int, int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """What is packed: numbers of shards of one sample, shuffled; behind them (number, samples taken) of the others."""
    rng = np.random.default_rng(0)
    single, several, begun = [np.empty(0, np.int64)], [], 0
    for (part, _), share in zip(source.parts, shares(source, limit), strict=True):
        end = begun + len(part.shards)
        if part.random_access:
            single.append(begun + rng.permutation(len(part.shards))[:share])
        else:
            left = sum(counts.values()) if share is None else share
            for i in range(begun, end):
                several.append((i, min(counts[i], left)))
                left -= several[-1][1]
                if left == 0 and share is not None:  # what lies behind the limit is not looked at
                    break
        begun = end
    return rng.permutation(np.concatenate(single)), several


def _again(data: str, annotations: str | None) -> Source:
    """The source, opened for one shard: what it warns of it has said when it was opened first."""
    logging.disable(logging.WARNING)
    try:
        source = open_source(data, annotations)
    finally:
        logging.disable(logging.NOTSET)
    source.report.clear()
    return source


def _count(data: str, annotations: str | None, shard: int) -> tuple[int, int, bool]:
    """The shard, how many samples it gives, and whether it could be read to its end."""
    source = _again(data, annotations)
    n = sum(1 for _ in source.read(source.shards[shard]))
    return shard, n, not source.report["broken shard"]


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.rename(file)


def _shard(
    data: str,
    annotations: str | None,
    out: Path,
    number: int,
    first: int,
    last: int,
    limit: int | None,
    counts: dict[int, int],
) -> None:
    """Write samples `first` to `last` of what is packed as one shard."""
    source = _again(data, annotations)
    broken = set[int]()
    partial = out / f".{number:05d}.tar.partial"
    try:
        written = _fill(partial, source, _slice(source, first, last, limit, counts, broken))
    except OSError as error:  # a full disk
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(partial)) from None
    final = out / f"{number:05d}.tar"
    partial.rename(final)
    counted = {"left_out": left_out(source.report), "kept": kept(source.report)}
    report = {"samples": written, "sha256": file_sha256(final), "broken": sorted(broken)} | counted
    _write(out / f"{number:05d}.json", json.dumps(report))


def _fill(partial: Path, source: Source, samples: Iterator[tuple[int, Raw]]) -> int:
    """Write the samples; how many they are."""
    written = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, raw in samples:
            try:
                suffix, picture = _file(raw)
            except BadImage as error:
                source.report[error.reason] += 1
                continue
            about: dict[str, Any] = {"key": raw.key, "captions": raw.captions}
            about |= {label: source.classes[label][n] for label, n in raw.labels.items() if label in source.classes}
            members = {suffix: picture, "json": json.dumps(about, ensure_ascii=False).encode(errors="replace")}
            if "class" in raw.labels and "class" in source.classes:
                members["cls"] = str(raw.labels["class"]).encode()
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{ending}")  # of no time and no owner: the same data, the same bytes
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            written += 1
    return written


def _slice(
    source: Source, first: int, last: int, limit: int | None, counts: dict[int, int], broken: set[int]
) -> Iterator[tuple[int, Raw]]:
    """Samples `first` to `last` of what is packed, and their numbers; numbers of broken shards go to `broken`."""
    single, several = _chosen(source, limit, counts)
    for i, shard in enumerate(single[first:last].tolist(), start=first):
        yield from ((i, raw) for raw in source.read(source.shards[shard]))
    start = len(single)
    for shard, taken in several:
        n = counts[shard]
        begin, end = max(first - start, 0), min(last - start, taken)
        empty = n == 0 and (first < start <= last or start == first == 0)  # read for what it lacks
        if begin < end or empty:
            before = upto = source.report.copy()
            # What lies before the first sample counts for another tar, what lies behind the last counted one for this.
            for j, raw in enumerate(islice(source.read(source.shards[shard]), None if end == n else end)):
                if j == n:  # it was broken when it was counted, and the numbers behind are the next's
                    _set(source.report, upto)
                    broken.add(shard)
                    break
                if j >= begin:
                    yield start + j, raw
                if j == begin - 1:
                    _set(source.report, before)
                upto = source.report.copy() if j == n - 1 else upto
            if source.report.pop("broken shard", 0):
                broken.add(shard)
        start += taken


def _set(counter: Counter[str], to: Counter[str]) -> None:
    counter.clear()
    counter.update(to)


def _file(raw: Raw) -> tuple[str, bytes]:
    """A picture's suffix and bytes: its own where shards may hold its format, else PNG."""
    pixels = raw.decoded()
    if isinstance(raw.image, bytes):
        kind = image_format(raw.image)
        if kind in _SUFFIX:
            return _SUFFIX[kind], raw.image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "png", buffer.getvalue()
