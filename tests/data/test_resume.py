"""A stream that stops goes on: the same batches, or on other numbers of workers and ranks the rest of the epoch."""

import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from tests.data.test_loader import VIEWS, assert_same, loader, mixture_of
from tests.data.test_sources import picture, write_tar
from vtp.config import ConfigError
from vtp.data.loader import Loader
from vtp.data.order import Cursor, positions
from vtp.data.sources import open_source
from vtp.data.views import BatchConfig


def parquet_of(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for s in range(3):
        columns = {
            "image": [{"bytes": picture(i), "path": None} for i in range(9)],
            "text": [f"{i} {s}" for i in range(9)],
        }
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(str(tmp_path / "set" / f"train-{s}.parquet"))
    return open_source(f"hf:{tmp_path}/set")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", ["scenes", "shards", "mixture", "parquet"])
def test_a_resumed_stream_is_bit_identical_to_an_uninterrupted_one(shards, tmp_path, workers, data):
    makers = {"scenes": lambda: open_source("scenes"), "shards": lambda: shards}
    makers |= {"mixture": lambda: mixture_of(shards, tmp_path), "parquet": lambda: parquet_of(tmp_path)}
    source = makers[data]()
    straight = loader(source, workers=workers, shuffle=9)
    whole = list(itertools.islice(straight, 25))
    for stop in (1, 7, 12):
        first = loader(source, workers=workers, shuffle=9)
        for batch in whole[:stop]:
            assert_same(next(first), batch)
        state = json.loads(json.dumps(first.state_dict()))  # plain numbers
        first.close()
        second = loader(source, workers=workers, shuffle=9)
        second.load_state_dict(state)
        for batch in whole[stop:]:
            assert_same(next(second), batch)
        assert second.total == straight.total  # nothing is counted twice
        second.close()


def test_going_back_in_the_same_loader():
    stream = loader(open_source("scenes"))
    first = next(stream)
    state = stream.state_dict()
    second, _ = next(stream), next(stream)
    stream.load_state_dict(state)
    assert_same(next(stream), second)
    assert not torch.equal(first.clip.images, second.clip.images)


def test_a_position_of_another_run_is_refused(shards):
    source = open_source("scenes")
    with pytest.raises(ConfigError, match="scenes was saved with seed=0, not 1; by resume=anyway"):
        loader(source, seed=1).load_state_dict(loader(source).state_dict())
    with pytest.raises(ConfigError, match="saved in other data .scenes. than .*; by resume=anyway"):
        loader(shards).load_state_dict(loader(source).state_dict())


def test_other_data_than_the_position_was_saved_in_is_refused_or_begun_anew(shards, tmp_path, caplog):
    before = loader(shards)
    next(before)
    state = json.loads(json.dumps(before.state_dict()))
    (tmp_path / "9.tar").unlink()
    fewer = open_source(str(tmp_path))
    with pytest.raises(ConfigError, match="has other files or annotations than when the position was saved"):
        loader(fewer).load_state_dict(state)
    again = loader(fewer, anew=True)
    again.load_state_dict(state)
    assert "begun at its first epoch" in caplog.text
    assert_same(next(again), next(loader(open_source(str(tmp_path)))))
    assert again.total["samples"] > again.report["samples"]  # what was read before counts


@pytest.mark.parametrize("kind", ["shards", "files"])
@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_workers_goes_on_with_the_rest_of_the_epoch(shards, tmp_path, kind, before, after):
    """Twice: nothing is left out, and a former worker repeats at most what it had taken of its block."""
    block, everything = 4, {f"{s}_{i}" for s in range(10) for i in range(7)}
    if kind == "files":
        block = 1
        for key in everything:
            (tmp_path / "files").mkdir(exist_ok=True)
            (tmp_path / "files" / f"{key}.jpg").write_bytes(picture(1))
        everything = {f"{key}.jpg" for key in everything}
    source = shards if kind == "shards" else open_source(str(tmp_path / "files"))
    read = Counter()  # (epoch, key)
    batch = BatchConfig(clip=0, ssl=0, rec=5)
    state = None
    for workers, batches in ((before, 11), (after, 4), (before, 40)):
        stream = loader(source, batch, workers=workers, shuffle=block)
        dataset = stream._dataset
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        for i in range(batches):  # as the workers do, without their processes
            worker = (stream._next + i) % workers
            (place,), (past,) = dataset.cursors[worker].places, dataset.past
            found = positions(source, 16, 0, worker, workers, block, place, past)
            for raw, after_it in itertools.islice(found, 5):
                read[after_it.epoch, raw.key] += 1
            dataset.cursors[worker] = Cursor(worker, (after_it,))
        state = stream.state_dict()
    epochs = {e for e, _ in read}
    for epoch in range(min(place[0] for _, (place,), _ in state["cursors"])):  # those that all have finished
        counts = {key: read[epoch, key] for key in everything}
        assert min(counts.values()) == 1
        repeated = sum(counts.values()) - len(counts)
        assert repeated <= (block - 1) * (before + after)
        if kind == "files" or before == after == 1:
            assert repeated == 0
    assert len(epochs) >= 2


KILLED = """
import hashlib, itertools, json, sys
from pathlib import Path
from tests.data.test_loader import loader, tensors
from vtp.data.sources import open_source
data, folder, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
stream = loader(open_source(data), workers=2, shuffle=9)
state = folder / "state.json"
if state.is_file():
    stream.load_state_dict(json.loads(state.read_text()))
step = stream._dataset.cursors[0].batches + stream._dataset.cursors[1].batches
while step < n:
    batch, step = next(stream), step + 1
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors(batch))).hexdigest()
    print(step, digest, flush=True)
    if step % 3 == 0:
        (folder / "new").write_text(json.dumps(stream.state_dict()))
        (folder / "new").rename(state)
"""


def test_a_killed_run_goes_on_with_the_same_batches(shards, tmp_path):
    def run(folder, n, kill_at=None):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-c", KILLED, shards.name, str(folder), str(n)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = []
            for line in process.stdout:
                lines.append(tuple(line.split()))
                if len(lines) == kill_at:
                    process.kill()
        assert process.returncode == (0 if kill_at is None else -9)
        return dict(lines)

    whole = run(tmp_path / "whole", 100)
    run(tmp_path / "killed", 100, kill_at=random.randint(5, 20))
    resumed = run(tmp_path / "killed", 100)
    assert len(resumed) >= 50 and resumed.items() <= whole.items()


def read_on_rank(rank, data, workers, state, *pauses):
    """(epoch, colour) of the next samples and the state behind them; the loader is made anew after each pause."""
    batch, read = BatchConfig(clip=0, ssl=0, rec=1), []
    for n in pauses:
        stream = Loader(open_source(data), VIEWS, batch, None, patch_size=8, workers=workers, shuffle=4)
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        for found in itertools.islice(stream, n):
            read.append((found.cursor.places[0].epoch, tuple(found.rec.images[0, :, 0, 0].tolist())))
        state = stream.state_dict()
        stream.close()
    return read, state


def without_and_with_a_pause(rank, *arguments):
    *before, pause, n = arguments
    return read_on_rank(rank, *before, n), read_on_rank(rank, *before, pause, n - pause)


def test_ranks_go_on_with_the_epoch_of_one_and_one_with_theirs(two_ranks, tmp_path, caplog):
    """1 -> 2 -> 1 ranks within an epoch, the single one with two workers."""
    colours = [(20 * s, 16 * i, 99) for s in range(12) for i in range(13)]
    for s in range(12):
        members = []
        for i in range(13):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), colours[13 * s + i]).save(buffer, "PNG")
            members.append((f"{s}_{i}.png", buffer.getvalue() if i else b""))  # the first of each shard is broken
        write_tar(tmp_path / f"{s:02d}.tar", members)
    data = str(tmp_path)
    one, saved = read_on_rank(0, data, 2, None, 30)
    ranks, paused = zip(*two_ranks(without_and_with_a_pause, data, 0, saved, 9, 25), strict=True)
    assert [read for read, _ in ranks] == [read for read, _ in paused]
    assert ranks[0][1] == ranks[1][1] and ranks[0][1]["cursors"] == paused[0][1]["cursors"]
    last, state = read_on_rank(0, data, 2, ranks[0][1], 90)
    assert "the batches of 2 ranks when the run was saved, and has those of 1 now" in caplog.text
    counts = Counter(one + ranks[0][0] + ranks[1][0] + last)
    assert min(counts[0, colour] for colour in colours if colour[1]) == 1
    assert sum(n - 1 for n in counts.values()) <= (4 - 1) * (2 + 2)
    assert any(epoch == 1 for epoch, _ in last)
    read, broken = state["report"]["samples"], state["report"]["empty file"]
    assert 12 <= broken <= 12 + 3 * (2 + 2) and 30 + 2 * 25 + 90 + broken <= read  # of all ranks; a few are read ahead
    assert read <= 30 + 2 * 25 + 90 + broken + 3 * (2 + 2 + 2)


def test_a_position_of_another_version_is_refused():
    state = loader(open_source("scenes")).state_dict()
    del state["format"]
    with pytest.raises(ConfigError, match="written by another version of vtp; .*out="):
        loader(open_source("scenes")).load_state_dict(state)
