import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_sources import picture, write_tar
from vtp.config import ConfigError
from vtp.data.batches import ClipBatch, cut
from vtp.data.loader import Loader, _outlive_signals
from vtp.data.order import Place, _epoch, positions
from vtp.data.sources import open_source
from vtp.data.views import BatchConfig, ViewsConfig

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


def test_a_mixture_keeps_its_shares_and_every_part_its_epochs(shards, tmp_path):
    source = mixture_of(shards, tmp_path)
    stream = loader(source, BatchConfig(clip=0, ssl=0, rec=8), shuffle=5)
    for _ in range(20):
        batch = next(stream)
        assert [round(p.used / batch.cursor.batches / 2) for p in batch.cursor.places] == [2, 1, 1]
    tars, more, scenes = batch.cursor.places
    assert (tars.epoch, more.epoch, scenes.epoch) == (1, 4, 0)  # of 70, 8 and a million


def test_broken_samples_do_not_change_the_shares_of_a_mixture(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(30):
            broken = name == "b" and i % 3 == 0
            (tmp_path / name / f"{i}.jpg").write_bytes(b"" if broken else picture(i))
    stream = loader(open_source(f"{tmp_path}/a@3::{tmp_path}/b@1"), BatchConfig(clip=0, ssl=0, rec=40))
    for _ in range(2):
        batch = next(stream)
    assert [place.used for place in batch.cursor.places] == [60, 20]
    assert batch.report["empty file"] > 5


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
    assert [place.used for place in batch.cursor.places] == [6, 3] and batch.report == {"samples": 9}
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


@pytest.mark.parametrize("block", [1, 8, 10, 64])
def test_a_stream_that_goes_on_counts_nothing_twice(tmp_path, block):
    """From any place; 20 pictures and, behind the last of them, texts without one."""
    for s in range(2):
        members = [(f"{s}_{i:02d}.jpg", picture(i)) for i in range(10)]
        write_tar(tmp_path / f"{s}.tar", members + [(f"{s}_{i}.txt", b"") for i in range(10, 14)])
    source = open_source(str(tmp_path))

    def read(place, n):
        source.report.clear()
        return list(itertools.islice(positions(source, 16, 0, 0, 1, block, place), n)), source.report.copy()

    straight, whole = read(Place(), 50)
    assert whole["samples"] - whole["no picture"] >= 50
    for n in range(1, 50):
        first, before = read(Place(), n)
        rest, after = read(first[-1][1], 50 - n)
        assert [raw.key for raw, _ in first + rest] == [raw.key for raw, _ in straight]
        assert before + after == whole


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


def test_a_disk_that_goes_late_in_a_run_stops_it_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.loader._WINDOW", 100)
    for i in range(100):
        (tmp_path / f"{i:02d}.jpg").write_bytes(picture(i))
    source = open_source(str(tmp_path))
    stream = loader(source, BatchConfig(clip=0, ssl=0, rec=10))
    for _ in range(50):  # 500 good samples
        next(stream)
    for i in range(100):
        if i % 3:
            (tmp_path / f"{i:02d}.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="share 0.5"):
        for _ in range(15):
            next(stream)


def test_few_broken_samples_never_stop_a_run(tmp_path, monkeypatch):
    """Not in any window of it: neither evenly spread ones nor a shard of them, first or late."""
    monkeypatch.setattr("vtp.data.loader._WINDOW", 200)
    for s in range(20):
        bad = [s in (4, 13) or (s + i) % 9 == 0 for i in range(24)]
        write_tar(tmp_path / f"{s:02d}.tar", [(f"{s}_{i}.jpg", b"" if b else picture(i)) for i, b in enumerate(bad)])
    for seed in range(4):
        stream = loader(open_source(str(tmp_path)), BatchConfig(clip=0, ssl=0, rec=5), shuffle=16, seed=seed)
        for _ in range(250):
            next(stream)
        assert stream.report["empty file"] > 200


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


def hanging(ready):
    _outlive_signals(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process who sends it a signal")
def test_a_worker_obeys_its_trainer_alone():
    """A hung worker would be left behind by a trainer that exits, were that SIGTERM ignored too."""
    context = get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=hanging, args=(ready,))
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # somebody else
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
