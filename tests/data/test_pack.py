import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.data.test_sources import everything, picture, write_tar
from vtp import cli
from vtp.config import ConfigError
from vtp.data.pack import pack
from vtp.data.samples import kept, left_out
from vtp.data.sources import open_source
from vtp.files import file_sha256
from vtp.report.dataset import write_inspection


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg").write_bytes(picture(i) if i != 7 else b"")
    return tmp_path / "in"


def test_packed_shards_keep_every_label(tmp_path):
    rows = [
        {"file_name": "a.jpg", "text": ["one", "two"], "scene": "sea", "year": 1999},
        {"file_name": "b.jpg", "text": "hoo", "scene": "wood", "class": "owl"},
        {"file_name": "c.jpg", "text": "three"},
    ]
    (tmp_path / "in").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "in" / row["file_name"]).write_bytes(picture(i))
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = open_source(str(tmp_path / "in"))
    pack(str(tmp_path / "in"), tmp_path / "out")
    pack(str(tmp_path / "out"), tmp_path / "again")
    for folder in ("out", "again"):
        after = open_source(str(tmp_path / folder))
        assert after.classes == before.classes and set(after.classes) == {"scene", "year", "class"}
        kept = [sorted((r.image, r.captions, sorted(r.labels.items())) for r in everything(s)) for s in (before, after)]
        assert kept[0][0] and kept[0] == kept[1]
    (tmp_path / "out/labels.json").write_text("[1]")
    with pytest.raises(ConfigError, match="labels.json beside .*00000.tar is not"):
        open_source(str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["cls", "column"])
def test_a_number_that_is_packed_becomes_no_name(kind, tmp_path):
    if kind == "cls":
        members = [(f"{i}.{e}", d) for i in range(6) for e, d in (("jpg", picture(i)), ("cls", b"%d" % (i % 3)))]
        write_tar(tmp_path / "in/0.tar", members)
    else:
        (tmp_path / "in").mkdir()
        rows = [{"file_name": f"{i}.jpg", "class": 7 + i} | ({"text": "hoo"} if i else {}) for i in range(2)]
        (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for i in range(2):
            (tmp_path / f"in/{i}.jpg").write_bytes(picture(i))
    for source, packed in (("in", "out"), ("out", "again")):
        pack(str(tmp_path / source), tmp_path / packed)
        before, after = open_source(str(tmp_path / "in")), open_source(str(tmp_path / packed))
        assert after.classes == before.classes and len(before.classes["class"]) > 1
        pairs = [
            sorted((raw.image, raw.captions, raw.labels["class"]) for raw in everything(s)) for s in (before, after)
        ]
        assert pairs[0] == pairs[1] and any(not captions for _, captions, _ in pairs[1])


def test_pictures_with_more_behind_them_stay_as_they_are(tmp_path):
    (tmp_path / "in").mkdir()
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "in/0.jpg", "MPO", save_all=True, append_images=[second])
    (tmp_path / "in/0.txt").write_text("red")
    pack(str(tmp_path / "in"), tmp_path / "out")
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert tar.extractfile("000000000.jpg").read() == (tmp_path / "in/0.jpg").read_bytes()
    [raw] = everything(open_source(str(tmp_path / "out")))
    assert raw.decoded()[0, 0, 0] > 200


def test_packed_shards_hold_the_same_samples_in_equal_shards(folder, tmp_path):
    out = tmp_path / "out"
    done = pack(str(folder), out, shard_size=7)
    assert done == {"shards": 3, "samples": 19, "left_out": {"empty file": 1}, "kept": {}}
    before, after = everything(open_source(str(folder))), everything(open_source(str(out)))
    assert {(r.image, r.captions, r.labels["class"]) for r in after} == {
        (r.image, r.captions, r.labels["class"]) for r in before if r.image
    }
    assert open_source(str(out)).classes == {"class": ("a", "b")}
    assert [r.labels["class"] for r in after] != sorted(r.labels["class"] for r in after)
    assert [name for _, name in sums(out)] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all(file_sha256(out / name) == digest for digest, name in sums(out))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from vtp.data import pack

