"""How fast this machine is, and how much of it a run uses."""

from __future__ import annotations

import ctypes
import functools
import resource
import statistics
import sys
import time

import torch

from vtp.engine.optim import Precision

SLOW = 0.02  # seconds for a product of 256^3; the larger one would take a minute, as of bfloat16 in software


@functools.lru_cache
def matmul_rate(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a square matrix product in the precision of the step, measured once a process, at its start.

    That, not a data sheet's peak, is what `utilisation` is a share of: it is what this machine, as it is cooled,
    clocked and shared, can reach.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Ones would give too high a rate: what holds a GPU back is its power, and equal bits take less of it.
    generator = torch.Generator(device).manual_seed(0)

    def seconds(side: int) -> list[float]:
        x = torch.randn(side, side, device=device, dtype=dtype, generator=generator)
        out = torch.empty_like(x)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(x, x, out=out)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - start)
        return times[1:]  # the first has to warm up

    small = seconds(256)
    if min(small) > SLOW:
        return 2 * 256**3 / statistics.median(small)
    side = 8192 if device.type == "cuda" else 1024
    return 2 * side**3 / statistics.median(seconds(side))


# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def reuse_memory(device: torch.device) -> bool:
    """Have this process keep what a training step on a CPU frees, for the next step; whether the C library can (glibc).

    Left alone it gives large blocks back to the system, and each step pays for having them mapped and zeroed anew: a
    tenth of the step in benchmarks/step.py. The most memory held does not change.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))  # -1: nothing


def peak_memory() -> float:
    """Most memory held so far, GB: what torch allocated on this rank's GPU, or else this process's resident size."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
