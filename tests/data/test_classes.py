"""Classes: of folders, of KEY.cls, of classes.json; their names, and the captions that these make."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_sources import everything, picture, write_tar
from vtp.config import ConfigError
from vtp.data.samples import CLASS_TEMPLATES, Source, left_out
from vtp.data.sources import counts, open_source


def test_class_folders(tmp_path):
    for i in range(6):
        folder = tmp_path / ("cat", "big_dog")[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.{('jpg', 'PNG', 'webp')[i % 3]}").write_bytes(picture(i))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._0.jpg").write_bytes(b"a file that another system leaves about")
    source = open_source(str(tmp_path))
    assert isinstance(source, Source) and source.random_access
    assert source.classes == {"class": ("big dog", "cat")}
    raws = everything(source)
    assert [r.labels["class"] for r in raws] == [0, 0, 0, 1, 1, 1]
    assert raws[3].key.startswith("cat/") and raws[3].image == picture(0)
    assert raws[0].captions == tuple(t.format("big dog") for t in CLASS_TEMPLATES)
    np.testing.assert_array_equal(counts(source, "class"), [3, 3])


def test_classes_json_names_and_orders_class_folders(tmp_path):
    for name in ("n1", "n2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(picture(0))
    listed = [{"wnid": "n2", "names": ["newt", "Triturus"]}, {"wnid": "n1", "names": ["owl"]}]
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    source = open_source(str(tmp_path))
    assert source.classes["class"] == ("newt", "owl")
    assert [r.labels["class"] for r in everything(source)] == [1, 0]
    (tmp_path / "classes.json").write_text(json.dumps(listed[:1]))
    with pytest.raises(ConfigError, match="classes.json does not name the class n1"):
        open_source(str(tmp_path))
    (tmp_path / "classes.json").write_text("{}[")
    with pytest.raises(ConfigError, match="classes.json is not a list"):
        open_source(str(tmp_path))


def test_tar_shards_with_class_numbers_and_with_class_folders(tmp_path):
    write_tar(
        tmp_path / "n.tar", [(f"{i}.{e}", d) for i in range(3) for e, d in (("png", picture(i)), ("cls", b"%d" % i))]
    )
    numbered = open_source(str(tmp_path / "n.tar"))
    assert numbered.classes == {"class": ("0", "1", "2")}
    assert [r.labels["class"] for r in everything(numbered)] == [0, 1, 2]
    write_tar(tmp_path / "f.tar", [(f"train/{c}/{i}.JPEG", picture(i)) for i, c in enumerate(("owl", "bee", "owl"))])
    folders = open_source(str(tmp_path / "f.tar"))
    assert folders.classes == {"class": ("bee", "owl")}
    assert [r.labels["class"] for r in everything(folders)] == [1, 0, 1]
    assert folders.shards == [str(tmp_path / "f.tar")] and not folders.random_access


def test_one_caption_among_many_pictures_is_found_and_said_to_end_classes(tmp_path, caplog):
    for i in range(300):
        file = tmp_path / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    assert open_source(str(tmp_path)).classes == {"class": ("a", "b")} and not caplog.text
    (tmp_path / "b" / "237.txt").write_text("a text")
    source = open_source(str(tmp_path))
    assert [raw.captions for raw in everything(source) if raw.captions] == [("a text",)]
    assert source.classes == {} and "1 of 300 pictures have a text beside them" in caplog.text


def test_folders_that_are_numbers_make_no_captions(tmp_path):
    for name in ("0/a.jpg", "1/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(0))
    source = open_source(str(tmp_path))
    assert source.classes == {"class": ("0", "1")}
    assert [(raw.labels, raw.captions) for raw in everything(source)] == [({"class": 0}, ()), ({"class": 1}, ())]


def classed(path, words):
    members = [(f"{i}.{e}", d) for i, w in enumerate(words) for e, d in (("jpg", picture(i)), ("cls", w.encode()))]
    return write_tar(path, members)


def test_words_as_classes_and_numbers_that_are_none(tmp_path):
    words = open_source(str(classed(tmp_path / "words" / "a.tar", ["\ufeffowl", "bee\n", "owl"])))
    assert words.classes == {"class": ("bee", "owl")} and [r.labels["class"] for r in everything(words)] == [1, 0, 1]
    empty = write_tar(
        tmp_path / "c.tar", [("0.jpg", picture(0)), ("0.CLS", b"owl"), ("1.jpg", picture(1)), ("1.cls", b"")]
    )
    raws = everything(source := open_source(str(empty)))
    assert source.classes == {"class": ("owl",)} and [raw.labels for raw in raws] == [{"class": 0}, {}]
    assert raws[1].captions == () and source.report == {"samples": 2}  # an empty one is none
    gone = classed(tmp_path / "gone" / "b.tar", ["eel"])
    (gone.parent / "a.tar.gz").write_bytes(gzip.compress(empty.read_bytes()))
    cut = gone.parent / "c.tar.gz"
    cut.write_bytes(gzip.compress(gone.read_bytes())[:200])
    broken = open_source(f"{gone.parent}/*")
    assert broken.classes == {"class": ("eel", "owl")} and len(everything(broken)) == 3
    assert broken.report["broken shard"] == 1
    numbered = classed(tmp_path / "numbered" / "a.tar", ["1", "0"])
    (numbered.parent / "classes.json").write_text('[{"wnid": 0, "names": ["owl"]}, {"wnid": 1, "names": ["bee"]}]')
    assert [r.captions[0] for r in everything(open_source(str(numbered)))] == ["a photo of a bee", "a photo of a owl"]
    (numbered.parent / "classes.json").write_text('[{"wnid": "1", "names": ["owl"]}, {"wnid": "2", "names": ["bee"]}]')
    own = open_source(str(numbered))  # classes called by other numbers than their places
    assert [r.labels for r in everything(own)] == [{"class": 0}, {}] and own.report["unknown class"] == 1
    mixed = open_source(str(classed(tmp_path / "mixed" / "a.tar", ["1", "owl", "0"])))
    assert [r.labels.get("class") for r in everything(mixed)] == [1, None, 0]
    assert mixed.report == {"samples": 3, "unknown class": 1} and not left_out(mixed.report)
    with pytest.raises(ConfigError, match="KEY.cls holds 999999999999; classes are numbered"):
        open_source(str(classed(tmp_path / "huge" / "a.tar", ["1", "999999999999"])))
    assert open_source(str(classed(tmp_path / "blank" / "a.tar", ["", " "]))).classes == {}
    inner = [("0.jpg", picture(0)), ("0.cls", b"owl"), ("0.mask.cls", b"sky")]
    assert open_source(str(write_tar(tmp_path / "inner.tar", inner))).classes == {"class": ("owl",)}
    alike = open_source(str(classed(tmp_path / "alike" / "a.tar", ["a_b", "a b"])))
    assert alike.classes == {"class": ("a b", "a_b")}  # two classes are not called the same
    (tmp_path / "mixed" / "classes.json").write_text(json.dumps([{"wnid": "n1", "names": ["newt"]}]))
    named = open_source(str(tmp_path / "mixed" / "a.tar"))
    assert named.classes == {"class": ("newt",)} and named.report == {}
    assert [r.captions != () for r in everything(named)] == [False, False, True]
    assert named.report == {"samples": 3, "unknown class": 2}


def test_classes_of_shards_that_cannot_be_scanned_are_none(tmp_path):
    piped = open_source(f"pipe:cat {classed(tmp_path / 'a.tar', ['1', '0'])}")
    assert piped.classes == {} and [r.labels for r in everything(piped)] == [{}, {}]
    assert piped.report == {"samples": 2, "unknown class": 2}


def test_real_class_folders_in_a_shard(shared):
    folder = shared / "data" / "labelled"
    if not folder.is_dir():
        pytest.skip("no labelled pictures")
    source = open_source(str(folder / "tiny-imagenet-100-test.tar"))
    assert len(source.classes["class"]) == 100 and source.classes["class"][0] == "goldfish"
    np.testing.assert_array_equal(counts(source, "class"), [50] * 100)


@pytest.mark.parametrize("name", ["3", "", " ", "7" * 5_000])
def test_names_of_classes_that_are_none(tmp_path, name):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jpg").write_bytes(picture(0))
    for wrong in ('"ant"', "[null]", "[]"):
        (tmp_path / "classes.json").write_text(f'[{{"wnid": "a", "names": {wrong}}}]')
        with pytest.raises(ConfigError, match="classes.json is not a list of .*Error"):
            open_source(str(tmp_path))
    listed = [{"wnid": "a", "names": [int(name) if name == "3" else name]}, {"wnid": "b", "names": ["bee"]}]
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    source = open_source(str(tmp_path))
    assert source.classes == {"class": (name, "bee")}
    assert [raw.captions[:1] for raw in everything(source)] == [(), ("a photo of a bee",)]
    rows = [{"file_name": f"{folder}/0.jpg", "class": name} for folder in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source(str(tmp_path)).classes == {"class": (name,)}


def test_one_text_among_many_pictures_of_a_shard_is_said_to_end_classes(tmp_path, caplog):
    members = [(f"{c}/{i}.jpg", picture(i)) for c in "ab" for i in range(3)]
    assert open_source(str(write_tar(tmp_path / "a.tar", members))).classes == {"class": ("a", "b")}
    assert not caplog.text
    write_tar(tmp_path / "a.tar", [members[0], ("a/0.txt", b"a stray text"), *members[1:]])
    assert open_source(str(tmp_path / "a.tar")).classes == {}
    assert "the first samples: 1 of 6 pictures have a text" in caplog.text


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ConfigError, match="holds splits, not classes; name one of them, as in .*test"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path / "train")).classes == {"class": ("cat", "dog")}