write = pack._file

def slowly(raw):
    time.sleep(0.1)
    return write(raw)

def progress(*at):
    print(*at, flush=True)
    if at == ("packing", 2, 5):
        os.kill(os.getpid(), signal.SIGKILL)

pack._file = slowly  # in the workers as well: this is their main module
if __name__ == "__main__":
    pack.pack(sys.argv[1], Path(sys.argv[2]), shard_size=4, workers=2, progress=progress)
"""


def test_a_killed_pack_goes_on_and_ends_the_same(tmp_path):
    """Killed by -9 when two of five shards are written, its workers at the next two."""
    shards, whole, out = (tmp_path / name for name in ("shards", "whole", "out"))
    for s in range(4):
        write_tar(shards / f"{s}.tar", [(f"{s}_{i}.jpg", picture(i) if i else b"") for i in range(5)])
    pack(str(shards), whole, shard_size=4)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "killed.py"), str(shards), str(out)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # until the last worker has let go of it
    assert ["counting", "4", "4"] in map(str.split, process.stdout.splitlines())
    assert process.returncode == -9
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.tar") if file.with_suffix(".json").is_file()}
    assert 2 <= len(kept) < 4 and list(out.glob(".*.partial")) and not (out / "SHA256SUMS").exists()
    done = pack(str(shards), out, shard_size=4)
    assert done == {"shards": 5, "samples": 16, "left_out": {"empty file": 4}, "kept": {}}
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert (out / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()
    assert all(file_sha256(out / name) == digest for digest, name in sums(out)) and not list(out.glob(".*"))
    (out / "00003.tar").unlink()
    assert pack(str(shards), out, shard_size=4) == done
    assert file_sha256(out / "00003.tar") == sums(out)[3][0]
    with pytest.raises(ConfigError, match="shards of another pack"):
        pack(str(shards), out, shard_size=8)


def test_labels_that_some_pictures_lack_and_one_of_the_name_none(tmp_path):
    styles = ("None", "gothic", None)
    (tmp_path / "in").mkdir()
    rows = [{"file_name": f"{i}.jpg"} | ({"style": style} if style else {}) for i, style in enumerate(styles)]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        (tmp_path / f"in/{i}.jpg").write_bytes(picture(i))
    pack(str(tmp_path / "in"), tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    found = {raw.image: [source.classes["style"][n] for n in raw.labels.values()] for raw in everything(source)}
    assert found == {picture(0): ["None"], picture(1): ["gothic"], picture(2): []}


@pytest.mark.parametrize("wrong", ["caption", "folder"])
def test_words_that_are_no_text_are_mended(tmp_path, wrong):
    """Half a character, as JSON may hold it; a name in the letters of another system."""
    folder = tmp_path / "in" / (os.fsdecode(b"caf\xe9") if wrong == "folder" else "cafe")
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(0))
    (folder / "a.json").write_text('{"caption": "half \\ud83d of it, whole \\ud83d\\ude00"}')
    pack(str(tmp_path / "in"), tmp_path / "out")
    [raw] = everything(open_source(str(tmp_path / "out")))
    assert raw.captions == ("half ? of it, whole \U0001f600",)
    cli.main(["data", "inspect", str(tmp_path / "in"), "--out", str(tmp_path / "seen")])
    assert "of it" in (tmp_path / "seen/inspect.html").read_text(encoding="utf-8")


def test_data_of_which_nothing_can_be_read_are_not_packed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no picture can be read .*'not an image': 1"):
        pack(str(tmp_path / "in"), tmp_path / "out")


def test_shards_behind_the_limit_are_not_looked_at(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", picture(i)) for i in range(4)])
    (tmp_path / "1.tar").write_bytes(b"no shard")
    assert pack(str(tmp_path), tmp_path / "few", limit=3)["left_out"] == {}
    assert pack(str(tmp_path), tmp_path / "all")["left_out"] == {"broken shard": 1}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 100])
def test_flaws_are_counted_once_wherever_a_shard_begins(tmp_path, size):
    """Between samples, before the first and behind the last one; of samples, and by annotations."""
    members = [(f"{s}.txt", b"no picture") for s in "abc"]
    for i in range(9):
        members += [(f"{i}.jpg", picture(i)), (f"{i}.txt", b"\xff" if i % 2 else b"x" * 3_000)]
        members += [(f"{i}_none.txt", b"no picture")] * (i % 3 == 0) + [(f"{i}_last.txt", b"no picture")] * (i == 8)
    shards = [str(write_tar(tmp_path / f"{s}.tar", members)) for s in range(2)]
    (tmp_path / "notes.jsonl").write_text('{"key": "3", "hue": "red"}')
    source = open_source(f"{tmp_path}/*.tar", str(tmp_path / "notes.jsonl"))
    assert len(everything(source)) == 18
    done = pack(f"{tmp_path}/*.tar", tmp_path / "out", annotations=str(tmp_path / "notes.jsonl"), shard_size=size)
    assert done["left_out"] == {"no picture": 14} == left_out(source.report)
    assert done["kept"] == {"caption cut": 10, "caption not UTF-8": 8, "not in annotations": 16} == kept(source.report)
    cut = Path(shards[0])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    done = pack(f"{tmp_path}/*.tar", tmp_path / "cut", shard_size=size)
    assert done["left_out"]["broken shard"] == 1


@pytest.mark.parametrize("kind", ["annotations", "metadata"])
def test_a_pack_does_not_go_on_with_other_captions(tmp_path, kind):
    """Or some of its shards would have the old ones."""
    data, notes = tmp_path / "data", tmp_path / ("notes.jsonl" if kind == "annotations" else "data/metadata.jsonl")
    data.mkdir()
    for i in range(4):
        (data / f"{i}.jpg").write_bytes(picture(i))

    def once(text):
        notes.write_text("\n".join(json.dumps({"file_name": f"{i}.jpg", "text": text}) for i in range(4)))
        pack(str(data), tmp_path / "out", annotations=str(notes) if kind == "annotations" else None, shard_size=2)

    once("old")
    (tmp_path / "out/00001.tar").unlink()
    with pytest.raises(ConfigError, match="data that has changed since"):
        once("new")
    once("old")
    assert (tmp_path / "out/00001.tar").is_file()


def test_counting_goes_on_behind_a_line_cut_short(tmp_path):
    for s in range(3):
        write_tar(tmp_path / "in" / f"{s}.tar", [(f"{s}_{i}.jpg", picture(i)) for i in range(s + 1)])
    done = pack(str(tmp_path / "in"), tmp_path / "whole", shard_size=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pack.json").write_text((tmp_path / "whole/pack.json").read_text())
    (tmp_path / "out/counts.jsonl").write_text("\n[2, 3]\n[0, ")
    told = []
    assert pack(str(tmp_path / "in"), tmp_path / "out", shard_size=2, progress=lambda *at: told.append(at)) == done
    assert [at for at in told if at[0] == "counting"] == [("counting", n, 3) for n in (1, 2, 3)]
    for file in ("SHA256SUMS", "counts.jsonl"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "whole" / file).read_text()


def test_a_shard_that_was_broken_when_it_was_counted_takes_no_numbers_of_the_next(tmp_path):
    for s in range(3):
        write_tar(tmp_path / "in" / f"{s}.tar", [(f"{s}_{i}.jpg", picture(i)) for i in range(4)])
    shard, out = tmp_path / "in" / "1.tar", tmp_path / "out"
    whole = shard.read_bytes()

    def stop(*at):
        if at == ("counting", 2, 3):
            raise KeyboardInterrupt

    def mend(*at):
        if at == ("counting", 3, 3):
            shard.write_bytes(whole)

    with tarfile.open(shard) as tar:
        shard.write_bytes(whole[: tar.getmember("1_3.jpg").offset_data + 10])
    cut = len(everything(open_source(str(shard))))
    with pytest.raises(KeyboardInterrupt):
        pack(str(tmp_path / "in"), out, progress=stop)
    assert (out / "counts.jsonl").read_text().split("\n") == ["", "[0, 4]"]  # the other is asked again
    done = pack(str(tmp_path / "in"), out, progress=mend)
    assert 0 < cut < 4 and done == {"shards": 1, "samples": 8 + cut, "left_out": {"broken shard": 1}, "kept": {}}
    packed = open_source(str(out))
    assert len(everything(packed)) == 8 + cut and set(packed.report) == {"samples"}


def sums(out):
    return [line.split() for line in (out / "SHA256SUMS").read_text().splitlines()]


def test_packing_shards_balances_them(tmp_path):
    for s, n in enumerate((1, 9, 5)):
        members = [(f"{s}_{i}.{e}", d) for i in range(n) for e, d in (("jpg", picture(i)), ("txt", b"%d %d" % (s, i)))]
        write_tar(tmp_path / "in" / f"{s}.tar", members)
    assert pack(str(tmp_path / "in"), tmp_path / "out", shard_size=4)["shards"] == 4
    before, after = everything(open_source(str(tmp_path / "in"))), everything(open_source(str(tmp_path / "out")))
    assert [(r.image, r.captions) for r in before] == [(r.image, r.captions) for r in after]
    counts = [json.loads(file.read_text())["samples"] for file in sorted((tmp_path / "out").glob("0*.json"))]
    assert sum(counts) == 15 and max(counts) - min(counts) == 1


def test_a_mixture_is_packed_by_its_shares_and_only_shards_are_counted(folder, tmp_path):
    for s, n in enumerate((4, 9, 5)):
        members = [(f"{s}_{i}.{e}", d) for i in range(n) for e, d in (("jpg", picture(i)), ("txt", b"%d %d" % (s, i)))]
        write_tar(tmp_path / "tars" / f"{s}.tar", members)
    data, told = f"{folder}::{tmp_path / 'tars'}@2::scenes", []
    done = pack(data, tmp_path / "out", shard_size=8, limit=40, progress=lambda *now: told.append(now))
    assert {total for task, _, total in told if task == "counting"} == {3}  # not a million scenes
    tars = [f"{s} {i}" for s, n in enumerate((4, 9, 5)) for i in range(n)]  # 18, of the 20 that are their share
    packed = [raw.captions[0] for raw in everything(open_source(str(tmp_path / "out")))]
    assert packed[-18:] == tars
    named = [caption in {raw.captions[0] for raw in everything(open_source(str(folder)))} for caption in packed[:-18]]
    assert sum(named) in (9, 10)  # one file is empty
    assert len(named) - sum(named) == 10 and named != sorted(named) and named != sorted(named, reverse=True)
    assert done["samples"] == len(packed) and done["shards"] == 5
    pack(data, tmp_path / "again", shard_size=8, limit=40, workers=2)
    assert sums(tmp_path / "again") == sums(tmp_path / "out")
    pack(data, tmp_path / "few", limit=20)
    assert [raw.captions[0] for raw in everything(open_source(str(tmp_path / "few")))][-10:] == tars[:10]
    pack(f"{tmp_path / 'tars'}::{folder}", tmp_path / "all")
    assert len(everything(open_source(str(tmp_path / "all")))) == 18 + 19


def test_inspection_counts_and_names(folder, tmp_path, monkeypatch, capsys):
    (folder / "a" / "copy.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes())
    (folder / "b" / "cut.png").write_bytes(picture(1, "PNG")[:45])
    summary = write_inspection(str(folder), None, None, tmp_path / "out")
    assert (summary["samples"], summary["usable"], summary["whole"]) == (22, 20, True)
    assert summary["left_out"] == {"empty file": 1, "corrupt image": 1}
    assert [b["key"] for b in summary["broken"]] == ["b/7.jpg", "b/cut.png"]
    assert summary["repeats"] == [{"key": "a/copy.jpg", "same_as": "a/0.jpg"}]
    assert summary["width"]["max"] == 29 and summary["labels"]["class"]["commonest"] == {"a": 11, "b": 9}
    assert summary["captions_a_picture"] == {5: 20}
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert "b/cut.png" in page and "data:image/jpeg" in page and (tmp_path / "out" / "contact_sheet.png").is_file()
    monkeypatch.setattr(sys, "argv", ["vtp"])
    cli.main(["data", "inspect", "scenes", "--limit", "50", "--out", str(tmp_path / "scenes")])
    assert "(a part)" in capsys.readouterr().out
    cli.main(["data", "pack", "scenes", "--limit", "10", "--workers", "1", "--out", str(tmp_path / "packed")])
    assert "packed 10 samples in 1 shards" in capsys.readouterr().out


def test_what_is_left_out_is_counted_once_wherever_it_stands(tmp_path):
    """Shards cut short or without a picture, and a name that is refused behind a shard's last sample."""
    shards, out = tmp_path / "in", tmp_path / "out"
    members = [(f"{i}.jpg", picture(i)) for i in range(4)]
    write_tar(shards / "0.tar", [("x.txt", b"no picture")])
    write_tar(shards / "1.tar", [*members, ("../out.jpg", picture(0))])
    cut = write_tar(shards / "2.tar", members)
    cut.write_bytes(cut.read_bytes()[:2_000])
    write_tar(shards / "3.tar", [("y.txt", b"no picture")])
    summary = write_inspection(str(shards), None, None, tmp_path / "page")
    done = pack(str(shards), out, shard_size=2)
    assert done["left_out"] == summary["left_out"] == {"no picture": 2, "unsafe name": 1, "broken shard": 1}
    assert done["samples"] == summary["usable"]


