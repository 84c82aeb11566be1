"""Captions and labels by key, in a jsonl file beside the data or given with them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_sources import everything, picture, write_tar
from vtp.data.samples import CLASS_TEMPLATES, left_out
from vtp.data.sources import counts, open_source


def test_annotations_give_captions_and_labels(tmp_path):
    write_tar(
        tmp_path / "a.tar", [(f"x/k{i}.{e}", d) for i in range(3) for e, d in (("jpg", picture(i)), ("txt", b"own"))]
    )
    rows = [
        {"key": "k0", "captions": ["given"], "type": "shoe", "year": 2001, "price": 1.5},
        {"key": "k1", "type": "hat", "year": 1999},
        {"key": "elsewhere", "type": "hat"},
    ]
    notes = tmp_path / "notes.jsonl"
    notes.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "a.tar"), str(notes))
    raws = everything(source)
    assert [r.captions for r in raws] == [("given",), ("own",), ("own",)]
    assert source.classes == {"type": ("hat", "shoe"), "year": ("1999", "2001")}
    assert [r.labels for r in raws] == [{"type": 1, "year": 1}, {"type": 0, "year": 0}, {}]
    assert source.report == {"samples": 3, "not in annotations": 1} and not left_out(source.report)
    np.testing.assert_array_equal(counts(source, "type"), [2, 1])  # of the whole file, so that splits agree
    for i in range(3):
        (tmp_path / f"k{i}.jpg").write_bytes(picture(i))
    notes.write_text("\n".join(json.dumps({"file_name": f"k{i}.jpg", "size": 11 - i}) for i in range(3)))
    numbered = open_source(str(tmp_path / "a.tar"), str(notes))
    assert numbered.classes == {"size": ("9", "10", "11")} and [r.labels["size"] for r in everything(numbered)] == [
        2,
        1,
        0,
    ]
    notes.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.tar").unlink()
    assert [r.labels.get("type") for r in everything(open_source(str(tmp_path), str(notes)))] == [1, 0, None]


@pytest.mark.parametrize("kind", ["beside", "metadata", "class folders"])
def test_annotations_add_to_what_a_folder_says(tmp_path, kind):
    """Labels leave captions as they are; what both name, the annotations number."""
    for i, name in enumerate(("b/0.jpg", "a/1.jpg", "a/2.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(i))
        if kind == "beside":
            (tmp_path / name).with_suffix(".txt").write_text(f"number {i}")
    rows = [
        {"file_name": name, "text": f"number {i}", "class": "x", "hue": "red"}
        for i, name in enumerate(("b/0.jpg", "a/1.jpg"))
    ]
    if kind == "metadata":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"key": "./b/0.jpg", "class": "owl"}\n{"key": "1", "class": "bee", "text": "given"}')
    source = open_source(str(tmp_path), str(notes))
    raws = {raw.key: raw for raw in everything(source)}
    assert source.classes == {"class": ("bee", "owl")} | ({"hue": ("red",)} if kind == "metadata" else {})
    assert raws["b/0.jpg"].labels["class"] == 1 and raws["a/1.jpg"].labels["class"] == 0
    assert raws["a/1.jpg"].captions == ("given",)
    if kind == "class folders":
        assert raws["b/0.jpg"].captions == tuple(t.format("owl") for t in CLASS_TEMPLATES)
        assert raws["a/2.jpg"].captions == tuple(t.format("a") for t in CLASS_TEMPLATES)
        assert source.report == {"samples": 3, "not in annotations": 1}
    else:
        assert raws["b/0.jpg"].captions == ("number 0",)
    assert len(raws) == (2 if kind == "metadata" else 3)
    if kind != "metadata":
        assert "class" not in raws["a/2.jpg"].labels


@pytest.mark.parametrize("named", ["folder", "cls"])
def test_annotations_add_to_the_classes_of_shards(tmp_path, named):
    """Labels of another column leave classes and the captions made from them as they are."""
    members = [("b/0.jpg", picture(0)), ("a/1.jpg", picture(1))]
    if named == "cls":
        members = [(f"{i}.{e}", d) for i, c in enumerate((b"b", b"a")) for e, d in (("jpg", picture(i)), ("cls", c))]
    write_tar(tmp_path / "x.tar", members)
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"key": "0", "file_name": "0.jpg", "year": 1999}')
    source = open_source(str(tmp_path / "x.tar"), str(notes))
    assert source.classes == {"class": ("a", "b"), "year": ("1999",)}  # and a line's second name is no label
    assert [raw.labels for raw in everything(source)] == [{"class": 1, "year": 0}, {"class": 0}]
    assert [raw.captions[0] for raw in everything(source)] == ["a photo of a b", "a photo of a a"]


def test_annotations_are_of_all_parts_but_the_embedded_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("scenes_of_mine", "other"):
        Path(place).mkdir()
        (tmp_path / place / "a.jpg").write_bytes(picture(0))
    Path("notes.jsonl").write_text('{"key": "a", "text": "given"}')
    source = open_source("scenes_of_mine::other::scenes:test", "notes.jsonl")
    raws = [raw for shard in source.shards[:3] for raw in source.read(shard)]
    assert [raw.captions == ("given",) for raw in raws] == [True, True, False]


def test_annotations_number_the_classes_of_shards_otherwise(tmp_path):
    """KEY.cls is of the classes that the shards have, and the name of one still makes captions."""
    words = (b"big_owl", b"bee", b"5", b"1")
    members = [(f"{i}.{e}", d) for i, w in enumerate(words) for e, d in (("jpg", picture(i)), ("cls", w))]
    write_tar(tmp_path / "x.tar", members)
    listed = [{"wnid": "bee", "names": ["bee"]}, {"wnid": "big_owl", "names": ["big owl"]}]
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    notes = tmp_path / "notes.jsonl"
    notes.write_text(
        "\n".join(json.dumps({"key": key, "class": name}) for key, name in zip("0vwxyz", "eabcdf", strict=True))
    )
    source = open_source(str(tmp_path / "x.tar"), str(notes))
    raws = everything(source)
    assert source.classes == {"class": tuple("abcdef")} and [raw.labels for raw in raws] == [{"class": 4}, {}, {}, {}]
    called = [raw.captions[0].removeprefix("a photo of a ") if raw.captions else None for raw in raws]
    assert called == ["e", "bee", None, "big owl"]
    assert source.report == {"samples": 4, "not in annotations": 3, "unknown class": 1}
    (tmp_path / "classes.json").unlink()
    write_tar(tmp_path / "x.tar", members[:4])
    raws = everything(open_source(str(tmp_path / "x.tar")))
    assert [raw.captions[0] for raw in raws] == ["a photo of a big owl", "a photo of a bee"]


@pytest.mark.parametrize("given", ["metadata", "annotations"])
def test_a_class_in_a_column_makes_captions_unless_it_is_a_number(tmp_path, given):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    file = tmp_path / f"{given}.jsonl"
    for names, captions in (("big_owl", "a photo of a big owl"), ("7", None), ("-1", None)):
        file.write_text(
            "\n".join(json.dumps({"file_name": f"{i}.jpg", "class": names, "text": "t" * i}) for i in (0, 1))
        )
        raws = everything(open_source(str(tmp_path), str(file) if given == "annotations" else None))
        assert [next(iter(raw.captions), None) for raw in raws] == [captions, "t"]


def test_classes_of_a_column_are_its_values_whatever_lies_beside(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "classes.json").write_text(json.dumps([{"wnid": str(i), "names": [f"name {i}"]} for i in range(9)]))
    rows = [{"file_name": "0.jpg", "class": 7}, {"file_name": "1.jpg", "class": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path))
    assert source.classes == {"class": ("3", "7")}
    assert [(raw.labels, raw.captions) for raw in everything(source)] == [({"class": 1}, ()), ({"class": 0}, ())]


def test_texts_serve_where_metadata_have_no_caption(tmp_path):
    rows = [{"file_name": "0.jpg", "hue": "red"}, {"file_name": "1.jpg", "text": "its own"}, {"file_name": "2.jpg"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
        if i < 2:
            (tmp_path / f"{i}.txt").write_text(f"text {i}")
    raws = everything(open_source(str(tmp_path)))
    assert [raw.captions for raw in raws] == [("text 0",), ("its own",), ()]
    assert [raw.labels for raw in raws] == [{"hue": 0}, {}, {}]


def test_metadata_of_a_folder_below_are_named(tmp_path, caplog):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.jpg").write_bytes(picture(0))
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "t"}')
    open_source(str(tmp_path))
    assert f"name that one, {tmp_path}/train" in caplog.text


def test_annotations_of_other_pictures_are_named(tmp_path, caplog):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    notes = tmp_path / "notes.jsonl"
    notes.write_text(json.dumps({"key": "b", "text": "t"}))
    source = open_source(f"{tmp_path}::scenes", str(notes))
    assert caplog.messages == [
        f"{notes} has no line for any of the first pictures of {tmp_path}::scenes: the key of a line is a picture's "
        "name, with or without its folder and suffix"
    ]
    assert source.report == {}
    notes.write_text(json.dumps({"key": "a", "text": "t"}))
    open_source(f"{tmp_path}::scenes", str(notes))
    assert len(caplog.messages) == 1


def test_several_lines_of_a_picture_and_lines_that_are_not_utf8(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(1, "PNG"))
    lines = [
        b'{"file_name": "a.png", "text": "one", "style": "old"}',
        '{"file_name": "a.png", "text": "two\u2028lines in one"}'.encode(),
        b'{"file_name": "b.png", "text": "caf\xe9"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\r\n".join(lines))
    source = open_source(str(tmp_path))
    a, b = everything(source)
    assert a.captions == ("one", "two\u2028lines in one") and a.labels == {"style": 0} and b.captions == ("caf\ufffd",)
    assert source.report == {"samples": 2, "caption not UTF-8": 1}
