"""Crops of two sizes through shared linears, as the step has them, beside a call for each size. One JSON line.

    python benchmarks/crops.py [fp32|bf16 [BATCH GLOBAL LOCAL DEVICE [compile]]]

The student's pass of self-distillation through the trunk of a ViT-S/16, forward and backward: 2 global and 8 local
crops of each of 16 images, 96 and 48 px, by default. The numbers are the same. Rounds alternate in this process;
`ratio` is the median of separate over packed, above 1 where packing wins.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from figures import line
from torch import Tensor

from vtp.engine.optim import autocast
from vtp.engine.speed import reuse_memory
from vtp.models.config import ViTConfig
from vtp.models.vit import ViT

LOCAL_CROPS, THREADS, ROUNDS, WARM = 8, 2, 21, 3


def packed(vit: ViT, crops: list[Tensor]) -> Tensor:
    return vit.read(crops)


def separate(vit: ViT, crops: list[Tensor]) -> Tensor:
    return torch.cat([vit.read([x]) for x in crops])


def main(
    precision: str = "fp32",
    batch: str = "16",
    big: str = "96",
    small: str = "48",
    where: str = "cpu",
    compiled: str = "",
) -> None:
    torch.set_num_threads(THREADS)
    device = torch.device(where)
    reuse_memory(device)
    torch.manual_seed(0)
    vit = ViT(ViTConfig(embed_dim=384, depth=12, num_heads=6)).to(device)
    assert compiled in ("", "compile"), f"compile, or nothing, instead of {compiled}"
    if compiled:
        for block in vit.blocks:
            block.compile()
    sizes = ((2, int(big)), (LOCAL_CROPS, int(small)))
    crops = [torch.randn(count * int(batch), 3, side, side, device=device) for count, side in sizes]
    ways = {"packed": packed, "separate": separate}

    def once(way: str) -> tuple[float, Tensor]:
        vit.zero_grad(set_to_none=True)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        with autocast(device, precision):  # type: ignore[arg-type]
            out = ways[way](vit, crops)
        out.float().square().mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start, out

    results = {way: once(way)[1] for way in ways for _ in range(WARM)}
    one, other = (out.detach().double() for out in results.values())
    error = float((one - other).norm() / one.norm())
    assert error < (2e-2 if precision == "bf16" else 1e-5), f"the two differ by {error}"
    rounds = [{way: once(way)[0] for way in (ways if i % 2 else reversed(ways))} for i in range(ROUNDS)]
    times = {way: statistics.median(r[way] for r in rounds) for way in ways}
    ratio = statistics.median(r["separate"] / r["packed"] for r in rounds)
    name = f"crops packed, {precision}{compiled and ', compiled'}, batch {batch}, {big} and {small} px, {device.type}"
    line(name, times["packed"], "s", "separate", times["separate"], ratio, 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
