"""Shards from real servers on loopback that break."""

import json
import logging
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.data.test_sources import everything, picture, write_tar
from vtp.config import ConfigError
from vtp.data import shards
from vtp.data.sources import open_source


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shards, "RETRY_AFTER", (0.0, 0.0))
    monkeypatch.setattr(shards, "TIMEOUT", 0.5)


@pytest.fixture
def folder(tmp_path):
    for s in range(3):
        members = [(f"{s}{i}.{e}", d) for i in range(9) for e, d in (("jpg", picture(i)), ("txt", b"t"))]
        write_tar(tmp_path / f"{s}.tar", members)
    return tmp_path


@pytest.fixture
def server(folder):
    """A server whose `faults[path]` say for each request in turn: bytes to send before hanging up, or a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            fault = faults.get(self.path, {}).get(asked[self.path], faults.get(self.path, {}).get("always"))
            if not (folder / self.path[1:]).is_file():
                return self.send_error(404)
            data = (folder / self.path[1:]).read_bytes()
            self.send_response(fault[1] if fault and fault[0] == "status" else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: fault[1]] if fault else data)
            if fault and fault[0] == "stall":
                stalled.wait(5)

        def log_message(self, *_):
            pass

    faults, asked, stalled = {}, Counter(), threading.Event()
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.faults, running.asked = faults, asked
    running.url = f"http://127.0.0.1:{running.server_port}"
    yield running
    stalled.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def classed(folder):
    for s in range(3):
        write_tar(folder / f"{s}.tar", [(f"{s}.jpg", picture(s)), (f"{s}.cls", b"%d" % s)])
    return folder


def test_classes_far_away_are_those_that_a_file_beside_the_shards_names(classed, server):
    url = f"{server.url}/{{0..2}}.tar"
    assert open_source(url).classes == {}
    listed = [{"wnid": f"n{i}", "names": [name]} for i, name in enumerate(("bee", "owl", "newt"))]
    (classed / "classes.json").write_text(json.dumps(listed))
    server.faults["/classes.json"] = {2: ("status", 503)}
    named = open_source(url)
    assert named.classes == {"class": ("bee", "owl", "newt")} and server.asked["/classes.json"] == 3
    assert [raw.labels for raw in everything(named)] == [{"class": i} for i in range(3)]
    server.faults["/classes.json"] = {"always": ("status", 503)}
    with pytest.raises(ConfigError, match="classes.json cannot be asked for: .*503"):
        open_source(url)


@pytest.mark.parametrize("answer", ["500", "page", "Not Found", "null", '{"error": "not found"}'])
def test_what_a_server_says_of_classes_that_nothing_asks_for_is_no_error(folder, server, answer, caplog):
    """Pictures with captions, and where no classes.json is, a page that says so, or an error of the server's own."""
    about = json.dumps({"captions": ["a hill"]}).encode() if answer != "500" else b'{"caption": "a hill"}'
    write_tar(folder / "0.tar", [("0.jpg", picture(0)), ("0.json", about)])
    for name in ("classes.json", "labels.json"):
        (folder / name).write_text("\n<html>not here</html>" if answer == "page" else answer)
    server.faults["/classes.json"] = {"always": ("status", 500)} if answer == "500" else {}
    source = open_source(f"{server.url}/0.tar")
    assert source.classes == {} and [raw.captions for raw in everything(source)] == [("a hill",)]
    assert ("taken for none" in caplog.text) == (answer != "page")
    assert server.asked["/labels.json"] == (answer != "500")
    (folder / "classes.json").write_text(json.dumps([{"wnid": "owl", "names": ["owl"]}]))
    server.faults["/classes.json"] = {server.asked["/classes.json"] + 1: ("status", 503)}  # asked again
    assert open_source(f"{server.url}/0.tar").classes == {"class": ("owl",)}


def test_shards_have_classes_though_their_first_sample_has_none(folder, server):
    members = [
        (f"{i}.{e}", d) for i in range(4) for e, d in (("jpg", picture(i)), ("cls", b"owl" if i % 2 else b"bee"))
    ]
    write_tar(folder / "0.tar", [member for member in members if member[0] != "0.cls"])
    near = open_source(str(folder / "0.tar"))
    assert near.classes == {"class": ("bee", "owl")}
    assert [raw.labels for raw in everything(near)] == [{}, {"class": 1}, {"class": 0}, {"class": 1}]
    (folder / "classes.json").write_text(json.dumps([{"wnid": name, "names": [name]} for name in ("owl", "bee")]))
    far = open_source(f"{server.url}/0.tar")
    assert far.classes == {"class": ("owl", "bee")}
    assert [raw.labels for raw in everything(far)] == [{}, {"class": 0}, {"class": 1}, {"class": 0}]


