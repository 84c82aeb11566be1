"""One step of pre-training, as the paper writes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtp import dist
from vtp.data.augment import finish
from vtp.data.batches import Batch
from vtp.engine.optim import adamw, autocast, optimizer_tensors, set_schedule, update
from vtp.engine.parallel import parallelise
from vtp.models.layers import Recomputable
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.objectives import Pretraining

MAX_LOGIT_SCALE = math.log(100)  # OpenCLIP's clamp


class PretrainLearner:
    """The joint objective, its optimiser and schedules on this rank's device."""

    def __init__(self, cfg: PretrainConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.objectives = Pretraining(cfg).to(device).train()
        blocks = [module for module in self.objectives.modules() if isinstance(module, Recomputable)]
        self.forward = parallelise(self.objectives, blocks, cfg.parallel, device, cfg.precision)
        self.weights = cfg.weights.by_loss()
        self.images_per_step = cfg.active_batch.pairs * dist.world_size()
        self.trainable = [p for p in self.objectives.parameters() if p.requires_grad]
        self.optimizer = adamw(self.objectives.named_parameters(), cfg.optim)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Learn from one batch of uint8 views; step i's augmentation and stochastic depth come from the step's seed."""
        cfg = self.cfg
        images, total_images = step * self.images_per_step, cfg.steps * self.images_per_step
        lr = set_schedule(self.optimizer, cfg.optim, images, total_images)
        batch = finish(batch.to(self.device), cfg.augment, torch.default_generator)
        with autocast(self.device, cfg.precision):
            losses, readings = self.forward(batch, cfg.distil.teacher_temp(images, total_images))
        total = sum((self.weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=self.device))
        total.backward()
        grad_norm = update(self.optimizer, self.trainable, cfg.optim.clip_grad)
        if cfg.weights.clip > 0:
            with torch.no_grad():
                self.objectives.student.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.objectives.follow(cfg.distil.momentum(images, total_images))
        named = {name: loss.detach() for name, loss in losses.items()}
        return {"total": total.detach(), **named, **readings, "grad_norm": grad_norm, "lr": lr}

    def tensors(self) -> dict[str, Any]:
        """Student, teacher, head, centres and AdamW's moments."""
        moments = optimizer_tensors(
            self.optimizer, ((n, p) for n, p in self.objectives.named_parameters() if p.requires_grad)
        )
        return {"objectives": self.objectives.state_dict(), "optimizer": moments}
