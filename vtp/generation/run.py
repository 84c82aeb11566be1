"""`vtp train-dit`: a folder of latents -> run folder with a diffusion transformer to sample from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from vtp import dist
from vtp.config import ConfigError
from vtp.engine.logging import say
from vtp.engine.loop import reseed, train
from vtp.engine.optim import pick_device, pick_precision
from vtp.engine.run_folder import open_run
from vtp.engine.speed import reuse_memory
from vtp.generation.config import DiTTrainConfig
from vtp.generation.latents import Latents
from vtp.generation.learner import DiTLearner, LatentBatches
from vtp.models.dit import DiTConfig, LightningDiT

ORCHESTRATION = ("device", "recompute", "compile", "loop")


def train_dit(cfg: DiTTrainConfig) -> Path:
    """Train to `cfg.steps`, resuming what is in `cfg.out`; returns the folder of the moving average's weights.

    That folder holds config.json, model.safetensors, and the stats.json of the latents it learned.

    Raises:
        ConfigError: latents or run folder cannot be used; said before anything is built.
        NonFiniteError: a loss became NaN or infinite; the last good checkpoint is kept.
    """
    latents = Latents(cfg.folder)
    if latents.stats.label is None:
        raise ConfigError(
            f"{cfg.folder} holds latents without labels, and a diffusion transformer learns classes: make them with "
            "`vtp latents` of class folders, of shards with KEY.cls, or with --annotations that hold a label"
        )
    if cfg.flip and not latents.stats.flip:
        raise ConfigError(f"{cfg.folder} holds no mirrored latents; set flip=false, or make them without --no-flip")
    channels, rows, _ = latents.stats.shape
    classes = len(latents.stats.classes)
    try:
        shape = DiTConfig(input_size=rows, in_channels=channels, num_classes=classes, **asdict(cfg.model))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    device = pick_device(cfg.device)
    cfg = replace(cfg, precision=pick_precision(cfg.precision, device))  # a resumed run keeps what this one took
    with open_run(cfg, "model", ignore=ORCHESTRATION) as out:
        reseed(cfg.seed, 0, 0)  # every rank starts from the same weights
        reuse_memory(device)
        learner = DiTLearner(cfg, LightningDiT(shape), latents, device)
        batches = LatentBatches(latents, cfg.batch_size, cfg.seed, cfg.flip)
        train(learner, batches, cfg.steps, cfg.seed, cfg.loop, out, title=out.name)
        if dist.is_main():
            learner.published().save_pretrained(out / "model")
            latents.stats.write(out / "model" / "stats.json")
            say(f"published {out / 'model'}")
        dist.barrier()
        return out / "model"
