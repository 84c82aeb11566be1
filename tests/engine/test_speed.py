"""What a step frees serves the next one."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from vtp.engine.speed import reuse_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert reuse_memory(torch.device("cpu"))

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.zeros(2**24)  # 64 MB: 16,384 pages of 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(3)
print(faults(5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_not_mapped_anew():
    counts = {}
    for what in ("as it is", "kept"):
        done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
        counts[what] = int(done.stdout)
    assert counts["kept"] < 1000 and counts["as it is"] > 5 * counts["kept"]
