"""One step of pre-training, as the paper writes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from vtp import dist
from vtp.data.augment import finish
from vtp.data.batches import Batch
from vtp.engine.optim import adamw, autocast, optimizer_tensors, pick_precision, set_schedule, update
from vtp.engine.parallel import parallelise
from vtp.engine.speed import matmul_rate
from vtp.models.layers import Recomputable
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.flops import step_flops
from vtp.pretrain.objectives import Pretraining

MAX_LOGIT_SCALE = math.log(100)  # OpenCLIP's clamp


class PretrainLearner:
    """The joint objective, its optimiser and schedules on this rank's device."""

    def __init__(self, cfg: PretrainConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.precision = pick_precision(cfg.precision, device)
        self.objectives = Pretraining(cfg).to(device).train()
        blocks = [module for module in self.objectives.modules() if isinstance(module, Recomputable)]
        self.forward = parallelise(self.objectives, blocks, cfg.parallel, device, self.precision)
        self.weights = cfg.weights.by_loss()
        self.images_per_step = cfg.active_batch.pairs * dist.world_size()
        self.trainable = [p for p in self.objectives.parameters() if p.requires_grad]
        self.optimizer = adamw(self.objectives.named_parameters(), cfg.optim)
        self.rate = matmul_rate(device, self.precision)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Learn from one batch of uint8 views; step i's augmentation and stochastic depth come from the step's seed."""
        with record_function("views"):
            batch = finish(batch.to(self.device), self.cfg.augment, torch.default_generator)
        return self.learn(batch, step)

    def learn(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Learn from one batch of finished views on the learner's device; returns losses and readings by name."""
        cfg = self.cfg
        images, total_images = step * self.images_per_step, cfg.steps * self.images_per_step
        lr = set_schedule(self.optimizer, cfg.optim, images, total_images)
        with autocast(self.device, self.precision), record_function("forward"):
            losses, readings = self.forward(batch, cfg.distil.teacher_temp(images, total_images))
        total = sum((self.weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=self.device))
        with record_function("backward"):
            total.backward()
        with record_function("optimiser"):
            grad_norm = update(self.optimizer, self.trainable, cfg.optim.clip_grad)
            if cfg.weights.clip > 0:
                with torch.no_grad():
                    self.objectives.student.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        with record_function("ema"):
            self.objectives.follow(cfg.distil.momentum(images, total_images))
        named = {name: loss.detach() for name, loss in losses.items()}
        readings |= {"grad_norm": grad_norm, **self._felt()}
        ideal = step_flops(self.objectives, batch) / self.rate
        return {"total": total.detach(), **named, **readings, "lr": lr, "ideal_seconds": ideal}

    def _felt(self) -> dict[str, Tensor]:
        """grad_OBJECTIVE: norm of the gradient of its weighted losses at the trunk's outputs that it reads.

        Over the rows of all ranks, as one process would see them: rows of the mean of the ranks' losses.
        """
        squares = dist.sum_(torch.stack([*self.objectives.felt.values()]))
        norms = squares.sqrt() / dist.world_size()
        return {f"grad_{name}": norm for name, norm in zip(self.objectives.felt, norms.unbind(), strict=True)}

    def tensors(self) -> dict[str, Any]:
        """Student, teacher, head, centres and AdamW's moments."""
        moments = optimizer_tensors(
            self.optimizer, ((n, p) for n, p in self.objectives.named_parameters() if p.requires_grad)
        )
        return {"objectives": self.objectives.state_dict(), "optimizer": moments}