def test_shards_have_classes_though_the_first_of_many_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.tars.LOOKED_AT", 4)
    for s in range(8):
        members = [(f"{s}{i}.{e}", d) for i in range(4) for e, d in (("jpg", picture(i)), ("cls", b"owl"))]
        write_tar(tmp_path / f"{s}.tar", [] if s == 0 else members[::2] if s < 4 else members)
    source = open_source(str(tmp_path))
    assert source.classes == {"class": ("owl",)}
    assert [len(raw.labels) for raw in everything(source)] == [0] * 12 + [1] * 16
    for s in range(0, 8, 2):  # those that are looked at
        write_tar(tmp_path / f"{s}.tar", [])
    assert len(everything(open_source(str(tmp_path)))) == 16


KEYS = [f"{s}{i}" for s in range(3) for i in range(9)]


@pytest.mark.parametrize("kind", ["drop", "stall"])
def test_a_connection_that_breaks_is_taken_up_behind_the_last_sample(server, kind):
    source = open_source(f"{server.url}/{{0..2}}.tar")
    server.asked.clear()
    server.faults["/1.tar"] = {1: (kind, 9_000), 2: (kind, 14_000)}
    assert [raw.key for raw in everything(source)] == KEYS
    assert source.report == {"samples": 27} and server.asked == {"/0.tar": 1, "/1.tar": 3, "/2.tar": 1}


@pytest.mark.parametrize("fault", [("status", 503), ("drop", 9_000)])
def test_a_shard_that_stays_away_is_left_out_and_named(server, fault, caplog):
    source = open_source(f"{server.url}/{{0..2}}.tar")
    server.asked.clear()
    server.faults["/1.tar"] = {"always": fault}
    with caplog.at_level(logging.WARNING):
        keys = [raw.key for raw in everything(source)]
    assert [key for key in keys if key[0] != "1"] == KEYS[:9] + KEYS[18:] and len(keys) < 27
    assert source.report["broken shard"] == 1 and server.asked["/1.tar"] == 3
    assert f"{server.url}/1.tar is left out behind its first" in caplog.text


def test_a_file_that_vanished_is_left_out(folder):
    source = open_source(str(folder))
    (folder / "1.tar").unlink()
    assert [raw.key for raw in everything(source)] == KEYS[:9] + KEYS[18:]
    assert source.report["broken shard"] == 1


def test_a_command_that_hangs_or_fails_is_ended_and_left_out(folder, tmp_path, caplog):
    hangs = f"pipe:head -c 14000 {folder}/1.tar; sleep 1000 & echo $$ $! >> {tmp_path}/pids; wait"
    fails = f"pipe:head -c 14000 {folder}/2.tar; exit 3"
    for url, reason in ((hangs, "wrote nothing for 0.5 s"), (fails, "ended with exit status 3")):
        source = open_source(url)
        caplog.clear()
        keys = [raw.key for raw in everything(source)]
        assert keys and source.report["broken shard"] == 1
        said = f"{url} is left out behind its first {len(keys)} samples: the command {reason}"
        everything(source)
        assert caplog.messages == [said]  # once
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) > 6
    for pid in pids:  # neither the shell nor what it started lives on
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_packed_shards(folder, packing):
    for s in range(3):
        with (
            tarfile.open(folder / f"{s}.tar") as tar,
            tarfile.open(folder / f"{s}.tar.{packing}", "w:" + packing) as to,
        ):
            for info in tar:
                to.addfile(info, tar.extractfile(info))
    source = open_source(f"{folder}/{{0..2}}.tar.{packing}")
    assert [raw.key for raw in everything(source)] == KEYS and source.report == {"samples": 27}
    for s in range(3):
        (folder / f"{s}.tar").unlink()
    assert open_source(str(folder)).shards == source.shards
    cut = folder / f"2.tar.{packing}"
    cut.write_bytes(cut.read_bytes()[:-200])
    source.report.clear()
    assert len(everything(source)) < 27 and source.report["broken shard"] == 1


