"""How a joint step's time and memory grow, one JSON line a point; with a file name, also a plot.

    python benchmarks/cost.py [PLOT.png]

A ViT of 192 x 6 with patch 16, text tower and decoder alike, fp32 on 2 threads (one a rank where there are two), all
objectives. Around one setting (64 px, 8 images for each objective, 4 local crops of 32 px, 2,048 prototypes) one thing
is changed at a time; micro-batches are of 128 image-text pairs beside 8 images for the others, not in the plot.
All points are measured in three passes, each in a process of its own: seconds are those of the
fastest of 3 x 12 steps (a shared machine is slow for a minute at a time), memory is what the steps add to the process's
resident size before the first, the median of the three (Linux).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from figures import watch_peak

MICRO, PAIRS = "micro-batch of 128 pairs", 128
BASE = {"batch": 8, "image side": 64, "local crops": 4, "prototypes": 2048, "ranks": 1, MICRO: 0}
SWEEPS = {
    "batch": (4, 8, 16, 32),
    "image side": (32, 64, 96, 128),
    "local crops": (0, 4, 8, 12),
    "prototypes": (2048, 8192, 32768, 65536),
    "ranks": (1, 2),
    MICRO: (128, 32, 8),
}
LABELS = {
    "batch": "images for each objective, a rank",
    "image side": "side of views, pixels",
    "local crops": "local crops an image",
    "prototypes": "prototypes (k: 1,024)",
    "ranks": "ranks, batch as before on each",
}
STEPS, PASSES = 12, 3


def point(setting: dict[str, int]) -> None:
    """Print seconds a step and MB of one setting; run by every rank."""
    from dataclasses import replace

    import torch

    from vtp import dist
    from vtp.data.augment import finish
    from vtp.data.loader import Loader
    from vtp.data.sources import open_source
    from vtp.data.views import BatchConfig, ViewsConfig
    from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
    from vtp.pretrain.learner import PretrainLearner
    from vtp.recipes import pretrain_recipe
    from vtp.tokenizers import get_tokenizer

    torch.set_num_threads(2 // setting["ranks"])
    size, side = setting["batch"], setting["image side"]
    shape = {"embed_dim": 192, "depth": 6, "num_heads": 3}
    cfg = pretrain_recipe("cpu")
    cfg = replace(
        cfg,
        precision="fp32",
        model=ModelConfig(
            image_size=side, vision=ViTConfig(**shape), text=TextConfig(**shape), decoder=DecoderConfig(**shape)
        ),
        batch=BatchConfig(clip=PAIRS if setting[MICRO] else size, ssl=size, rec=size),
        parallel=replace(cfg.parallel, micro_batch=setting[MICRO]),
        views=ViewsConfig(size=side, global_size=side, local_size=side // 2, local_crops=setting["local crops"]),
        distil=replace(cfg.distil, prototypes=setting["prototypes"], head_hidden=512, head_bottleneck=128),
    )
    with dist.group():
        tokenizer = get_tokenizer()
        loader = Loader(open_source("scenes"), cfg.views, cfg.batch, tokenizer, patch_size=16)
        batch = finish(next(loader), cfg.augment, torch.default_generator)
        learner = PretrainLearner(cfg, torch.device("cpu"))
        added, times = watch_peak(), []
        for i in range(STEPS):
            dist.barrier()
            start = time.perf_counter()
            learner.learn(batch, i)
            times.append(time.perf_counter() - start)
        if dist.is_main():
            print(json.dumps([min(times), added()]))


def measure(setting: dict[str, int]) -> tuple[float, float]:
    """(seconds a step, MB) in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting["ranks"])]
    program = [__file__, "point", json.dumps(setting)]
    words = [*launcher, *program] if setting["ranks"] > 1 else program
    here = {**os.environ, "OMP_NUM_THREADS": "1" if setting["ranks"] > 1 else "2"}
    done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True, env=here)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def draw(found: dict[str, list[tuple[int, float, float]]], file: str) -> None:
    """Time (left axis) and memory (right axis) against each thing changed; both axes start at 0 and are shared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.subplots(2, 3)
    most = [1.08 * max(row[i] for rows in found.values() for row in rows) for i in (1, 2)]
    time_colour, memory_colour = "#1f5fa8", "#b3541e"
    for axes, (name, rows) in zip(grid.flat, found.items(), strict=False):
        x, seconds, megabytes = zip(*rows, strict=True)
        other = axes.twinx()
        axes.plot(x, [1e3 * s for s in seconds], "o-", color=time_colour, label="time")
        other.plot(x, megabytes, "s--", color=memory_colour, label="memory")
        axes.set_ylim(0, 1e3 * most[0])
        other.set_ylim(0, most[1])
        axes.set_xlim(0, 1.08 * max(x))
        axes.set_xticks(x, [f"{v // 1024}k" if v >= 1024 else str(v) for v in x])
        axes.set_xlabel(LABELS[name])
        axes.set_ylabel("ms a step", color=time_colour)
        other.set_ylabel("MB added, a rank", color=memory_colour)
        for each in (axes, other):
            each.spines["top"].set_visible(False)
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    blank = grid.flat[-1]
    blank.axis("off")
    blank.plot([], [], "o-", color=time_colour, label="time (left axis)")
    blank.plot([], [], "s--", color=memory_colour, label="memory (right axis)")
    blank.legend(loc="center", frameon=False)
    figure.savefig(file, dpi=110)


def main(argv: list[str]) -> None:
    if argv[:1] == ["point"]:
        return point(json.loads(argv[1]))
    settings = {json.dumps(BASE | {name: value}): BASE | {name: value} for name in SWEEPS for value in SWEEPS[name]}
    passes = [{key: measure(setting) for key, setting in settings.items()} for _ in range(PASSES)]
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, values in SWEEPS.items():
        for value in values:
            times, sizes = zip(*(known[json.dumps(BASE | {name: value})] for known in passes), strict=True)
            seconds, megabytes = min(times), statistics.median(sizes)
            found.setdefault(name, []).append((value, seconds, megabytes))
            record = {"name": f"joint step, {name} {value}", "value": round(seconds, 4), "unit": "s"}
            print(json.dumps(record | {"memory_mb": round(megabytes)}), flush=True)
    if argv:
        draw({name: rows for name, rows in found.items() if name in LABELS}, argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
