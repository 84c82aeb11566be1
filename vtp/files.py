"""Which file is it: the one name of a file's contents that results, latents and cards refer to."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes, in hexadecimal: which weights a figure or a folder of latents belongs to."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
