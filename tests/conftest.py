"""Shared fixtures. Shapes in annotations are checked at run time while tests run."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

from jaxtyping import install_import_hook

install_import_hook("vtp", "beartype.beartype")

import pytest  # noqa: E402

SHARED = Path(os.environ.get("VTP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Parity data and real images that are not part of the project; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: set VTP_SHARED to the folder with fixtures/ and data/")
    return SHARED
