"""bf16 autocast against fp32: images per second of the joint step, alternating in one process, as JSON lines.

    python benchmarks/precision.py [RECIPE=cpu] [key=value ...]

The model is the paper's VTP-S in shape at 96 px by default (narrower toys are bound by overhead, not by arithmetic).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace

import torch

from vtp import config
from vtp.data.batches import Batch
from vtp.data.loader import Loader
from vtp.data.sources import open_source
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.learner import PretrainLearner
from vtp.recipes import pretrain_recipe
from vtp.tokenizers import get_tokenizer

SMALL_96 = (
    "data=scenes",
    "model.image_size=96",
    "model.text.embed_dim=384",
    "model.text.num_heads=6",
    "views.size=96",
    "views.global_size=96",
    "views.local_size=48",
    "batch.clip=16",
    "batch.ssl=16",
    "batch.rec=16",
    "distil.prototypes=8192",
    "perceptual=teacher",
    "workers=0",
)
ROUNDS = 3


def seconds(learner: PretrainLearner, batch: Batch) -> float:
    start = time.perf_counter()
    float(learner.step(batch, 0)["total"])
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    recipe = argv[0] if argv else None
    overrides = argv[1:] if recipe else [*SMALL_96]
    cfg: PretrainConfig = config.merge(pretrain_recipe(recipe or "small"), overrides)
    tokenizer = get_tokenizer(context_length=cfg.model.text.context_length) if cfg.weights.clip > 0 else None
    loader = Loader(
        open_source(cfg.data, cfg.annotations),
        cfg.views,
        cfg.active_batch,
        tokenizer,
        patch_size=cfg.model.vision.patch_size,
    )
    batch = next(loader)
    learners = {p: PretrainLearner(replace(cfg, precision=p), torch.device("cpu")) for p in ("fp32", "bf16")}
    for learner in learners.values():
        seconds(learner, batch)
    times = {p: [] for p in learners}
    for _ in range(ROUNDS):
        for precision, learner in learners.items():
            times[precision].append(seconds(learner, batch))
    rate = {p: cfg.active_batch.pairs / statistics.median(t) for p, t in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["fp32"], times["bf16"], strict=True))
    line = {"name": f"joint step, {recipe or 'small at 96 px'}, bf16 autocast", "value": round(rate["bf16"], 2)}
    line |= {"unit": "images/s", "peer": "fp32", "peer_value": round(rate["fp32"], 2), "ratio": round(ratio, 2)}
    print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
