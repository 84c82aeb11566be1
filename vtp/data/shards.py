"""Tar shards, near and far: which ones a DATA string names, and their samples as webdataset groups them.

A shard that cannot be read to its end is opened again and read on behind the last sample it gave; after the last try
the rest of it is left out and counted.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import selectors
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vtp.config import ConfigError
from vtp.data.samples import IMAGE_SUFFIXES

REMOTE = re.compile(r"^(pipe|https?|s3|gs|hf|ais|ftps|sftp|scp|file):")
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz)$", re.IGNORECASE)
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how gzip, bzip2 and xz begin
RETRY_AFTER = (1.0, 5.0, 25.0)  # seconds before each new try
TIMEOUT = 60.0  # seconds without a byte from a server or a command
TRIED_FIRST = 3  # far shards, in which a first picture is looked for
MAX_BYTES = 2**28  # of a file; a picture that may be decoded has less
log = logging.getLogger(__name__)


def expand(data: str) -> list[str]:
    """Shards that a string of braces, globs and schemes stands for, in order.

    Raises:
        ConfigError: a local shard that is not there, or nothing that a glob stands for.
    """
    from webdataset.shardlists import expand_urls

    shards: list[str] = []
    for url in [data] if os.path.isfile(os.path.expanduser(data)) else expand_urls(data):
        if REMOTE.match(url):
            if url.startswith("s3://") and url.endswith("/"):  # a folder
                url = f"s3://{glob.escape(url.removeprefix('s3://'))}*"
            shards += _listed_s3(url) if url.startswith("s3://") and glob.has_magic(url) else [url]
            continue
        local = os.path.expanduser(url)
        found = sorted(glob.glob(local)) if glob.has_magic(local) and not os.path.exists(local) else [local]
        found = [file for file in found if not os.path.isdir(file)]
        found = [file for file in found if TAR.search(file)] or found  # not img2dataset's files beside them
        if not found or not os.path.isfile(found[0]):
            raise ConfigError(
                f"no data at {data}"
                + (f" ({local} is missing)" if local != data else "")
                + "; give a folder, tar shards such as 'path/{000..099}.tar', hf:NAME, or scenes"
            )
        shards += found
    full = (s for s in shards if os.path.isfile(s) and os.path.getsize(s))
    if not REMOTE.match(shards[0]) and not any(map(tarfile.is_tarfile, full)):
        raise ConfigError(f"{shards[0]} is not a tar shard; data is a folder, tar shards, hf:NAME, or scenes")
    return shards


def beside(shard: str, name: str) -> bytes | None:
    """The file of that name in a shard's folder; None where there is none, or the shard is no file.

    Raises:
        ConfigError: a server that does not answer.
    """
    place = shard.rpartition("/")[0] + "/" + name if "/" in shard else name
    if not REMOTE.match(shard):
        return Path(place).read_bytes() if os.path.isfile(place) else None
    if not shard.startswith(("http://", "https://", "s3://")):
        return None
    for pause in (*RETRY_AFTER, None):
        try:
            with _open(place) as stream:
                data = stream.read()
            return None if data.lstrip().startswith(b"<") else data  # a page; some servers say so that there is none
        except (OSError, HTTPException) as error:
            if _lasting(error):
                return None
            if pause is None:
                raise ConfigError(f"{place} cannot be asked for: {error}") from None
            time.sleep(pause)
    raise AssertionError


def unsafe(name: str) -> bool:
    """Whether a name leads out of its folder or shard."""
    return ".." in name.split("/")


def _lasting(error: Exception) -> bool:
    """Whether trying again soon is in vain: a server says that there is no such thing, or does not give it."""
    refused = isinstance(error, HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429)
    return refused or isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def members(shard: str, report: Counter[str], *, patient: bool = True) -> Iterator[dict[str, Any]]:
    """Samples of a tar, {"__key__", suffix: bytes}; what is left out is counted.

    Of a name or a key that comes again the first one counts. A connection that breaks is tried again after
    `RETRY_AFTER` if `patient`; what is not there, and a local file that is cut short, is not.
    """
    given = 0
    broken = (tarfile.TarError, OSError, EOFError, HTTPException)  # a name of this module is gone at the exit of Python
    for pause in (*(RETRY_AFTER if patient else ()), None):
        counted: Counter[str] = Counter()
        try:
            for i, sample in enumerate(_samples(shard, counted)):
                if i >= given:
                    given += 1
                    yield sample
            report.update(counted)
            return
        except broken as error:
            if pause is None or _lasting(error) or (isinstance(error, tarfile.TarError) and not REMOTE.match(shard)):
                tell(shard, given, error)
                report.update(counted)
                report["broken shard"] += 1
                return
            time.sleep(pause)


def tell(shard: str, given: int, error: Exception) -> None:
    """Name what is left out and why, in one line, once in a process."""
    _tell(shard, given, " ".join(str(error).split()))


@cache  # an epoch says it, not each
def _tell(shard: str, given: int, reason: str) -> None:
    log.warning("%s is left out behind its first %d samples: %s", shard, given, reason)


def _samples(shard: str, report: Counter[str]) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys

    def duplicate(error: Exception) -> bool:
        if not isinstance(error, ValueError):  # anything but a file name that is there twice
            raise error
        report["duplicate file"] += 1
        return True

    keys: set[str] = set()
    with _open(shard) as stream:
        tail = _Tail(stream)
        held: dict[str, Any] | None = None  # until the next begins: where a stream breaks, files of a sample may lack
        for sample in group_by_keys(_files(tail, shard, report), handler=duplicate):
            if held is not None:
                yield held
            held = None
            if sample["__key__"] in keys:
                beside = any(suffix in sample for suffix in IMAGE_SUFFIXES)
                report["duplicate key" if beside else "not beside its picture"] += 1
            else:
                keys.add(sample["__key__"])
                held = sample
    if not tail.first.startswith(PACKED) and tail.last.strip(b"\0"):
        raise tarfile.ReadError("cut short, it has no end mark")
    if held is not None:
        yield held


def _files(stream: Any, shard: str, report: Counter[str]) -> Iterator[dict[str, Any]]:
    """Files of a tar as webdataset groups them; its own reader takes one of any size into memory."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # or it would remember all of them
            name = info.name.removeprefix("./")  # as `tar cf x.tar .` writes names
            if info.isdir() or name.startswith("__MACOSX/"):  # what macOS says of files, under their names
                continue
            if not info.isreg():
                report["link or device"] += 1
            elif unsafe(name):
                report["unsafe name"] += 1
            elif info.size > MAX_BYTES:
                report["file too large"] += 1
            elif (file := tar.extractfile(info)) is not None:
                yield {"fname": name, "data": file.read(), "__url__": shard}


