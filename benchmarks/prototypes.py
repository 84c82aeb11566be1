"""DINO and iBOT in chunks beside the plain losses, from tokens to gradients. One JSON line a figure.

    python benchmarks/prototypes.py [fp32|bf16 [TOKENS PROTOTYPES DEVICE]]

8,192 tokens of the student by default (96 images of 2 + 8 crops, all other tokens masked patches) at 65,536
prototypes, on the GPU where there is one, else on 2 cores. Both are the methods of `Pretraining`, with a head of one
small layer, so that prototypes and losses are all there is; Sinkhorn balances the teacher. Times are medians of rounds
that alternate in this process, ratios medians of the rounds' ratios. Memory is what one pass adds to the peak of a
fresh process (on a CPU: of Linux; the plain losses take 8 GB).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from figures import line, watch_peak
from torch import Tensor

from vtp.data.batches import SSLBatch
from vtp.engine.optim import autocast
from vtp.models.config import ModelConfig, TextConfig, ViTConfig
from vtp.pretrain.config import DistilConfig, PretrainConfig, Weights
from vtp.pretrain.objectives import Pretraining

TOKENS, PROTOTYPES, THREADS, ROUNDS = 8_192, 65_536, 2, 3
IMAGES, LOCAL, PATCHES = 96, 8, 256
WIDTH = 32  # of the head's input
PLAIN = "plain losses"


def setting(tokens: int, prototypes: int, device: str) -> tuple[Pretraining, Tensor, Tensor, SSLBatch]:
    """(model, rows of the student, rows of the teacher, the batch they come from)"""
    torch.manual_seed(0)
    cfg = PretrainConfig(
        model=ModelConfig(vision=ViTConfig(embed_dim=WIDTH, depth=1, num_heads=1), text=TextConfig(vocab_size=8)),
        weights=Weights(clip=0, rec=0),
        distil=DistilConfig(prototypes=prototypes, head_layers=1),
    )
    model = Pretraining(cfg).to(device)
    images = max(2, IMAGES * tokens // TOKENS)
    n_cls, n_local = 2 * images, LOCAL * images
    masked = tokens - n_cls - n_local
    masks = torch.zeros(2 * images * PATCHES, dtype=torch.bool, device=device)
    masks[:masked] = True
    ssl = SSLBatch(
        torch.empty(2, images, 3, 1, 1),
        torch.empty(LOCAL, images, 3, 1, 1),
        masks.view(2, images, PATCHES),
        masks.nonzero().flatten(),
        torch.full((masked,), 2 * images / masked, device=device),
    )
    student = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    return model, student, torch.randn(n_cls + masked, WIDTH, device=device), ssl


def once(which: str, precision: str, model: Pretraining, student: Tensor, teacher: Tensor, ssl: SSLBatch) -> Tensor:
    """Forward and backward of the plain losses or of ours; the losses and all gradients in one vector."""
    compare = model._compare_in_chunks if which == "ours" else model._compare
    with autocast(student.device, precision):
        dino, ibot, *_ = compare(student, teacher, ssl, 0.04)
    leaves = [student, *model.head.parameters()]
    grads = torch.autograd.grad(dino + ibot, leaves)
    return torch.cat([torch.stack([dino, ibot]), *(g.flatten() for g in grads)]).detach()


def seconds(which: str, precision: str, given: tuple) -> float:
    wait = torch.cuda.synchronize if given[1].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    once(which, precision, *given)
    wait()
    return time.perf_counter() - start


def memory(which: str, precision: str, given: tuple) -> float:
    """MB that one pass adds to the peak of this process."""
    if given[1].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(which, precision, *given)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    added = watch_peak()
    once(which, precision, *given)
    return added()


def fresh(which: str, precision: str, size: list[str]) -> float:
    command = [sys.executable, __file__, precision, *size, which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check(precision: str, given: tuple) -> None:
    ours, plain = (once(which, precision, *given) for which in ("ours", "plain"))
    error = ((ours - plain).norm() / plain.norm()).item()
    if error > {"fp32": 1e-5, "bf16": 0.03}[precision]:
        raise SystemExit(f"{precision}: losses and gradients differ by {error:.1e} of their norm; that is not rounding")


def main() -> None:
    torch.set_num_threads(THREADS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = sys.argv[2:5] or [str(TOKENS), str(PROTOTYPES), device]
    tokens, prototypes, device = int(size[0]), int(size[1]), size[2]
    if len(sys.argv) > 5:
        return print(memory(sys.argv[5], sys.argv[1], setting(tokens, prototypes, device)))
    for precision in sys.argv[1:2] or ("fp32", "bf16"):
        name = f"DINO + iBOT, {tokens:,} tokens, {prototypes:,} prototypes, {device}, {precision}"
        ours, plain = (fresh(which, precision, size) for which in ("ours", "plain"))
        line(f"{name}, peak memory added", ours, "MB", PLAIN, plain, plain / ours)
        check(precision, setting(max(64, tokens // 32), prototypes // 32, device))
        given = setting(tokens, prototypes, device)
        measure = partial(seconds, precision=precision, given=given)
        rounds = [(measure("ours"), measure("plain")) for _ in range(ROUNDS)]
        ours, plain = (statistics.median(times) for times in zip(*rounds, strict=True))
        line(f"{name}, forward and backward", ours, "s", PLAIN, plain, statistics.median(b / a for a, b in rounds))


if __name__ == "__main__":
    main()
