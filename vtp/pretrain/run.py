"""`vtp pretrain`: configuration -> run folder with a published tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vtp import dist
from vtp.config import ConfigError
from vtp.data.loader import Loader
from vtp.data.samples import in_vain, kept
from vtp.data.sources import open_source
from vtp.engine.checkpoint import CheckpointError
from vtp.engine.logging import say
from vtp.engine.loop import reseed, train
from vtp.engine.optim import pick_device, pick_precision
from vtp.engine.parallel import whole
from vtp.engine.run_folder import open_run
from vtp.engine.speed import reuse_memory
from vtp.files import path_of
from vtp.models.vtp_hf import publish
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.learner import PretrainLearner
from vtp.tokenizers import get_tokenizer

DATA = ("data", "ssl_data", "rec_data")
ORCHESTRATION = ("publish", "workers", "device", "parallel", "loop")


def pretrain(cfg: PretrainConfig) -> Path:
    """Train to `cfg.steps`, resuming what is in `cfg.out`; returns the published tokenizer's folder.

    Raises:
        ConfigError: data, views or run folder cannot be used; said before anything is built.
        NonFiniteError: a loss became NaN or infinite; the last good checkpoint is kept.
        CheckpointError: a checkpoint or the tokenizer cannot be written, or none of those there be read.
    """
    device = pick_device(cfg.device)
    cfg = replace(cfg, precision=pick_precision(cfg.precision, device))  # a resumed run keeps what this one took
    loader = open_loader(cfg, device, path_of(cfg.out))
    with open_run(cfg, "tokenizer", ignore=ORCHESTRATION) as out:
        reseed(cfg.seed, 0, 0)  # every rank starts from the same weights
        reuse_memory(device)
        learner = PretrainLearner(cfg, device)
        try:
            train(learner, loader, cfg.steps, cfg.seed, cfg.loop, out, title=out.name)
        finally:  # an interrupted run reports as well
            _report_broken(loader, cfg, out / "data.json")
        weights = whole(learner.objectives.published(cfg.publish))
        if dist.is_main():
            try:
                publish(learner.objectives.student, out / "tokenizer", weights)
            except SafetensorError as error:  # a full disk
                raise CheckpointError(
                    f"{out / 'tokenizer'} could not be written ({error}); the checkpoints are whole: make room, and "
                    "the same command publishes"
                ) from None
            say(f"published {out / 'tokenizer'}")
        dist.barrier()
        return out / "tokenizer"


def open_loader(cfg: PretrainConfig, device: torch.device, out: Path) -> Loader:
    """The batches of a run.

    Raises:
        ConfigError: data or views cannot be used, or `out`, which will be written to, is where data are.
    """
    if cfg.model.image_size != cfg.views.size:
        raise ConfigError(
            f"model.image_size={cfg.model.image_size} is not views.size={cfg.views.size}; make them equal"
        )
    source = open_source(cfg.data, cfg.annotations)
    others = {k: open_source(v) for k, v in (("ssl", cfg.ssl_data), ("rec", cfg.rec_data)) if v is not None}
    if any(each.keeps(Path(os.path.realpath(out))) for each in (source, *others.values())):
        raise ConfigError(
            f"{out} is where data are; name a folder for the run alone (a run that is there may be moved)"
        )
    tokenizer = get_tokenizer(context_length=cfg.model.text.context_length) if cfg.weights.clip > 0 else None
    return Loader(
        source,
        cfg.views,
        cfg.active_batch,
        tokenizer,
        patch_size=cfg.model.vision.patch_size,
        seed=cfg.seed,
        workers=cfg.workers,
        pin_memory=device.type == "cuda",
        anew=cfg.resume == "anyway",
        others=others,
    )


def _report_broken(loader: Loader, cfg: PretrainConfig, file: Path) -> None:
    """Write data.json: how often samples were read since the run began, how often in vain, how often with a flaw.

    A broken sample counts in each epoch that meets it. With several ranks the counts are those of the last checkpoint.
    """
    data: dict[str, Any] = {name: given for name in DATA if (given := getattr(cfg, name)) is not None}
    broken, reads = in_vain(loader.total), loader.total["samples"]
    if broken:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in broken.items())
        say(f"left out of {' and '.join(data.values())}: {reasons}; of {reads:,} reads, each epoch's counted")
    if dist.is_main():
        try:
            file.write_text(json.dumps(data | {"reads": reads, "broken": broken, "kept": kept(loader.total)}, indent=2))
        except OSError as error:  # a full disk; what ended the run is to be said
            say(f"{file}: {error.strerror}")