def _open(shard: str) -> Any:
    """A stream of a shard's bytes. webdataset's reader of https cannot time out, and it has none of s3."""
    if shard.startswith(("http://", "https://")):
        try:
            return urlopen(Request(shard, headers={"User-Agent": "vtp"}), timeout=TIMEOUT)
        except ValueError as error:
            raise ConfigError(f"{shard} is no address: {error}") from None
    if shard.startswith("s3://"):
        return _open_s3(shard)
    from webdataset.gopen import Pipe, gopen

    command = shard.removeprefix("pipe:")
    stream = gopen(shard) if command == shard else Pipe(command, mode="rb", shell=True, start_new_session=True)
    return _Output(stream) if isinstance(stream, Pipe) else stream


def _open_s3(shard: str) -> Any:
    bucket, _, key = shard.removeprefix("s3://").partition("/")
    with _s3_errors(shard):
        return _Closing(_s3(os.getpid()).get_object(Bucket=bucket, Key=key)["Body"])


def _listed_s3(pattern: str) -> list[str]:
    """The shards that a glob stands for, in order."""
    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    try:
        with _s3_errors(pattern):
            pages = (
                _s3(os.getpid())
                .get_paginator("list_objects_v2")
                .paginate(Bucket=bucket, Prefix=re.split(r"[*?[]", key)[0])
            )
            keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    except OSError as error:
        raise ConfigError(f"{pattern} cannot be listed: {error}") from None
    if key in keys:  # brackets that are its own
        return [pattern]
    keys = [k for k in keys if fnmatchcase(k, key) and k.count("/") == key.count("/") and TAR.search(k)]
    if not keys:
        raise ConfigError(f"no shards at {pattern}")
    return [f"s3://{bucket}/{k}" for k in sorted(keys)]


@contextmanager
def _s3_errors(place: str) -> Iterator[None]:
    """boto3's errors as OSError, or as ConfigError where trying again is in vain."""
    try:
        from botocore import exceptions as wrong
    except ImportError:
        raise ConfigError("reading s3:// needs boto3; pip install 'vtp[s3]'") from None
    try:
        yield
    except wrong.ClientError as error:
        missing = error.response["Error"]["Code"] in ("NoSuchKey", "NoSuchBucket", "404", "AccessDenied")
        raise (FileNotFoundError if missing else OSError)(f"{error}") from None
    except wrong.NoCredentialsError:
        raise ConfigError(f"{place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except (wrong.ProfileNotFound, wrong.PartialCredentialsError, wrong.ParamValidationError, ValueError) as error:
        raise ConfigError(f"{place}: {' '.join(str(error).split())}") from None
    except wrong.BotoCoreError as error:  # connections and time-outs
        raise OSError(f"{error}") from None


@lru_cache(maxsize=1)
def _s3(process: int) -> Any:
    """One client a process: it must not be shared over a fork."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT))


class _Closing:
    """boto3's stream as a context; its errors as OSError."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, n: int = -1) -> bytes:
        from botocore.exceptions import BotoCoreError, HTTPClientError

        try:
            return self._body.read(n)
        except (BotoCoreError, HTTPClientError) as error:
            raise OSError(f"{error}") from None

    def __enter__(self) -> _Closing:
        return self

    def __exit__(self, *_: object) -> None:
        self._body.close()


class _Output:
    """What a command writes. One that is silent for too long, or no longer read, is ended with all that it started."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe  # which waits for its command when nobody holds it
        self._process, self._stream = pipe.proc, pipe.stream
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._stream, selectors.EVENT_READ)

    def read(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            if not self._ready.select(TIMEOUT):
                raise TimeoutError(f"the command wrote nothing for {TIMEOUT:g} s")
            part = os.read(self._stream.fileno(), n - len(data))
            if part:
                data += part
            elif data or (status := self._process.wait(TIMEOUT)) in self._pipe.ignore_status:
                break
            else:
                raise OSError(f"the command ended with exit status {status}")
        return data

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._ready.close()
        self._stream.close()
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it leads no group
                self._process.kill()
        self._process.wait()


class _Tail:
    """A stream that remembers its ends: tarfile takes a shard that is cut within a header for a whole one."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.first, self.last = stream, b"", b""

    def read(self, n: int = -1) -> bytes:
        data = self._stream.read(n)
        self.first = self.first or data[:512]
        self.last = data[-512:] or self.last
        return data
