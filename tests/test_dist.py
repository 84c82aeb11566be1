"""What the collectives give on two real processes, and that one process sees none of them."""

import os
import subprocess
import sys

import torch

from vtp import dist


def test_one_process_is_the_identity():
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    assert (dist.rank(), dist.world_size(), dist.is_main(), dist.is_distributed()) == (0, 1, True, False)
    assert dist.gather(x) is x
    assert dist.sum_(x) is x
    dist.barrier()


def test_local_rank_is_torchruns(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert dist.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dist.local_rank() == 3


def who(rank):
    assert rank == dist.rank()
    dist.barrier()
    return dist.rank(), dist.world_size(), dist.is_main()


def test_ranks_know_themselves(two_ranks):
    assert two_ranks(who) == [(0, 2, True), (1, 2, False)]


def share_of_loss(rank, x, weight):
    """This rank's rows of a loss that compares every row with every row: its value and the gradient of its rows."""
    rows = x.chunk(2)[rank].clone().requires_grad_()
    everyone = dist.gather(rows)
    loss = ((rows @ everyone.T) * weight.chunk(2)[rank]).sum()
    loss.backward()
    return everyone.detach(), rows.grad


def test_gather_is_in_rank_order_and_differentiable(two_ranks):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 4), (6, 6)))
    whole = x.clone().requires_grad_()
    ((whole @ whole.T) * weight).sum().backward()
    parts = two_ranks(share_of_loss, x, weight)
    for everyone, _ in parts:
        assert torch.equal(everyone, x)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole.grad)


def gather_a_view(rank):
    return dist.gather(torch.arange(6.0).view(2, 3).T + rank)


def test_gather_takes_views(two_ranks):
    rows = torch.arange(6.0).view(2, 3).T
    for everyone in two_ranks(gather_a_view):
        assert torch.equal(everyone, torch.cat([rows, rows + 1]))


def summed(rank):
    x = torch.tensor([1.0, 10.0]) * (rank + 1)
    return dist.sum_(x), x


def test_sum_is_over_ranks_and_in_place(two_ranks):
    for total, x in two_ranks(summed):
        assert total.tolist() == x.tolist() == [3.0, 30.0]


OUTLIVED = """
import os
import os
import subprocess
import sys

import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel
from vtp import dist

for i in range(8):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # a name of its own for each group
    with dist.group():
        model = DistributedDataParallel(torch.nn.Linear(300, 300))
        x = [torch.zeros(1000) for _ in range(100)]
        work = [td.all_reduce(t, async_op=True) for t in x]
        for each in work:
            each.wait()
        del work, each
    del model
"""


def test_a_model_may_outlive_its_group():
    """As it does when an error or a signal ends a run; its last moments were a deadlock with one of gloo's threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    words = [sys.executable, *launcher, sys.executable, "-c", OUTLIVED]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