def test_inspection_of_a_mixture_reads_a_share_of_each_part(folder, tmp_path):
    for s in range(2):
        write_tar(tmp_path / "tars" / f"{s}.tar", [(f"{s}_{i}.jpg", picture(i)) for i in range(8)])
    data = f"{folder}@1::{tmp_path}/tars@2::scenes@1"
    summary = write_inspection(data, None, 16, tmp_path / "page")
    assert (summary["samples"], summary["whole"]) == (16, False)
    assert summary["labels"]["shape"]["found"] > 1 and sum(summary["labels"]["class"]["commonest"].values()) == 4
    assert write_inspection(f"{folder}::{tmp_path}/tars", None, 80, tmp_path / "page")["whole"]
    assert write_inspection(str(folder), None, 20, tmp_path / "page")["whole"]
    assert write_inspection(f"{tmp_path}/tars::{tmp_path}/tars", None, None, tmp_path / "page")["repeated"] == 24


def test_inspection_takes_braces(tmp_path):
    for s in range(2):
        write_tar(tmp_path / f"[b]{s}.tar", [(f"{s}.jpg", picture(s))])
    assert write_inspection(f"{tmp_path}/[[]b]{{0..1}}.tar", None, None, tmp_path / "page")["usable"] == 2


def test_a_pack_of_data_that_has_changed_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    pack(str(folder), out, shard_size=7)
    (out / "00001.json").unlink()  # as if interrupted
    (folder / "a" / "0.jpg").unlink()
    with pytest.raises(ConfigError, match="data that has changed since .source: .* -> .*choose another --out"):
        pack(str(folder), out, shard_size=7)


FULL = """
import resource, sys
from vtp import cli
from vtp.data import pack

fill = pack._fill

def on_a_full_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
    return fill(*args)

pack._fill = on_a_full_disk  # in the workers as well: this is their main module
if __name__ == "__main__":
    cli.main(["data", "pack", sys.argv[1], "--workers", "1", "--out", sys.argv[2]])
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(folder, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    command = [sys.executable, str(tmp_path / "full.py"), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"vtp: {tmp_path}/out/.00000.tar.partial: File too large"
    assert not list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").glob(".*.partial"))
