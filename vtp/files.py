"""Files: the one name of their contents that results, latents and cards refer to, who may read them, and the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, what a file may hold; Python names no file then


def path_of(text: str) -> Path:
    """The path that a word stands for: ~ is home, which few shells write out in out=~/x (an unknown user's stays)."""
    return Path(os.path.expanduser(text))


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, by links and mounts too."""
    return one.is_dir() and other.is_dir() and one.samefile(other)


def write_text(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be; of a full disk too it names the file.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def to_disk(path: Path) -> None:
    """Have a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes, in hexadecimal: which weights a figure or a folder of latents belongs to."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def as_new(file: Path) -> None:
    """Give a file the permissions that the umask gives to new ones: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
