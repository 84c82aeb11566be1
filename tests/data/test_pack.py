import hashlib
import json
import sys

import pytest

from tests.data.test_sources import everything, picture, write_tar
from vtp import cli
from vtp.config import ConfigError
from vtp.data.pack import pack
from vtp.data.sources import open_source
from vtp.report.dataset import write_inspection


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg").write_bytes(picture(i) if i != 7 else b"")
    return tmp_path / "in"


def test_packed_shards_hold_the_same_samples_in_equal_shards(folder, tmp_path):
    out = tmp_path / "out"
    done = pack(str(folder), out, shard_size=7)
    assert done == {"shards": 3, "samples": 19, "left_out": {"empty file": 1}}
    before, after = everything(open_source(str(folder))), everything(open_source(str(out)))
    assert {(r.image, r.captions, r.labels["class"]) for r in after} == {
        (r.image, r.captions, r.labels["class"]) for r in before if r.image
    }
    assert open_source(str(out)).classes == {"class": ("a", "b")}
    assert [r.labels["class"] for r in after] != sorted(r.labels["class"] for r in after)
    sums = [line.split() for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in sums] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for digest, name in sums)


def test_an_interrupted_pack_goes_on_and_ends_the_same(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(str(folder), whole, shard_size=7)

    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), out, shard_size=7, progress=stop)
    for number in (1, 2):  # as if it had been killed before them
        for file in out.glob(f"0000{number}.*"):
            file.unlink()
    kept = (out / "00000.tar").stat().st_mtime_ns
    pack(str(folder), out, shard_size=7)
    assert (out / "00000.tar").stat().st_mtime_ns == kept
    assert (out / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()
    with pytest.raises(ConfigError, match="shards of another pack"):
        pack(str(folder), out, shard_size=8)


def test_packing_shards_balances_them(tmp_path):
    for s, n in enumerate((1, 9, 5)):
        members = [(f"{s}_{i}.{e}", d) for i in range(n) for e, d in (("jpg", picture(i)), ("txt", b"%d %d" % (s, i)))]
        write_tar(tmp_path / "in" / f"{s}.tar", members)
    assert pack(str(tmp_path / "in"), tmp_path / "out", shard_size=4)["shards"] == 4
    before, after = everything(open_source(str(tmp_path / "in"))), everything(open_source(str(tmp_path / "out")))
    assert [(r.image, r.captions) for r in before] == [(r.image, r.captions) for r in after]
    counts = [json.loads(file.read_text())["samples"] for file in sorted((tmp_path / "out").glob("0*.json"))]
    assert sum(counts) == 15 and max(counts) - min(counts) == 1


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
