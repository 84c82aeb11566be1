"""Crops of two sizes through shared linears (packed) beside separate calls, which are used. One JSON line a figure.

    python benchmarks/crops.py [fp32|bf16 [BATCH GLOBAL LOCAL DEVICE]]

The student's pass of self-distillation through the blocks of a ViT-S/16, forward and backward: 2 global and 8 local
crops of each of 16 images, 96 and 48 px, by default. Packed, tokens of all crops lie behind one another [rows, 384], so
that norms, linears and feed-forwards run once, and weights get one gradient; attention runs for each size. The numbers
are the same. Rounds alternate in this process; `ratio` is the median of separate over packed, above 1 where packing
wins.
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
from vtp.models.layers import Rope, SelfAttention, attention
from vtp.models.rope import rotate
from vtp.models.vit import ViT

WIDTH, DEPTH, HEADS, PATCH, LOCAL_CROPS, THREADS, ROUNDS, WARM = 384, 12, 6, 16, 8, 2, 21, 3


def attend_packed(layer: SelfAttention, x: Tensor, shapes: list[tuple[int, int]], ropes: list[Rope]) -> Tensor:
    """Self-attention of rows [n, d] that are crops of several sizes: (crops, tokens) of each."""
    seen = []
    for part, shape, rope in zip(layer.qkv(x).split([b * t for b, t in shapes]), shapes, ropes, strict=True):
        heads = part.unflatten(0, shape).unflatten(-1, (3 * HEADS, -1))
        qk, v = heads.split([2 * HEADS, HEADS], dim=2)
        qk = rotate(qk, *(table[:, None] for table in rope))
        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))
        seen.append(attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return layer.proj(torch.cat(seen))


def packed(vit: ViT, crops: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
    shapes = [(x.shape[0], x.shape[1]) for x in crops]
    x = torch.cat([c.flatten(0, 1) for c in crops])
    for block in vit.blocks:
        x = x + attend_packed(block.attn, block.norm1(x), shapes, ropes)
        x = x + block.feed(x)
    parts = x.split([b * t for b, t in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def separate(vit: ViT, crops: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
    out = []
    for x, rope in zip(crops, ropes, strict=True):
        for block in vit.blocks:
            x = block(x, rope)
        out.append(x)
    return out


def main(precision: str = "fp32", batch: str = "16", big: str = "96", small: str = "48", where: str = "cpu") -> None:
    torch.set_num_threads(THREADS)
    device = torch.device(where)
    reuse_memory(device)
    torch.manual_seed(0)
    vit = ViT(ViTConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)).to(device)
    grids = [(int(side) // PATCH, int(side) // PATCH) for side in (big, small)]
    ropes = [vit.rope_embed(grid, 1, device) for grid in grids]
    counts = [2 * int(batch), LOCAL_CROPS * int(batch)]
    crops = [
        torch.randn(count, 1 + grid[0] * grid[1], WIDTH, device=device)
        for count, grid in zip(counts, grids, strict=True)
    ]
    ways = {"packed": packed, "separate": separate}

    def once(way: str) -> tuple[float, list[Tensor]]:
        vit.zero_grad(set_to_none=True)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        inputs = [x.clone().requires_grad_() for x in crops]
        with autocast(device, precision):  # type: ignore[arg-type]
            out = ways[way](vit, inputs, ropes)
        sum(x.float().square().mean() for x in out).backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start, out

    results = {way: once(way)[1] for way in ways for _ in range(WARM)}
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 if precision == "bf16" else 1e-4)
    rounds = [{way: once(way)[0] for way in (ways if i % 2 else reversed(ways))} for i in range(ROUNDS)]
    times = {way: statistics.median(r[way] for r in rounds) for way in ways}
    ratio = statistics.median(r["separate"] / r["packed"] for r in rounds)
    name = f"crops packed, {precision}, batch {batch}, {big} and {small} px, {device.type}"
    line(name, times["packed"], "s", "separate", times["separate"], ratio, 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
