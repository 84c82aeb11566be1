"""What a step frees serves the next one."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from vtp.engine.speed import reuse_memory

torch.set_num_threads(1)

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.zeros(2**24)  # 64 MB: 16,384 pages of 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
before = faults(3)
assert reuse_memory(torch.device("cpu"))
faults(3)
print(before, faults(3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept = map(int, done.stdout.split())
    assert kept < 1000 and before > 5 * kept
