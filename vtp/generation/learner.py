"""One step of flow matching on latents, and the batches it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vtp import dist
from vtp.engine.optim import adamw, autocast, optimizer_tensors, pick_precision, set_schedule, update
from vtp.engine.parallel import ParallelConfig, parallelise
from vtp.flow.path import cosine_loss, interpolate, mse_loss, target_velocity
from vtp.flow.times import logit_normal
from vtp.generation.config import DiTTrainConfig
from vtp.generation.latents import Latents
from vtp.models.dit import LightningDiT, drop_labels
from vtp.models.ema import EMATeacher


class LatentBatch(NamedTuple):
    """Latents as the tokenizer made them, and the class of each."""

    latents: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]


class LatentBatches:
    """Endless batches: each epoch a new permutation of all latents, shared out over the ranks.

    Batch i is a function of (seed, rank, i) alone, so its number is all there is to resume.
    """

    def __init__(self, latents: Latents, batch_size: int, seed: int, flip: bool) -> None:
        self.latents, self.batch_size, self.seed, self.flip = latents, batch_size, seed, flip
        self.taken = 0
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[LatentBatch]:
        while True:
            batch = self.batch(self.taken)
            self.taken += 1
            yield batch

    def batch(self, i: int) -> LatentBatch:
        """Batch number i of this rank."""
        first = (i * dist.world_size() + dist.rank()) * self.batch_size
        rows = torch.from_numpy(np.array([self._row(p) for p in range(first, first + self.batch_size)]))
        mirrored = torch.from_numpy(np.random.default_rng((self.seed, dist.rank(), i)).random(len(rows)) < 0.5)
        return LatentBatch(*self.latents.take(rows, mirrored if self.flip else torch.zeros_like(mirrored)))

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.latents))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.latents))
        return int(self._order[place])

    def state_dict(self) -> dict[str, Any]:
        """Batches taken so far."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches taken."""
        self.taken = state["taken"]


class DiTLearner:
    """A diffusion transformer, its moving average and its optimiser on one device."""

    def __init__(self, cfg: DiTTrainConfig, model: LightningDiT, latents: Latents, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.precision = pick_precision(cfg.precision, device)
        self.model = model.to(device).train()
        self.student = nn.ModuleDict({"dit": self.model})
        self.average = EMATeacher(self.student)
        laid = ParallelConfig(recompute=cfg.recompute, compile=cfg.compile)
        self.velocity = parallelise(self.model, [*self.model.blocks], laid, device, self.precision)
        self.stats = latents.stats
        self.images_per_step = cfg.batch_size * dist.world_size()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model.named_parameters(), cfg.optim)

    def step(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """Learn the velocity at one random time of each latent's path from its own noise."""
        cfg = self.cfg
        images, total_images = step * self.images_per_step, cfg.steps * self.images_per_step
        lr = set_schedule(self.optimizer, cfg.optim, images, total_images)
        data = self.stats.normalise(batch.latents.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        noise = torch.randn_like(data)
        t = logit_normal(len(data), cfg.times.mu, cfg.times.sigma, device=self.device)
        labels = drop_labels(labels, self.model.null_class, cfg.label_dropout)
        with autocast(self.device, self.precision):
            pred = self.velocity(interpolate(noise, data, t), t, labels)
        target = target_velocity(noise, data)
        mse, cosine = mse_loss(pred, target).mean(), cosine_loss(pred, target).mean()
        total = mse + cfg.cosine_weight * cosine
        total.backward()
        grad_norm = update(self.optimizer, self.trainable, cfg.optim.clip_grad)
        self.average.follow(self.student, min(cfg.ema, (1 + step) / (10 + step)))
        losses = {"total": total.detach(), "mse": mse.detach(), "cosine": cosine.detach()}
        return {**losses, "grad_norm": grad_norm, "lr": lr}

    def tensors(self) -> dict[str, Any]:
        """Model, moving average and AdamW's moments."""
        learned = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        moments = optimizer_tensors(self.optimizer, learned)
        return {"model": self.model.state_dict(), "average": self.average.state_dict(), "optimizer": moments}

    def published(self) -> LightningDiT:
        """The moving average: what samples are drawn from."""
        return cast(LightningDiT, self.average["dit"])
