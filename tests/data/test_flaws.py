"""What is wrong with samples, names and files: each is survived, and counted by its reason."""

import io
import json
import os
import tarfile

import pytest

from tests.data.test_sources import everything, picture, write_tar
from vtp.data import shards
from vtp.data.samples import kept, left_out
from vtp.data.sources import open_source


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
