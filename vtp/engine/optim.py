"""AdamW with weight decay on matrices only, its two schedules, and the autocast under which a step runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vtp import dist
from vtp.config import ConfigError, within
from vtp.engine.logging import say
from vtp.schedules import Ramp, WarmupCosine

Precision = Literal["fp32", "bf16"]
Asked = Literal["auto", "fp32", "bf16"]
NORMED = 2**20  # values whose squares are added up at a time
BF16_CPU = ("avx512_bf16", "amx_bf16", "bf16")  # the last is ARM's


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. Schedules are functions of images seen over images in the run."""

    lr: WarmupCosine = WarmupCosine(peak=1e-3)
    weight_decay: Ramp = Ramp(start=0.04, end=0.2, cosine=True)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_grad: float = 1.0  # largest global gradient norm; 0 clips nothing

    def __post_init__(self) -> None:
        within(self, "lr.peak lr.end weight_decay.start weight_decay.end clip_grad", 0)
        within(self, "betas", 0, 1, below=True)
        within(self, "eps", 0, above=True)


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over named parameters: matrices decay; vectors, scalars and the class and mask tokens do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    decay = [p for name, p in named if p.squeeze().ndim >= 2]
    rest = [p for name, p in named if p.squeeze().ndim < 2]
    groups = [{"params": decay, "decay": 1.0}, {"params": rest, "decay": 0.0}]
    return _AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0, fused=True)


class _AdamW(torch.optim.AdamW):
    """torch's, on the shards that a rank holds instead of on DTensors; see `dist.shards`."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = dist.shards(tensors)
        return is_complex


def set_schedule(optimizer: torch.optim.Optimizer, cfg: OptimConfig, images: int, total: int) -> float:
    """Put this moment's learning rate and weight decay into the optimiser; returns the learning rate."""
    lr, weight_decay = cfg.lr(images, total), cfg.weight_decay(images, total)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, weight_decay * group["decay"]
    return lr


def update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip_grad: float) -> Tensor:
    """Clip the global gradient norm, step, clear; returns the norm before clipping.

    Where the norm is not finite nothing is learned: AdamW leaves parameters and moments as they are, and nothing waits
    for the device to know.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm([g for g in grads if not isinstance(g, DTensor)])
    if sharded := dist.shards(g for g in grads if isinstance(g, DTensor)):
        norm = (norm.square() + dist.sum_(_total_norm(sharded).square())).sqrt()
    # AdamW's fused kernel reads both: it divides the gradients by the one, and does nothing where the other is 1.
    if clip_grad > 0:
        optimizer.grad_scale = ((norm + 1e-6) / clip_grad).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    if not grads or grads[0].device.type != "cpu":
        return nn.utils.get_total_norm(grads)
    # On a CPU torch's norm of one tensor of 20 million values errs by 1e-3, a dot product of all by 3e-4 (MKL on AMD),
    # dot products of a million each by 4e-6, in about the time of the first.
    return torch.stack([torch.dot(part, part) for g in grads for part in g.flatten().split(NORMED)]).sum().sqrt()


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """AdamW's state by parameter name, for a checkpoint to be saved from or filled in place; made if not there yet."""
    state: dict[str, Any] = {}
    for name, p in parameters:
        if not optimizer.state[p]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        state[name] = dict(optimizer.state[p])
    return state


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; elsewhere torch does it in software, some 100 times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(able.get(name) for name in BF16_CPU)


@functools.cache  # says what it has to say once
def pick_precision(asked: Asked, device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies it itself, else fp32, as on most laptops' processors."""
    if asked == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if asked == "bf16" and not has_bf16(device):
        say(f"precision=bf16: this {device.type} multiplies bfloat16 in software, many times slower than fp32")
    return asked


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def inference(
    function: Callable[[Tensor], Tensor], device: torch.device, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """The same function of a tensor on any device, without gradients, under autocast; float32 on `device` out."""

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return function(x.to(device)).float()

    return call


def pick_device(name: str) -> torch.device:
    """`auto` is this rank's GPU where there is one, else the CPU.

    Raises:
        ConfigError: a device that torch does not know, or that is not there.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(1, device=device).item()  # where there is memory; on meta there is none
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]  # what follows is for who builds torch
            raise ConfigError(f"device={name} cannot be used ({reason}); use auto, cpu or cuda") from None
        return device
    return torch.device("cuda", dist.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
