import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_sources import picture, write_tar
from vtp.config import ConfigError
from vtp.data.batches import ClipBatch, cut
from vtp.data.loader import Loader
from vtp.data.order import Cursor, Place, _epoch, positions
from vtp.data.passes import captioned_batches, class_names, image_batches, labelled_batches
from vtp.data.sources import open_source
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.images import center_crop, normalise

VIEWS = ViewsConfig(size=16, global_size=16, local_size=8, local_crops=2)


def tokenizer(texts):
    """Lengths of words, an end token, zeros."""
    rows = torch.zeros(len(texts), 24, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        words = [len(word) for word in text.split()][:23]
        row[: len(words) + 1] = torch.tensor([*words, 99])
    return rows


def loader(source, batch=BatchConfig(clip=6, ssl=3, rec=2), views=VIEWS, **options):  # noqa: B008
    return Loader(source, views, batch, tokenizer, patch_size=8, **options)


def tensors(batch):
    parts = [part for part in (batch.clip, batch.ssl, batch.rec) if part is not None]
    return [torch.tensor(t) if isinstance(t, tuple | int) else t for part in parts for t in part]


def assert_same(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert torch.equal(x, y)
    assert a.cursor == b.cursor


@pytest.fixture
def shards(tmp_path):
    """Ten shards of seven captioned pictures."""
    for s in range(10):
        members = [
            (f"{s}_{i}.{e}", d) for i in range(7) for e, d in (("jpg", picture(i)), ("txt", b"%d of %d" % (i, s)))
        ]
        write_tar(tmp_path / f"{s}.tar", members)
    return open_source(str(tmp_path))


def test_shapes_and_contents():
    batch = next(loader(open_source("scenes")))
    assert batch.clip.images.shape == (6, 3, 16, 16) and batch.clip.images.dtype == torch.uint8
    assert batch.clip.tokens.shape[0] == 6 and (batch.clip.tokens[:, -1] != 0).any()
    assert batch.ssl.global_crops.shape == (2, 3, 3, 16, 16) and batch.ssl.local_crops.shape == (2, 3, 3, 8, 8)
    assert batch.ssl.masks.shape == (2, 3, 4) and batch.ssl.masks.flatten()[batch.ssl.mask_indices].all()
    assert len(batch.ssl.mask_indices) == batch.ssl.masks.sum()
    assert batch.rec.shared == 2 and len(batch.rec.images) == 0
    assert batch.report == {"samples": 6}


def test_shapes_are_static_but_for_the_captions_length():
    shapes = {tuple(t.shape for t in tensors(b)[3:]) for b in itertools.islice(loader(open_source("scenes")), 20)}
    assert len(shapes) == 1


@pytest.mark.parametrize("sizes", [(0, 3, 2), (6, 0, 2), (6, 3, 0), (0, 0, 2), (0, 4, 0), (2, 0, 0)])
def test_views_that_no_objective_asks_for_are_not_made(sizes):
    clip, ssl, rec = sizes
    batch = next(loader(open_source("scenes"), BatchConfig(clip=clip, ssl=ssl, rec=rec)))
    assert [part is None for part in batch[:3]] == [n == 0 for n in sizes]
    assert batch.report["samples"] == max(sizes)
    if rec and not clip:
        assert batch.rec.shared == 0 and batch.rec.images.shape == (rec, 3, 16, 16)


def test_captions_are_not_needed_without_the_clip_objective(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    source = open_source(str(tmp_path))
    batch = next(Loader(source, VIEWS, BatchConfig(clip=0, ssl=2, rec=2), None, patch_size=8))
    assert batch.clip is None
    with pytest.raises(ConfigError, match=f"{tmp_path} has no captions.*metadata.jsonl.*weights.clip=0"):
        loader(source)


def test_a_reconstruction_view_of_its_own():
    views = ViewsConfig(size=16, global_size=16, local_size=8, share=False, rec_scale=(0.3, 0.5))
    batch = next(loader(open_source("scenes"), views=views))
    assert batch.rec.shared == 0 and batch.rec.images.shape == (2, 3, 16, 16)


def test_what_is_reconstructed_is_a_random_choice_of_the_pairs(tmp_path):
    """Eight grey pictures, the n-th with n words: each is among the two as often, whatever its caption's length."""
    rows = []
    for n in range(1, 9):
        Image.new("RGB", (16, 16), (n, n, n)).save(tmp_path / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": "word " * n})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = Counter()
    for batch in itertools.islice(loader(open_source(str(tmp_path)), BatchConfig(clip=8, ssl=0, rec=2)), 200):
        words = [length - 1 for length in batch.clip.lengths]
        assert batch.clip.images.amax((1, 2, 3)).tolist() == words == [*sorted(words[:2]), *sorted(words[2:])]
        assert sorted(words) == list(range(1, 9))
        chosen.update(words[:2])
    assert min(chosen.values()) > 25 and len(chosen) == 8


def test_captions_are_grouped_by_length():
    clip = next(loader(open_source("scenes"), BatchConfig(clip=40, ssl=0, rec=0))).clip
    groups = clip.texts()
    assert [len(group) for group in groups] == [8] * 5
    assert [group.shape[1] for group in groups] == [max(clip.lengths[i : i + 8]) for i in range(0, 40, 8)]
    for group, whole in zip(groups, clip.tokens.split(8), strict=True):
        assert torch.equal(group, whole[:, : group.shape[1]]) and not whole[:, group.shape[1] :].any()
    assert sum(group.numel() for group in groups) < clip.tokens.numel()
    assert [torch.equal(a, b) for a, b in zip(clip.part(8, 16).texts(), groups[1:2], strict=True)] == [True]
    assert len(ClipBatch(clip.images, clip.tokens).texts()) == 1


def mixture_of(shards, tmp_path):
    (tmp_path / "more").mkdir()
    for i in range(8):
        (tmp_path / "more" / f"{i}.jpg").write_bytes(picture(i))
    rows = [json.dumps({"file_name": f"{i}.jpg", "text": f"more {i}"}) for i in range(8)]
    (tmp_path / "more" / "metadata.jsonl").write_text("\n".join(rows))
    return open_source(f"{shards.name}@2::{tmp_path}/more@1::scenes@1")


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


def test_a_mixture_keeps_its_shares_and_every_part_its_epochs(shards, tmp_path):
    source = mixture_of(shards, tmp_path)
    stream = loader(source, BatchConfig(clip=0, ssl=0, rec=8), shuffle=5)
    for _ in range(20):
        batch = next(stream)
        assert [round(p.drawn / batch.cursor.batches / 2) for p in batch.cursor.places] == [2, 1, 1]
    tars, more, scenes = batch.cursor.places
    assert (tars.epoch, more.epoch, scenes.epoch) == (1, 4, 0)  # of 70, 8 and a million


def test_objectives_may_have_sources_of_their_own(tmp_path):
    (tmp_path / "bare").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (250, 0, 0)).save(tmp_path / "bare" / f"{i}.png")
    bare = open_source(str(tmp_path / "bare"))
    options = {"others": {"ssl": bare}, "workers": 2}
    whole = list(itertools.islice(loader(open_source("scenes"), **options), 9))
    batch = whole[0]
    assert (batch.ssl.global_crops[:, :, 0] > 240).all() and (batch.ssl.global_crops[:, :, 1] < 5).all()
    assert batch.clip.images.float().std() > 5 and batch.rec.shared > 0
    assert [place.drawn for place in batch.cursor.places] == [6, 3] and batch.report == {"samples": 9}
    first = loader(open_source("scenes"), **options)
    for _ in range(4):
        next(first)
    second = loader(open_source("scenes"), **options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in whole[4:]:
        assert_same(next(second), batch)
    first.close(), second.close()
    own = next(loader(open_source("scenes"), others={"rec": bare}))
    assert own.rec.shared == 0 and (own.rec.images[:, 0] > 240).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", ["scenes", "shards", "mixture", "parquet"])
def test_a_resumed_stream_is_bit_identical_to_an_uninterrupted_one(shards, tmp_path, workers, data):
    makers = {"scenes": lambda: open_source("scenes"), "shards": lambda: shards}
    makers |= {"mixture": lambda: mixture_of(shards, tmp_path), "parquet": lambda: parquet_of(tmp_path)}
    source = makers[data]()
    whole = list(itertools.islice(loader(source, workers=workers, shuffle=9), 25))
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
        second.close()


def test_going_back_in_the_same_loader():
    stream = loader(open_source("scenes"))
    first = next(stream)
    state = stream.state_dict()
    second, _ = next(stream), next(stream)
    stream.load_state_dict(state)
    assert_same(next(stream), second)
    assert not torch.equal(first.clip.images, second.clip.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_numbers_alone(workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    stream = loader(open_source("scenes"), workers=workers)
    next(stream)
    stream.close()
    assert torch.equal(torch.rand(3), expected)


def test_workers_and_seeds_draw_differently():
    ones = [next(loader(open_source("scenes"), seed=seed)) for seed in (0, 1)]
    assert not torch.equal(ones[0].clip.images, ones[1].clip.images)
    two = loader(open_source("scenes"), workers=2)
    assert not torch.equal(next(two).ssl.masks, next(two).ssl.masks)
    two.close()


def test_a_position_of_another_run_is_refused(shards):
    source = open_source("scenes")
    with pytest.raises(ConfigError, match="seed=0, not 1"):
        loader(source, seed=1).load_state_dict(loader(source).state_dict())
    with pytest.raises(ConfigError, match="saved in other data .scenes. than .*; by resume=anyway"):
        loader(shards).load_state_dict(loader(source).state_dict())


def test_other_data_than_the_position_was_saved_in_is_refused_or_begun_anew(shards, tmp_path, caplog):
    before = loader(shards)
    next(before)
    state = json.loads(json.dumps(before.state_dict()))
    (tmp_path / "9.tar").unlink()
    fewer = open_source(str(tmp_path))
    with pytest.raises(ConfigError, match="lists other files than when the position was saved"):
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

    whole = run(tmp_path / "whole", 70)
    run(tmp_path / "killed", 70, kill_at=random.randint(5, 20))
    resumed = run(tmp_path / "killed", 70)
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


def test_ranks_go_on_with_the_epoch_of_one_and_one_with_theirs(two_ranks, tmp_path):
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
    counts = Counter(one + ranks[0][0] + ranks[1][0] + last)
    assert min(counts[0, colour] for colour in colours if colour[1]) == 1
    assert sum(n - 1 for n in counts.values()) <= (4 - 1) * (2 + 2)
    assert any(epoch == 1 for epoch, _ in last)
    read, broken = state["report"]["samples"], state["report"]["empty file"]
    assert 12 <= broken <= 12 + 3 * (2 + 2) and 30 + 2 * 25 + 90 + broken <= read  # of all ranks; a few are read ahead
    assert read <= 30 + 2 * 25 + 90 + broken + 3 * (2 + 2 + 2)


def test_samples_that_other_processes_take_are_theirs_to_count(tmp_path):
    """Two shards for four processes: all read all of them."""
    for s in range(2):
        members = [(f"{s}_{i:02d}.{'txt' if i % 5 == 4 else 'jpg'}", picture(i) if i % 2 else b"") for i in range(40)]
        write_tar(tmp_path / f"{s}.tar", members)
    source = open_source(str(tmp_path))
    total = Counter()
    for stream in range(4):
        source.report.clear()
        list(_epoch(source, 16, np.arange(2), 0, (stream, 4), 0, 0, ()))
        total += source.report
    assert total == {"samples": 80, "no picture": 16}


def test_a_position_of_another_version_is_refused():
    state = loader(open_source("scenes")).state_dict()
    del state["format"]
    with pytest.raises(ConfigError, match="written by another version of vtp; .*out="):
        loader(open_source("scenes")).load_state_dict(state)


def keys_of_epoch(source, stream, streams, epoch, block=5):
    samples = positions(source, 16, 0, stream, streams, block, Place(epoch=epoch))
    return [raw.key for raw, place in itertools.takewhile(lambda s: s[1].epoch == epoch, samples)]


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
def test_an_epoch_has_every_sample_once_over_all_streams(shards, streams):
    epochs = [[keys_of_epoch(shards, s, streams, epoch) for s in range(streams)] for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == sorted(f"{s}_{i}" for s in range(10) for i in range(7))
        lengths = [len(keys) for keys in epoch]
        assert max(lengths) - min(lengths) <= 7
    assert epochs[0] != epochs[1]


def test_files_are_shuffled_completely_and_split(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.jpg").write_bytes(picture(i))
    source = open_source(str(tmp_path))
    parts = [keys_of_epoch(source, s, 3, 0) for s in range(3)]
    assert sorted(itertools.chain(*parts)) == [f"{i:02d}.jpg" for i in range(40)]
    assert parts[0] != sorted(parts[0])
    assert np.abs(np.diff([int(k[:2]) for k in parts[0]])).mean() > 5


def test_samples_are_shuffled_within_blocks(shards):
    keys = keys_of_epoch(shards, 0, 1, 0, block=70)
    assert sum(a[0] != b[0] for a, b in itertools.pairwise(keys)) > 45  # neighbours come from different shards


def test_broken_samples_are_skipped_counted_and_reported(tmp_path):
    for i in range(30):
        data = picture(i)
        (tmp_path / f"{i}.jpg").write_bytes(data[: len(data) // 3] if i % 10 == 0 else b"" if i % 10 == 1 else data)
    rows = [{"file_name": f"{i}.jpg", "text": "" if i % 10 == 2 else f"number {i}"} for i in range(30)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = loader(open_source(str(tmp_path)), BatchConfig(clip=7, ssl=0, rec=0))
    for _ in range(3):  # 21 good ones: an epoch
        next(stream)
    assert stream.report["empty file"] == stream.report["no caption"] == 3
    assert stream.report["corrupt image"] + stream.report["not an image"] == 3
    assert stream.report["samples"] == 30


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_when_too_much_is_broken(tmp_path, workers):
    for i in range(100):
        (tmp_path / f"{i:02d}.jpg").write_bytes(picture(i) if i % 4 == 0 else b"")
    rows = [{"file_name": f"{i:02d}.jpg", "text": "t"} for i in range(100)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = loader(open_source(str(tmp_path)), workers=workers)
    with pytest.raises(ValueError, match="empty file.*share 0.5"):
        for _ in range(50):
            next(stream)
    patient = loader(open_source(str(tmp_path)), workers=workers, max_broken=0.9)
    for _ in range(20):
        next(patient)
    patient.close()


def test_a_run_stops_when_most_shards_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.shards.RETRY_AFTER", ())
    for s in range(8):
        write_tar(tmp_path / f"{s}.tar", [(f"{s}_{i}.jpg", picture(i)) for i in range(10)])
    source = open_source(str(tmp_path))
    for s in range(6):
        (tmp_path / f"{s}.tar").unlink()
    stream = loader(source, BatchConfig(clip=0, ssl=0, rec=5))
    with pytest.raises(ConfigError, match="lost with a shard"):
        for _ in range(30):
            next(stream)


def test_one_bad_shard_of_many_does_not_stop_a_run(tmp_path):
    for s in range(20):
        members = [(f"{s}_{i}.jpg", b"" if s in (3, 11) else picture(i)) for i in range(30)]
        write_tar(tmp_path / f"{s:02d}.tar", members)
    for workers in (1, 2):
        stream = loader(open_source(str(tmp_path)), BatchConfig(clip=0, ssl=0, rec=5), workers=workers, shuffle=1)
        for _ in range(110):  # an epoch
            next(stream)
        stream.close()
        assert stream.report["empty file"] >= 60


def test_a_source_that_ran_dry_is_an_error_and_no_endless_wait(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    stream = loader(open_source(str(tmp_path)), BatchConfig(clip=0, ssl=0, rec=2))
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="in a row cannot be used .* empty file"):
        next(stream)


def test_data_of_which_nothing_can_be_read_is_refused_at_once(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="none of the first pictures can be read"):
        loader(open_source(str(tmp_path)), BatchConfig(clip=0, ssl=0, rec=2))


def test_fewer_pictures_than_processes_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    with pytest.raises(ConfigError, match="1 pictures for 2"):
        loader(open_source(str(tmp_path)), BatchConfig(clip=0, ssl=0, rec=2), workers=2)


def test_one_of_several_captions_is_drawn(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    row = {"file_name": "a.jpg", "text": ["a", "bb", "ccc"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    stream = loader(open_source(str(tmp_path)), BatchConfig(clip=60, ssl=0, rec=0))
    first = Counter(next(stream).clip.tokens[:, 0].tolist())
    assert first.keys() == {1, 2, 3} and min(first.values()) > 8


def test_a_share_of_captions_is_cut_to_a_run_of_words(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": "a bb ccc dddd"}) for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    views = ViewsConfig(size=16, global_size=16, local_size=8, local_crops=2, caption_spans=0.5)
    stream = loader(open_source(str(folder)), BatchConfig(clip=8, ssl=0, rec=0), views)
    rows = [tuple(row[row > 0].tolist())[:-1] for _ in range(50) for row in next(stream).clip.tokens]
    whole = rows.count((1, 2, 3, 4)) / len(rows)
    assert 0.45 < whole < 0.65  # half, and a tenth of the cut ones
    assert all(row == tuple(range(row[0], row[0] + len(row))) for row in rows)


def test_cutting_keeps_what_any_caption_needs():
    tokens = torch.tensor([[5, 0, 9, 0, 0], [5, 9, 0, 0, 0]])  # 0 is also a word: "!"
    assert cut(tokens).tolist() == [[5, 0, 9], [5, 9, 0]]


def test_sizes_are_checked_before_anything_is_read():
    with pytest.raises(ConfigError, match="views.size=20 is not a multiple of the patch size 8"):
        loader(open_source("scenes"), views=ViewsConfig(size=20))


# --- evaluation passes ---


def class_folder(root):
    for i in range(9):
        folder = root / ("a", "a", "b", "c", "c", "c")[i % 6]
        folder.mkdir(exist_ok=True)
        pixels = np.full((20, 30, 3), i * 10, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
    return open_source(str(root))


def test_labelled_batches_have_all_samples_in_order(tmp_path):
    source = class_folder(tmp_path)
    batches = list(labelled_batches(source, "class", 16, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (9, 3, 16, 16)
    expected = normalise(torch.full((1, 3, 16, 16), 70, dtype=torch.uint8))
    keys = [key for _, batch in image_batches(source, 16, 4) for key in batch]
    torch.testing.assert_close(images[keys.index("a/7.png")], expected[0])


def test_the_commonest_classes(tmp_path):
    source = class_folder(tmp_path)
    assert class_names(source, "class") == ("a", "b", "c") and class_names(source, "class", 2) == ("a", "c")
    labels = torch.cat([labels for _, labels in labelled_batches(source, "class", 16, 4, top=2)])
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(ConfigError, match="no label 'colour'.*class"):
        class_names(source, "colour")


def test_limits_spread_over_a_sorted_folder(tmp_path):
    source = class_folder(tmp_path)
    labels = torch.cat([labels for _, labels in labelled_batches(source, "class", 16, 4, limit=5)])
    assert len(labels) == 5 and len(labels.unique()) > 1
    ((images, keys),) = image_batches(source, 16, 8, limit=2)
    assert len(images) == len(keys) == 2


def test_squash_or_centre_crop(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    ((cropped, _),) = image_batches(source, 16, 1, resize=center_crop)
    ((squashed, _),) = image_batches(source, 16, 1)
    assert cropped.min() > 2 and squashed.min() < -1


def test_broken_pictures_are_left_out_of_a_pass_and_counted(tmp_path):
    source = class_folder(tmp_path)
    (tmp_path / "b" / "0.png").write_bytes(b"nonsense")
    source = open_source(str(tmp_path))
    assert sum(len(labels) for _, labels in labelled_batches(source, "class", 16, 4)) == 9
    assert source.report == {"samples": 10, "not an image": 1}


def test_captioned_batches_of_scenes():
    ((images, captions),) = itertools.islice(captioned_batches(open_source("scenes:test"), 16, 32), 1)
    assert len(images) == len(captions) == 32 and all(len(c) == 1 for c in captions)


def test_labelled_scenes():
    source = open_source("scenes:test")
    batches = list(labelled_batches(source, "letter", 32, 64, limit=150))
    assert sum(len(labels) for _, labels in batches) == 150
    assert class_names(source, "letter")[0] == "A"