def test_a_glob_takes_the_shards_among_other_files(folder):
    for s in range(3):
        (folder / f"{s}.parquet").write_bytes(b"a side file")
        (folder / f"{s}_stats.json").write_text("{}")
    source = open_source(f"{folder}/*")
    assert [raw.key for raw in everything(source)] == KEYS and source.report == {"samples": 27}


def test_what_a_broken_shard_lacks_is_estimated(folder):
    source = open_source(str(folder))
    (folder / "1.tar").unlink()
    everything(source)
    assert source.report == {"samples": 18, "broken shard": 1, "lost with a shard (estimated)": 9}


def test_shards_on_s3(folder, monkeypatch):
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    running = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.get_host_and_port()[1]}")
        shards._s3.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="pictures")
        for s in range(3):
            client.upload_file(str(folder / f"{s}.tar"), "pictures", f"train/{s}.tar")
        source = open_source("s3://pictures/train/{0..2}.tar")
        assert [raw.key for raw in everything(source)] == KEYS and source.report == {"samples": 27}
        with pytest.raises(ConfigError, match="no pictures in s3://pictures/typo"):
            open_source("s3://pictures/typo/{0..2}.tar")
        client.put_object(Bucket="pictures", Key="train/0.parquet", Body=b"")
        client.put_object(Bucket="pictures", Key="train/more/3.tar", Body=b"")
        assert open_source("s3://pictures/train/*.tar").shards == [f"s3://pictures/train/{s}.tar" for s in range(3)]
        assert len(open_source("s3://pictures/train/[12]*").shards) == 2
        assert len(open_source("s3://pictures/train/").shards) == 3
        client.upload_file(str(folder / "0.tar"), "pictures", "train/[1].tar")
        assert open_source("s3://pictures/train/[1].tar").shards == ["s3://pictures/train/[1].tar"]
        client.upload_file(str(folder / "0.tar"), "pictures", "x[1]/0.tar")
        assert open_source("s3://pictures/x[1]/").shards == ["s3://pictures/x[1]/0.tar"]
        with pytest.raises(ConfigError, match=r"no shards at s3://pictures/typo/\*.tar"):
            open_source("s3://pictures/typo/*.tar")
        with pytest.raises(ConfigError, match=r"s3://none/\*.tar cannot be listed: .*NoSuchBucket"):
            open_source("s3://none/*.tar")
        client.delete_object(Bucket="pictures", Key="train/1.tar")
        assert len(everything(source)) == 18 and source.report["broken shard"] == 1
        running.stop()
        source.report.clear()
        assert everything(source) == [] and source.report["broken shard"] == 3  # left out, not a traceback
        shards._s3.cache_clear()
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which remembers the key
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(folder))
        with pytest.raises(ConfigError, match="s3://pictures/train/0.tar: no credentials; set AWS_ACCESS_KEY_ID"):
            open_source("s3://pictures/train/{0..2}.tar")
        for name, value, words in (
            ("AWS_ACCESS_KEY_ID", "half", "Partial credentials"),
            ("AWS_ENDPOINT_URL", "localhost", "Invalid endpoint"),
            ("AWS_PROFILE", "typo", "typo"),
        ):
            monkeypatch.setenv(name, value)
            shards._s3.cache_clear()
            monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
            with pytest.raises(ConfigError, match=f"s3://pictures/0.tar: .*{words}"):
                open_source("s3://pictures/0.tar")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "whole")
        with pytest.raises(ConfigError, match=r"http://\[bad/0.tar is no address"):
            open_source("http://[bad/0.tar")
    finally:
        running.stop()
        shards._s3.cache_clear()


def test_a_sample_in_which_a_connection_breaks_is_read_whole(folder, server):
    """Between the picture and its text, wherever that is."""
    with tarfile.open(folder / "1.tar") as tar:
        ends = [info.offset for info in tar if info.name.endswith(".txt")]
    source = open_source(f"{server.url}/{{0..2}}.tar")
    for at in ends:
        server.asked.clear()
        server.faults["/1.tar"] = {1: ("drop", at)}
        assert [raw.captions for raw in everything(source)] == [("t",)] * 27
