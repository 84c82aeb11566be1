import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vtp.config import ConfigError
from vtp.data import shards
from vtp.data.samples import CLASS_TEMPLATES, Source, kept, left_out
from vtp.data.scenes import CLASSES
from vtp.data.sources import counts, open_source


def picture(i, suffix="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (10 + i, 12), (i * 20 % 256, 100, 50)).save(buffer, suffix)
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def everything(source):
    return [raw for shard in source.shards for raw in source.read(shard)]


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


def test_flat_folder_with_metadata(tmp_path):
    rows = [
        {"file_name": "a.jpg", "text": "a red car ", "kind": "car"},
        {"file_name": "sub/b.jpg", "text": ["one bus", "a bus", ""], "kind": "bus"},
        {"file_name": "c.jpg", "kind": None},
        {"file_name": "gone.jpg", "text": "x"},
    ]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.jpg", "sub/b.jpg", "c.jpg", "unlisted.jpg")):
        (tmp_path / name).write_bytes(picture(i))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(str(tmp_path))
    raws = {r.key: r for r in everything(source)}
    assert raws.keys() == {"a.jpg", "sub/b.jpg", "c.jpg"}
    assert raws["a.jpg"].captions == ("a red car",) and raws["sub/b.jpg"].captions == ("one bus", "a bus")
    assert raws["c.jpg"].captions == () and raws["c.jpg"].labels == {}
    assert source.classes == {"kind": ("bus", "car")} and raws["a.jpg"].labels == {"kind": 1}
    assert source.report == {"samples": 4, "unreadable file": 1}


def test_the_first_picture_may_lack_the_caption_that_others_have(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(picture(i))
            if (name, i) != ("a", 0):
                (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    source = open_source(str(tmp_path))
    assert source.classes == {} and [r.captions for r in everything(source)][:2] == [(), ("a 1",)]


def test_pictures_without_anything(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0, "PNG"))
    (raw,) = everything(open_source(str(tmp_path)))
    assert raw == ("a.png", picture(0, "PNG"), (), {})


def test_tar_shards_with_captions_braces_globs_and_folders(tmp_path):
    for s in range(3):
        write_tar(
            tmp_path / f"shard-{s:02d}.tar",
            [
                *(
                    (f"{s}{i}.{e}", d)
                    for i in range(2)
                    for e, d in (("jpg", picture(i)), ("txt", f"café {s}{i}\n".encode()))
                ),
                (f"{s}9.webp", picture(9, "WEBP")),
                (f"{s}9.json", json.dumps({"caption": "from json", "width": 3}).encode()),
                ("only.txt", b"no picture"),
            ],
        )
    (tmp_path / "shard-00.parquet").write_bytes(b"a side file")
    for data in ("shard-{00..02}.tar", "shard-0?.tar", ""):
        source = open_source(str(tmp_path / data))
        raws = everything(source)
        assert [r.key for r in raws] == [f"{s}{k}" for s in range(3) for k in (0, 1, 9)]
        assert raws[1].captions == ("café 01",) and raws[2].captions == ("from json",)
        assert raws[1].image == picture(1) and source.classes == {}
        assert source.report == {"samples": 12, "no picture": 3}
    piped = open_source(f"pipe:cat {tmp_path}/shard-01.tar")
    assert [r.key for r in everything(piped)] == ["10", "11", "19"]


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


def test_a_truncated_shard_gives_what_it_holds_and_is_counted(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(9) for e, d in (("jpg", picture(i)), ("txt", b"t"))]
    )
    whole = path.read_bytes()
    write_tar(tmp_path / "b.tar", [("z.jpg", picture(1)), ("z.txt", b"t")])
    for cut in (700, len(whole) // 2 + 100):
        path.write_bytes(whole[:cut])
        source = open_source(str(tmp_path))
        keys = [r.key for r in everything(source)]
        assert keys[-1] == "z" and 0 < len(keys) < 9
        assert source.report["broken shard"] == 1
    path.write_bytes(b"")
    source = open_source(str(tmp_path))
    assert [r.key for r in everything(source)] == ["z"] and source.report["broken shard"] == 1


def test_a_name_that_is_twice_in_a_shard_is_counted(tmp_path):
    members = [("a.jpg", picture(0)), ("a.jpg", picture(1)), ("a.txt", b"first"), ("b.jpg", picture(2))]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    raws = everything(source)
    assert [(r.key, r.image) for r in raws] == [("a", picture(0)), ("b", picture(2))]
    assert source.report["duplicate file"] == 1


def test_broken_text_is_survived(tmp_path):
    members = [("a.jpg", picture(0)), ("a.txt", b"caf\xe9"), ("b.jpg", picture(1)), ("b.json", b"{oops")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    raws = everything(source)
    assert raws[0].captions == ("caf\ufffd",) and raws[1].captions == ()
    assert source.report["broken json"] == source.report["caption not UTF-8"] == 1
    assert not left_out(source.report)  # pictures are kept, and captions as far as they can be read


def test_an_empty_caption_leaves_the_next_column(tmp_path):
    rows = [b'{"text": "", "caption": "a hill"}', b'{"text": null, "captions": ["", "two"]}', b'{"text": 3}']
    members = [(f"{i}.{e}", d) for i, row in enumerate(rows) for e, d in (("jpg", picture(i)), ("json", row))]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [raw.captions for raw in everything(source)] == [("a hill",), ("two",), ()]


def test_json_is_read_as_far_as_it_can_be(tmp_path):
    members = [("a.jpg", picture(0)), ("a.txt", b" "), ("a.json", b'{"caption": "caf\xe9"}')]
    members += [("b.jpg", picture(1)), ("b.json", b"[" * 100_000)]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [raw.captions for raw in everything(source)] == [("caf\ufffd",), ()]
    assert source.report == {"samples": 2, "caption not UTF-8": 1, "broken json": 1}


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    source = open_source(str(write_tar(tmp_path / "a.tar", [("a.jpg", picture(0)), ("a.txt", b"\xef\xbb\xbftext")])))
    (raw,) = everything(source)
    assert raw.captions == ("text",)


def test_a_page_of_text_is_cut(tmp_path):
    words = b"word " * 20_000  # 100 kB
    source = open_source(str(write_tar(tmp_path / "a.tar", [("a.jpg", picture(0)), ("a.txt", words)])))
    (raw,) = everything(source)
    assert raw.captions[0] == words.decode()[:2_000] and source.report == {"samples": 1, "caption cut": 1}
    assert not left_out(source.report)


@pytest.mark.parametrize("name", ["1\\u0000.jpg", "1\\ud83d.jpg"])
def test_a_name_that_no_file_can_have_is_counted(tmp_path, name):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    rows = f'{{"file_name": "0.jpg", "hue": "x\\ud83d"}}\n{{"file_name": "{name}", "hue": "y"}}'
    (tmp_path / "metadata.jsonl").write_text(rows)
    source = open_source(str(tmp_path))
    assert [raw.key for raw in everything(source)] == ["0.jpg"] and source.classes == {"hue": ("x?", "y")}
    assert source.report == {"samples": 2, "unreadable file": 1}


def test_names_in_capitals_and_with_dashes_before_them(tmp_path):
    (tmp_path / "A.JPG").write_bytes(picture(0))
    (tmp_path / "A.TXT").write_text("a hill")
    assert [raw.captions for raw in everything(open_source(str(tmp_path)))] == [("a hill",)]
    members = [("__b.jpg", picture(0)), ("__e/f.jpg", picture(1)), ("__MACOSX/._a.jpg", b"no picture")]
    source = open_source(str(write_tar(tmp_path / "tars" / "a.tar", members)))
    assert len(everything(source)) == 2 and source.report == {"samples": 2}


def test_pipes_and_devices_among_pictures_are_left_out(tmp_path):
    for name in ("a.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(picture(0))
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    (tmp_path / "d.txt").write_text("a hill")
    source = open_source(str(tmp_path))
    assert [raw.captions for raw in everything(source)] == [(), ("a hill",)]
    assert source.report == {"samples": 4, "link or device": 2}


def test_pictures_beside_shards_are_said_not_to_be_read(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(0))])
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "b.jpg").write_bytes(picture(1))
    assert [raw.key for raw in everything(open_source(str(tmp_path)))] == ["a"]
    assert "pictures in folders, which are not" in caplog.text


def test_a_shard_that_is_a_link_leading_nowhere_is_counted(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "00.tar").mkdir()  # a folder is no shard
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone.tar")
    write_tar(tmp_path / "2.TAR", [("a.jpg", picture(0))])
    for data in (tmp_path, tmp_path / "*.[tT]*"):
        source = open_source(str(data))
        assert len(everything(source)) == 1 and source.report["broken shard"] == 2


def test_names_that_lead_out_of_their_place_are_left_out(tmp_path):
    members = [("../../a.jpg", picture(0)), ("../../a.txt", b"out"), ("x/b..c/d.jpg", picture(1))]
    source = open_source(str(write_tar(tmp_path / "t" / "a.tar", members)))
    assert [raw.key for raw in everything(source)] == ["x/b..c/d"]
    assert source.report == {"samples": 1, "unsafe name": 2}
    (tmp_path / "out.jpg").write_bytes(picture(0))
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "in.jpg").write_bytes(picture(1))
    rows = ("../out.jpg", str(tmp_path / "out.jpg"), "in.jpg")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": row}) for row in rows))
    source = open_source(str(folder))
    assert [raw.key for raw in everything(source)] == ["in.jpg"]
    assert source.report == {"samples": 3, "unsafe name": 2}


