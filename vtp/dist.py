"""Who am I among the ranks, and the few collectives the mathematics needs. On one process each is the identity."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as td
from torch import Tensor

NO_RESTART = (
    "a rank that dies will be waited for in vain: on several hosts restarts need "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment on each of them"
)
_ended: list[td.ProcessGroup | None] = []  # groups that are over; Python frees them without that lock


@contextmanager
def group() -> Iterator[None]:
    """The process group of torchrun's processes while the block runs; nothing to do for a process of its own.

    CPU tensors travel by gloo, CUDA tensors by NCCL, each rank on the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or is_distributed():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = next(td.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, which outlives the processes
        # After a restart gloo would find the addresses of those that died, were the names the same.
        store = td.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and rank == 0:
            # Each host's torchrun counts restarts for itself, torch's own names for the ranks have that count, too.
            print(NO_RESTART, file=sys.stderr, flush=True)
    td.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        # To let go of the last collective's tensors gloo's threads need the interpreter's lock: here they get it. In a
        # process that ends they would abort it. And a DDP that is freed frees with it a group that nobody else holds:
        # it waits for those threads with the lock in its hand.
        time.sleep(0.1)
        _ended.append(td.group.WORLD)
        td.destroy_process_group()


def is_distributed() -> bool:
    """Whether a process group is up."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process among all, 0 on one process."""
    return td.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return td.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """This process on its host, as torchrun says it: the index of its device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, [b, ...] -> [world * b, ...]; gradients flow back to a row's own rank."""
    if world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous(), td.group.WORLD))  # its default is the group at import


def sum_(x: Tensor) -> Tensor:
    """Sum of a tensor over ranks, in place, without gradient; returns it."""
    if world_size() > 1:
        td.all_reduce(x)
    return x


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each that this rank holds, sharing its memory; of what is not sharded, all.

    For updates of every step: DTensor keeps, for ever, how it dealt with each value of a number that changes, such as a
    learning rate, and with each plain tensor beside its own.
    """
    from torch.distributed.tensor import DTensor

    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        td.barrier()
