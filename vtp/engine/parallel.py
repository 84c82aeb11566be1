"""Recompute, compile, shard: what is done to a model from outside, in this one place and in this order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vtp import dist
from vtp.config import within
from vtp.engine.optim import Precision

# Blocks of all parts are one function to the compiler. It compiles that anew for each kind of block, shape and gradient
# mode, and would run what is beyond its limit (8) uncompiled.
VARIANTS = 64


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid over time and ranks. None of it changes what is learned, beyond rounding."""

    shard: bool = False  # several ranks: parameters, gradients and moments split (FSDP2) instead of copied (DDP)
    recompute: bool = False  # activations computed again in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile, block by block
    micro_batch: int = 0  # image-text pairs a rank embeds at a time (gradient caching); 0: all of batch.clip

    def __post_init__(self) -> None:
        within(self, "micro_batch", 0)


def parallelise(
    module: nn.Module, blocks: Sequence[nn.Module], cfg: ParallelConfig, device: torch.device, precision: Precision
) -> nn.Module:
    """Prepare a module whose `forward` is the whole step; returns what is to be called in its place.

    Args:
        module: equal on all ranks; changed in place, its parameters keep their names. Frozen ones (a teacher) are
            sharded like the others.
        blocks: the repeated parts: each is recomputed, compiled and gathered on its own.
    """
    shard = cfg.shard and dist.world_size() > 1
    scalars = {p for p in module.parameters() if p.ndim == 0}  # fully_shard takes none
    mesh = init_device_mesh(device.type, (dist.world_size(),)) if shard else None
    if cfg.compile:
        torch._dynamo.config.recompile_limit = VARIANTS
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    for block in blocks:
        if cfg.recompute:
            marked: Any = block
            marked.gradient_checkpointing = True
            marked._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if cfg.compile:
            block.compile()
        if shard:
            # Where the bytes are they travel as bfloat16; inputs stay as they are, for the residual stream is float32,
            # which a CPU's norms do not take beside weights in bfloat16.
            low = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if precision == "bf16" and device.type != "cpu" else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            )
            fully_shard(block, mesh=mesh, mp_policy=low)
    if shard:
        fully_shard(module, mesh=mesh, ignored_params=scalars)
        for scalar in scalars:
            if scalar.requires_grad:
                scalar.register_post_accumulate_grad_hook(_average)
        return module
    if dist.world_size() > 1:
        devices = None if device.type == "cpu" else [device]
        # What buffers hold is summed over ranks where it is made: nothing to broadcast.
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
    return module


def _average(scalar: Tensor) -> None:
    assert scalar.grad is not None
    td.all_reduce(scalar.grad)
    scalar.grad /= dist.world_size()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with shards put together; every rank must call this."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