def test_links_devices_and_files_of_absurd_size_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES", 1_000)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("out.jpg", tarfile.SYMTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in (("a.jpg", picture(0)), ("a.json", b" " * 1_001), ("b.jpg", b"x" * 1_001)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"))
    assert [raw.key for raw in everything(source)] == ["a"]
    assert source.report == {"samples": 1, "link or device": 2, "file too large": 2}
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "b.jpg").write_bytes(b"x" * 1_001)
    source = open_source(str(tmp_path))
    assert [raw.key for raw in everything(source)] == ["a.jpg"] and source.report["file too large"] == 1


def test_a_link_to_the_folder_that_holds_it_is_not_followed(tmp_path):
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / "a.jpg").write_bytes(picture(0))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(picture(1))
    (tmp_path / "set" / "in" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [raw.key for raw in everything(open_source(str(tmp_path / "set")))] == ["in/a.jpg", "linked/b.jpg"]


def test_captions_beside_pictures_in_folders(tmp_path):
    """As img2dataset writes with output_format="files"."""
    for place in ("00000", "00001"):
        (tmp_path / place).mkdir()
        for i in range(2):
            (tmp_path / place / f"{place}{i}.jpg").write_bytes(picture(i))
            (tmp_path / place / f"{place}{i}.json").write_text(json.dumps({"caption": f"{place} {i}", "status": "ok"}))
        (tmp_path / place / f"{place}1.txt").write_text("of the text")
        (tmp_path / f"{place}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert source.classes == {} and source.report["samples"] == 0
    assert [raw.captions for raw in everything(source)] == [
        ("00000 0",),
        ("of the text",),
        ("00001 0",),
        ("of the text",),
    ]


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


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(picture(0))
    scandir = os.scandir

    def refuse(place):  # root may read everything
        if str(place).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=f"{tmp_path}/b"):
        open_source(str(tmp_path))


def test_a_file_with_braces_in_its_name(tmp_path):
    write_tar(tmp_path / "br{1..2}ace.tar", [("a.jpg", picture(0))])
    assert len(everything(open_source(str(tmp_path / "br{1..2}ace.tar")))) == 1


def test_a_key_that_comes_again_is_counted(tmp_path):
    members = [("a.jpg", picture(0)), ("b.jpg", picture(1)), ("a.jpg", picture(2)), ("a.txt", b"late")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [(r.key, r.image) for r in everything(source)] == [("a", picture(0)), ("b", picture(1))]
    assert source.report == {"samples": 2, "duplicate key": 1}


def test_a_second_picture_of_a_key_is_counted(tmp_path):
    members = [("a.png", picture(0, "PNG")), ("a.jpg", picture(1)), ("b.jpg", picture(2)), ("b.mask.png", b"")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [(r.key, r.image) for r in everything(source)] == [("a", picture(1)), ("b", picture(2))]
    assert kept(source.report) == {"second picture": 1} and not left_out(source.report)


def test_folders_that_are_numbers_make_no_captions(tmp_path):
    for name in ("0/a.jpg", "1/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(0))
    source = open_source(str(tmp_path))
    assert source.classes == {"class": ("0", "1")}
    assert [(raw.labels, raw.captions) for raw in everything(source)] == [({"class": 0}, ()), ({"class": 1}, ())]


def test_a_text_apart_from_its_picture_is_counted_as_that(tmp_path):
    members = [(f"{k}.{e}", d) for e, d in (("jpg", picture(0)), ("txt", b"late")) for k in "ab"]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [(r.key, r.captions) for r in everything(source)] == [("a", ()), ("b", ())]
    assert left_out(source.report) == {"not beside its picture": 2}


def test_dots_in_a_name_are_said_to_be_why_it_is_no_picture(tmp_path):
    members = [("my.photo.jpg", picture(0)), ("my.photo.txt", b"x"), ("b.jpg", picture(1)), ("c.txt", b"x")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [r.key for r in everything(source)] == ["b"]
    assert left_out(source.report) == {"dots in its name": 1, "no picture": 1}


def test_names_as_tar_writes_them_of_a_dot(tmp_path):
    flat = open_source(str(write_tar(tmp_path / "a.tar", [("./a.jpg", picture(0)), ("./b.jpg", picture(1))])))
    assert flat.classes == {} and [(r.key, r.captions) for r in everything(flat)] == [("a", ()), ("b", ())]
    classes = open_source(
        str(write_tar(tmp_path / "b.tar", [("./owl/a.jpg", picture(0)), ("./bee/b.jpg", picture(1))]))
    )
    assert classes.classes == {"class": ("bee", "owl")} and [r.labels["class"] for r in everything(classes)] == [1, 0]


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


def test_the_embedded_set():
    source, held_out = open_source("scenes"), open_source("scenes:test")
    assert isinstance(source, Source) and source.classes == CLASSES
    raw = next(source.read(source.shards[5], 48))
    assert raw.image.shape == (48, 48, 3) and len(raw.captions) == 1
    assert not set(source.shards) & set(held_out.shards)
    assert counts(open_source("scenes:test"), "shape").min() > 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing", "no data at .*missing; give a folder, tar shards"),
        ("missing-{00..03}.tar", "missing-00.tar is missing"),
        ("missing-*.tar", "no data at"),
        ("empty", "no pictures in .*empty: it should hold class folders"),
        ("empty.tar", "no pictures in .*empty.tar"),
        ("words.txt", "words.txt is not a tar shard"),
        ("broken", "metadata.jsonl, line 2: not a JSON object with"),
        ("deep", "metadata.jsonl, line 1: not a JSON object with"),
    ],
)
def test_data_that_is_not_there_is_one_clear_error(tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    (tmp_path / "words.txt").write_text("no tar")
    for name, text in (("broken", '{"file_name": "a.jpg"}\n{"text": "x"}\n'), ("deep", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path / data))


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="scenes:test"):
        open_source("scenes:train")
    with pytest.raises(ConfigError, match="annotations"):
        open_source("scenes", "a.jsonl")
    with pytest.raises(ConfigError, match="no annotation file at nowhere.jsonl"):
        open_source(str(tmp_path), "nowhere.jsonl")


def test_real_captions(shared):
    folder = shared / "data" / "captions" / "fashion"
    if not folder.is_dir():
        pytest.skip("no fashion captions")
    source = open_source(f"{folder}/fashion-test-*.tar", str(folder / "captions.jsonl"))
    raws = everything(source)
    assert len(raws) == 500 and all(r.captions and "articleType" in r.labels for r in raws)
    assert source.report == {"samples": 500}


def test_real_class_folders_in_a_shard(shared):
    folder = shared / "data" / "labelled"
    if not folder.is_dir():
        pytest.skip("no labelled pictures")
    source = open_source(str(folder / "tiny-imagenet-100-test.tar"))
    assert len(source.classes["class"]) == 100 and source.classes["class"][0] == "goldfish"
    np.testing.assert_array_equal(counts(source, "class"), [50] * 100)


def test_a_mixture_reads_as_its_parts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / f"{name}_class").mkdir(parents=True)
        (tmp_path / name / f"{name}_class" / f"{name}.jpg").write_bytes(picture(1))
    source = open_source(f"{tmp_path}/a@3::{tmp_path}/b::scenes:test@0.5")
    assert isinstance(source, Source) and source.random_access and len(source.shards) == 5_002
    assert [round(weight * 4.5, 6) for _, weight in source.parts] == [3, 1, 0.5]
    assert "class" not in source.classes and source.classes["shape"] == CLASSES["shape"]  # two sets number it apart
    raws = [raw for shard in source.shards[:3] for raw in source.read(shard)]
    assert [r.key for r in raws[:2]] == ["a_class/a.jpg", "b_class/b.jpg"] and "relation" in raws[2].labels
    assert raws[0].labels == {} and source.report == {"samples": 3}
    for wrong in ("scenes@0::scenes:test", "::scenes"):
        with pytest.raises(ConfigError, match="A@3::B@1"):
            open_source(wrong)


def test_pictures_behind_links_are_read_and_not_the_archive_that_held_them(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.jpg").write_bytes(picture(0))
    data = tmp_path / "data"
    data.mkdir()
    (data / "cat").symlink_to(tmp_path / "there")
    (data / "photos.tar.gz").write_bytes(gzip.compress(write_tar(tmp_path / "0.tar", []).read_bytes()))
    assert [raw.key for raw in everything(open_source(str(data)))] == ["cat/a.jpg"]


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
    assert "1 of the first 6 pictures have a text" in caplog.text


def test_which_files_of_a_folder_are_shards(tmp_path):
    """All shards beside a plain one; packed ones alone, whatever is hidden or listed beside them."""
    tar = write_tar(tmp_path / "one" / "0.tar", [("0.jpg", picture(0))])
    (tmp_path / "one" / "1.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / "one" / "0.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))  # the same again
    assert len(everything(open_source(str(tmp_path / "one")))) == 2
    (tmp_path / "one" / "0.tar.gz").unlink()
    tar.rename(tmp_path / "0.tar")
    (tmp_path / "one" / ".cache").mkdir()
    (tmp_path / "one" / ".cache" / "a.jpg").write_bytes(picture(0))
    (tmp_path / "one" / "logs").mkdir()
    (tmp_path / "one" / "2.tar").mkdir()
    (tmp_path / "one" / "1.tar.md5").write_text("0")
    assert open_source(str(tmp_path / "one")).shards == [str(tmp_path / "one" / "1.tar.gz")]


def test_what_img2dataset_writes(tmp_path):
    for s in range(2):
        meta = {"key": "0", "caption": "from txt", "url": "https://x", "status": "success", "width": 10}
        members = [
            (f"{s:05d}{i:04d}.{e}", d)
            for i in range(3)
            for e, d in (("jpg", picture(i)), ("txt", b"from txt"), ("json", json.dumps(meta).encode()))
        ]
        write_tar(tmp_path / f"{s:05d}.tar", members)
        (tmp_path / f"{s:05d}.parquet").write_bytes(b"a side file")
        (tmp_path / f"{s:05d}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    raws = everything(source)
    assert len(raws) == 6 and raws[0].captions == ("from txt",) and source.report == {"samples": 6}


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ConfigError, match="holds splits, not classes; name one of them, as in .*test"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path / "train")).classes == {"class": ("cat", "dog")}
