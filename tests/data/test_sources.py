"""What a DATA string opens: folders, shards, mixtures, the embedded set."""

import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from vtp.config import ConfigError
from vtp.data.samples import Source
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


def test_an_empty_caption_leaves_the_next_column(tmp_path):
    rows = [b'{"text": "", "caption": "a hill"}', b'{"text": null, "captions": ["", "two"]}', b'{"text": 3}']
    members = [(f"{i}.{e}", d) for i, row in enumerate(rows) for e, d in (("jpg", picture(i)), ("json", row))]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [raw.captions for raw in everything(source)] == [("a hill",), ("two",), ()]


def test_names_in_capitals_and_with_dashes_before_them(tmp_path):
    (tmp_path / "A.JPG").write_bytes(picture(0))
    (tmp_path / "A.TXT").write_text("a hill")
    assert [raw.captions for raw in everything(open_source(str(tmp_path)))] == [("a hill",)]
    members = [("__b.jpg", picture(0)), ("__e/f.jpg", picture(1)), ("__MACOSX/._a.jpg", b"no picture")]
    source = open_source(str(write_tar(tmp_path / "tars" / "a.tar", members)))
    assert len(everything(source)) == 2 and source.report == {"samples": 2}


def test_pictures_beside_shards_are_said_not_to_be_read(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(0))])
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "b.jpg").write_bytes(picture(1))
    assert [raw.key for raw in everything(open_source(str(tmp_path)))] == ["a"]
    assert "pictures in folders, which are not" in caplog.text


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


def test_a_file_with_braces_in_its_name(tmp_path):
    write_tar(tmp_path / "br{1..2}ace.tar", [("a.jpg", picture(0))])
    assert len(everything(open_source(str(tmp_path / "br{1..2}ace.tar")))) == 1


def test_names_as_tar_writes_them_of_a_dot(tmp_path):
    flat = open_source(str(write_tar(tmp_path / "a.tar", [("./a.jpg", picture(0)), ("./b.jpg", picture(1))])))
    assert flat.classes == {} and [(r.key, r.captions) for r in everything(flat)] == [("a", ()), ("b", ())]
    classes = open_source(
        str(write_tar(tmp_path / "b.tar", [("./owl/a.jpg", picture(0)), ("./bee/b.jpg", picture(1))]))
    )
    assert classes.classes == {"class": ("bee", "owl")} and [r.labels["class"] for r in everything(classes)] == [1, 0]


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
        ("torn", "no pictures in .*torn.* of the first 2 could not be read: 2$"),
        ("words.txt", "words.txt is not a tar shard"),
        ("broken", "metadata.jsonl, line 2: not a JSON object with"),
        ("deep", "metadata.jsonl, line 1: not a JSON object with"),
    ],
)
def test_data_that_is_not_there_is_one_clear_error(tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    (tmp_path / "words.txt").write_text("no tar")
    (tmp_path / "torn").mkdir()
    for shard in ("0.tar", "1.tar"):
        (tmp_path / "torn" / shard).write_text("no tar")
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
