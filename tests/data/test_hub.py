"""Hugging Face sets as sources: saved, in a folder, streamed, broken."""

import sys

import numpy as np
import pytest

from tests.data.test_sources import everything, picture
from vtp.config import ConfigError
from vtp.data.pack import pack
from vtp.data.samples import CLASS_TEMPLATES, LOST, Source
from vtp.data.sources import counts, open_source


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet"])
def test_hugging_face_datasets(tmp_path, kind):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    columns = {
        "image": [{"bytes": picture(i), "path": None} for i in range(12)],
        "text": [f"number {i}" if i else None for i in range(12)],
        "label": [i % 3 for i in range(12)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a", "b_c", "c"]),
        }
    )
    rows = datasets.Dataset.from_dict(columns, features=features)
    data = f"hf:{tmp_path}/set"
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "set"))
    elif kind == "splits":
        datasets.DatasetDict({"held_out": rows}).save_to_disk(str(tmp_path / "set"))
        data += ":held_out"
    else:
        (tmp_path / "set").mkdir()
        for i in range(3):
            rows.shard(3, i, contiguous=True).to_parquet(str(tmp_path / "set" / f"train-{i:05d}-of-00003.parquet"))
    source = open_source(data)
    assert isinstance(source, Source) and source.random_access == (kind != "parquet")
    assert len(source.shards) == (3 if kind == "parquet" else 12)
    assert source.classes == {"class": ("a", "b c", "c")}
    raws = everything(source)
    assert [r.image for r in raws] == [picture(i) for i in range(12)]
    assert raws[0].captions == tuple(t.format("a") for t in CLASS_TEMPLATES) and raws[5].captions == ("number 5",)
    assert [r.labels["class"] for r in raws] == [0, 1, 2] * 4
    np.testing.assert_array_equal(counts(source, "class"), [4, 4, 4])
    why = {"saved": "leave :nowhere out", "splits": "no split 'nowhere', only held_out", "parquet": "nowhere"}[kind]
    for gone, words in (("set:nowhere", why), ("set/gone", "")):
        with pytest.raises(ConfigError, match=f"cannot be opened: .*{words}"):
            open_source(f"hf:{tmp_path}/{gone}")


def test_columns_of_classes_that_are_called_as_others_are(tmp_path):
    """`label` beside `class` stays a label; the classes of `text` are captions, packed as well."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    named = {"class": ["owl", "bee"], "label": ["day", "night"], "text": ["a wise owl", "7"]}
    columns = {name: [0, 1, 1] for name in named} | {"image": [{"bytes": picture(i), "path": None} for i in range(3)]}
    features = {name: datasets.ClassLabel(names=names) for name, names in named.items()} | {"image": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    pack(f"hf:{tmp_path}/set", tmp_path / "out")
    for data in (f"hf:{tmp_path}/set", str(tmp_path / "out")):
        source = open_source(data)
        assert source.classes == {"class": ("owl", "bee"), "label": ("day", "night")}
        bee = tuple(t.format("bee") for t in CLASS_TEMPLATES)  # a number is no caption
        found = {raw.image: (raw.captions, raw.labels) for raw in everything(source)}
        assert found == {
            picture(i): (captions, {"class": n, "label": n})
            for i, (n, captions) in enumerate(((0, ("a wise owl",)), (1, bee), (1, bee)))
        }


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_a_file_of_a_hub_set_that_breaks_is_left_out(tmp_path, fault, caplog):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    columns = {"image": [{"bytes": picture(i), "path": None} for i in range(12)], "text": ["t"] * 12}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    files = [tmp_path / f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    for i, file in enumerate(files):
        rows.shard(3, i, contiguous=True).to_parquet(str(file))
    source = open_source(f"hf:{tmp_path}")
    if fault == "gone":
        files[1].unlink()
    else:
        files[1].write_bytes(files[1].read_bytes()[:-100])
    assert len(everything(source)) == 8 and source.report == {"samples": 8, "broken shard": 1, LOST: 4}
    assert f"hf:{tmp_path}, file 1 is left out behind its first 0 samples" in caplog.text


def test_a_hugging_face_set_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install 'vtp.datasets.'"):
        open_source(f"hf:{tmp_path}")
