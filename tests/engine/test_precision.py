"""bf16 is taken by itself only where the device multiplies it itself: elsewhere it is a hundred times slower."""

import time

import pytest
import torch

from vtp.engine import optim
from vtp.engine.optim import pick_precision
from vtp.engine.speed import matmul_rate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    pick_precision.cache_clear()
    yield
    pick_precision.cache_clear()


@pytest.mark.parametrize(
    ("able", "mkldnn", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, True, "fp32"),
        ({"avx512_bf16": True}, True, "bf16"),
        ({"amx_bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, False, "fp32"),  # a Mac: torch has no kernel that uses it
    ],
)
def test_auto_asks_the_processor(monkeypatch, able, mkldnn, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert pick_precision("auto", CPU) == expected


def test_matmul_rate_is_a_rate_of_values_as_a_step_has_them(monkeypatch):
    seen, product, state = [], torch.mm, torch.get_rng_state()
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a) or product(a, b, out=out))
    matmul_rate.cache_clear()
    assert 1e9 < matmul_rate(CPU, "fp32") < 1e14
    assert len(seen[-1]) == 1024 and 0.9 < seen[-1].std() < 1.1  # a GPU is faster with equal ones
    assert torch.equal(torch.get_rng_state(), state)


def test_matmul_rate_does_not_wait_for_a_slow_product(monkeypatch):
    seen, product = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: seen.append(len(a)) or time.sleep(0.06) or product(a, b, out=out)
    )
    matmul_rate.cache_clear()
    assert 0 < matmul_rate(CPU, "bf16") < 2 * 256**3 / 0.06
    assert max(seen) == 256 and len(seen) == 6
    matmul_rate.cache_clear()


def test_bf16_in_software_is_done_but_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(optim, "has_bf16", lambda device: False)
    monkeypatch.setattr(optim, "say", said.append)
    assert {pick_precision("bf16", CPU) for _ in range(3)} == {"bf16"}
    assert len(said) == 1 and "slower than fp32" in said[0]
