"""Shared fixtures. Shapes in annotations are checked at run time while tests run."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

from jaxtyping import install_import_hook

install_import_hook("vtp", "beartype.beartype")

import pytest  # noqa: E402

SHARED = Path(os.environ.get("VTP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def sigterm_as_it_was() -> Iterator[None]:
    """A run that was stopped leaves it ignored, which a test's children would inherit."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Parity data and real images that are not part of the project; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: set VTP_SHARED to the folder with fixtures/ and data/")
    return SHARED


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """two_ranks(function, *arguments) -> [function(0, *arguments), function(1, *arguments)], on two gloo processes.

    `function` stands at the top of a test module; what it takes and returns can be pickled (tensors: detached).
    The processes live as long as the tests; each call has a group of its own, which meets by a file, not by a port.
    """
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(2)]

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        store = tmp_path_factory.mktemp("ranks") / "store"
        jobs = [pool.submit(_on_rank, rank, store, function, arguments) for rank, pool in enumerate(pools)]
        return [job.result(timeout=120) for job in jobs]

    yield run
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def _on_rank(rank: int, store: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as td

    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return function(rank, *arguments)
    finally:
        td.destroy_process_group()  # a rank that fails takes the other out of its collective
