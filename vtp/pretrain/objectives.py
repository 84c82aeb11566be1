"""The joint objective: one module, one forward, named losses.

All losses live in one `forward`, because DDP, FSDP2 and torch.compile hook that and nothing else. An objective whose
weight is 0 owns no parameter and costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from vtp.data.batches import Batch, ClipBatch, SSLBatch
from vtp.models.dino_head import DINOHead
from vtp.models.ema import EMATeacher
from vtp.models.layers import scale_init
from vtp.models.vit import Tokens, ViT
from vtp.models.vtp_hf import VTPConfig, VTPModel
from vtp.objectives import prototypes
from vtp.objectives.clip import clip_loss
from vtp.objectives.dino import dino_loss
from vtp.objectives.ibot import ibot_loss
from vtp.objectives.koleo import koleo_loss
from vtp.objectives.reconstruction import feature_distance, l1_loss, load_perceptual
from vtp.objectives.siglip import siglip_loss
from vtp.objectives.sinkhorn import centered_softmax, entropies, sinkhorn_knopp, update_center
from vtp.pretrain.config import PretrainConfig

CENTER_MOMENTUM = 0.9  # Caron et al. 2021


class Objectives(NamedTuple):
    """What one forward gives: scalars by name; `readings` are watched, not minimised."""

    losses: dict[str, Tensor]
    readings: dict[str, Tensor]


class Compared(NamedTuple):
    """The two losses over prototypes, and the entropies of the teacher's class tokens."""

    dino: Tensor
    ibot: Tensor
    entropy_mean: Tensor
    entropy_single: Tensor


class Pretraining(nn.Module):
    """Student, teacher and head, and the losses between them.

    Args:
        cfg: The run. Only what its weights ask for is built.
    """

    center_cls: Tensor
    center_patch: Tensor
    felt: dict[str, Tensor]  # by objective, after the backward pass: squared norm of what it sent to the trunk's output

    def __init__(self, cfg: PretrainConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.felt = {}
        weights = cfg.weights
        model = dataclasses.replace(cfg.model, train_clip=weights.clip > 0, train_reconstruction=weights.rec > 0)
        self.student = VTPModel(VTPConfig.from_model_config(model))
        vision = cfg.model.vision
        followed = nn.ModuleDict({"trunk": self.student.trunk})
        if weights.ssl > 0:
            distil = cfg.distil
            self.head = DINOHead(
                vision.clip_dim, distil.prototypes, distil.head_layers, distil.head_hidden, distil.head_bottleneck
            )
            followed["head"] = self.head
            for name in ("center_cls", "center_patch"):
                self.register_buffer(name, torch.zeros(distil.prototypes))
        if cfg.init == "fan_in":
            scale_init(followed)
            if weights.rec > 0:
                scale_init(self.student.pixel_decoder)
        perceptual = cfg.perceptual if weights.rec > 0 and weights.perceptual > 0 else "none"
        self.teacher_perceives = perceptual == "teacher"
        self.perceive = load_perceptual(perceptual) if perceptual not in ("teacher", "none") else None
        if weights.ssl > 0 or self.teacher_perceives:
            self.teacher = EMATeacher(followed)
        # What no objective reads is not trained: DDP would wait for its gradient.
        if weights.rec == 0 and vision.bottleneck_ae_only and self.student.trunk.feature_bottleneck is not None:
            self.student.trunk.feature_bottleneck.requires_grad_(False)
        if weights.clip > 0 and cfg.contrast == "clip" and self.student.logit_bias is not None:
            self.student.logit_bias.requires_grad_(False)
        # A tuple hides the student's modules from registration: they are already children of `student` and `self`.
        self._followed = (followed,)

    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student: t <- m t + (1 - m) s."""
        if hasattr(self, "teacher"):
            self.teacher.follow(self._followed[0], momentum)

    def published(self, whose: str) -> dict[str, Tensor]:
        """Weights of the tokenizer by its own names: the student's, or with the trunk of the `teacher`."""
        weights = self.student.state_dict()
        if whose == "teacher":
            weights |= {f"trunk.{name}": x for name, x in self.teacher["trunk"].state_dict().items()}
        return weights

    def forward(self, batch: Batch, teacher_temp: float) -> Objectives:
        """Losses of one batch whose images are ImageNet-normalised floats.

        The trunk runs once on each distinct view: a reconstruction view that is the CLIP view takes its tokens.
        """
        student, drop = self.student, self.cfg.drop_path
        losses: dict[str, Tensor] = {}
        readings: dict[str, Tensor] = {}
        self.felt.clear()
        shared: Tokens | None = None
        if batch.clip is not None:
            with record_function("clip"):
                image, words, shared = self._embed(batch.clip, 0 if batch.rec is None else batch.rec.shared)
                losses["clip"] = self._contrast(image, words)
                readings["logit_scale"] = student.logit_scale.detach().exp().mean()
        if batch.rec is not None:
            with record_function("rec"):
                rec_tokens = shared if shared is not None else student.trunk(batch.rec.images, drop_path=drop.rec)
                assert batch.rec.images is not None  # `finish` filled it
                losses |= self._reconstruction(self._feel_tokens("rec", rec_tokens), batch.rec.images)
        if batch.ssl is not None:
            with record_function("ssl"):
                ssl_losses, ssl_readings = self._self_distillation(batch.ssl, teacher_temp)
            losses |= ssl_losses
            readings |= ssl_readings
        return Objectives(losses, readings)

    def _feel(self, objective: str, x: Tensor) -> Tensor:
        """The same values; the squared norm of the gradient that comes back through them is added to `felt`."""
        squares = self.felt.setdefault(objective, torch.zeros((), device=x.device))

        def add(gradient: Tensor) -> None:
            squares.add_(gradient.float().square().sum())

        x = x.view_as(x)  # a tensor of this objective's own: others may read the same
        if x.requires_grad:
            x.register_hook(add)
        return x

    def _feel_tokens(self, objective: str, tokens: Tokens) -> Tokens:
        return Tokens(self._feel(objective, tokens.cls), self._feel(objective, tokens.patches), tokens.grid)

    def _embed(self, clip: ClipBatch, shared: int) -> tuple[Tensor, Tensor, Tokens | None]:
        """Features of images and of texts, and the tokens of the first `shared` views, which are reconstructed too.

        Of more pairs than a micro-batch holds, gradients are cached (Gao et al. 2021): each micro-batch is embedded,
        what its layers hold is dropped, and when the loss has given the gradients of all features each is embedded
        again, from the same random state, and its gradients go back. This is a checkpoint around a micro-batch: one
        forward and one backward pass for DDP and FSDP2.
        """
        size, n = self.cfg.parallel.micro_batch, len(clip.images)
        if size == 0 or n <= size:
            return self._embed_at_once(clip, shared)

        def embed(part: ClipBatch, shared: int) -> tuple[Tensor, Tensor, Tokens | None]:
            # A weight's bfloat16 copy that all micro-batches shared would sum their gradients in bfloat16.
            torch.clear_autocast_cache()
            return self._embed_at_once(part, shared)

        # Of the devices of its arguments' tensors `checkpoint` keeps the random state.
        parts = [
            checkpoint(embed, clip.part(i, i + size), min(max(0, shared - i), size), use_reentrant=False)
            for i in range(0, n, size)
        ]
        images, texts, tokens = zip(*parts, strict=True)
        kept = [part for part in tokens if part is not None]
        if not kept:
            return torch.cat(images), torch.cat(texts), None
        cls, patches = (torch.cat(of) for of in list(zip(*kept, strict=True))[:2])
        return torch.cat(images), torch.cat(texts), Tokens(cls, patches, kept[0].grid)

    def _embed_at_once(self, clip: ClipBatch, shared: int) -> tuple[Tensor, Tensor, Tokens | None]:
        student = self.student
        tokens = student.trunk(clip.images, drop_path=self.cfg.drop_path.clip)
        kept = Tokens(tokens.cls[:shared], tokens.patches[:shared], tokens.grid) if shared else None
        image = student.clip_image(self._feel_tokens("clip", tokens))
        return image, student.clip_text(clip.texts()), kept

    def _contrast(self, image: Tensor, words: Tensor) -> Tensor:
        """InfoNCE or SigLIP between image and text."""
        scale = self.student.logit_scale.exp()
        if self.cfg.contrast == "siglip":
            assert self.student.logit_bias is not None  # PretrainConfig saw to it
            return siglip_loss(image, words, scale, self.student.logit_bias)
        return clip_loss(image, words, scale)

    def _reconstruction(self, tokens: Tokens, images: Tensor) -> dict[str, Tensor]:
        """L1 and perceptual distance of the decoded latents to the images."""
        decoded = self.student.pixel_decoder(self.student.latents(tokens))
        losses = {"l1": l1_loss(decoded, images)}
        if self.teacher_perceives:
            trunk = self.teacher["trunk"]
            with torch.no_grad():
                target = trunk(images).patches
            losses["perceptual"] = feature_distance(trunk(decoded.to(images.dtype)).patches, target)
        elif self.perceive is not None:
            losses["perceptual"] = self.perceive(decoded, images)
        return losses

    def _self_distillation(self, ssl: SSLBatch, teacher_temp: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """DINO between crops, iBOT on masked patches, KoLeo on the global class tokens."""
        n_global = len(ssl.global_crops)
        crops = ssl.global_crops.flatten(0, 1)  # [2B, 3, G, G]
        masked = ssl.mask_indices

        with torch.no_grad(), record_function("teacher"):
            trunk = cast(ViT, self.teacher["trunk"])
            teacher = self._width(trunk.read([crops], masked), trunk)

        trunk, local = self.student.trunk, ssl.local_crops.flatten(0, 1)
        views = [crops, local] if len(local) else [crops]
        student = self._feel("ssl", trunk.read(views, masked, ssl.masks.flatten(0, 1), self.cfg.drop_path.ssl))
        # By shapes alone, which are those of all ranks: were every patch masked, would the logits be many?
        rows = len(crops) + ssl.masks.numel() + len(local)
        many = rows * self.cfg.distil.prototypes > prototypes.LOGITS
        compare = self._compare_in_chunks if many else self._compare
        dino, ibot, mean, single = compare(self._width(student, trunk), teacher, ssl, teacher_temp)
        losses = {"dino": dino, "ibot": ibot}
        readings = {"teacher_entropy_mean": mean, "teacher_entropy_single": single}
        if self.cfg.weights.koleo > 0:
            losses["koleo"] = torch.stack([koleo_loss(c) for c in student[: len(crops)].chunk(n_global)]).mean()
        if self.cfg.distil.centering == "centering":
            readings["center_norm"] = self.center_cls.norm()
        return losses, readings

    def _compare(self, student: Tensor, teacher: Tensor, ssl: SSLBatch, teacher_temp: float) -> Compared:
        """By the logits of all rows."""
        temp = self.cfg.distil.student_temp
        with torch.no_grad():
            logits = self.teacher["head"](teacher).float()
            cls_targets, patch_targets = self._targets(logits, ssl.masks.shape[:2].numel(), teacher_temp)
        crops, patches = _by_loss(self.head(student).float(), ssl)
        dino = dino_loss(crops, cls_targets.unflatten(0, ssl.masks.shape[:2]), temp)
        return Compared(dino, ibot_loss(patches, patch_targets, ssl.mask_weights, temp), *entropies(cls_targets))

    def _compare_in_chunks(self, student: Tensor, teacher: Tensor, ssl: SSLBatch, teacher_temp: float) -> Compared:
        """The same without the logits of all rows."""
        temp = self.cfg.distil.student_temp
        with torch.no_grad():
            head = cast(DINOHead, self.teacher["head"])
            embedded, weight = head.embed(teacher), prototypes.rounded(head.last_layer.weight())
            cls, patches = embedded.tensor_split([ssl.masks.shape[:2].numel()])
            cls_teacher = self._teacher(cls, weight, "center_cls", teacher_temp)
            patch_teacher = self._teacher(patches, weight, "center_patch", teacher_temp)
        weight = self.head.last_layer.weight()
        crops, patches = _by_loss(self.head.embed(student), ssl)
        dino = prototypes.dino_loss(crops, weight, cls_teacher, temp)
        ibot = prototypes.ibot_loss(patches, weight, patch_teacher, ssl.mask_weights, temp)
        return Compared(dino, ibot, *prototypes.teacher_entropies(cls_teacher))

    def _width(self, rows: Tensor, trunk: ViT) -> Tensor:
        """CLIP and self-distillation read before the bottleneck, or behind it where the configuration says so."""
        return rows if self.cfg.model.vision.bottleneck_ae_only else trunk.bottleneck(rows)

    def _targets(self, logits: Tensor, n_cls: int, temp: float) -> tuple[Tensor, Tensor]:
        """The teacher's assignments to prototypes, balanced apart for class tokens and patches."""
        cls, patches = logits[:n_cls], logits[n_cls:]
        if self.cfg.distil.centering == "sinkhorn":
            return sinkhorn_knopp(cls, temp), sinkhorn_knopp(patches, temp)
        targets = centered_softmax(cls, self.center_cls, temp), centered_softmax(patches, self.center_patch, temp)
        if self.training:
            for name, rows in (("center_cls", cls), ("center_patch", patches)):
                self._move_center(name, update_center(getattr(self, name), rows, momentum=CENTER_MOMENTUM))
        return targets

    def _move_center(self, name: str, moved: Tensor) -> None:
        # One batch that is not finite would make every later one so.
        setattr(self, name, torch.where(moved.isfinite().all(), moved, getattr(self, name)))

    def _teacher(self, embedded: Tensor, weight: Tensor, center: str, temp: float) -> prototypes.Teacher:
        """The same for rows of one kind, without their logits."""
        if self.cfg.distil.centering == "sinkhorn":
            return prototypes.Teacher(embedded, weight, temp, prototypes.sinkhorn_offsets(embedded, weight, temp))
        before = getattr(self, center)
        if self.training:
            self._move_center(center, before.lerp(prototypes.mean_logits(embedded, weight), 1 - CENTER_MOMENTUM))
        return prototypes.Teacher(embedded, weight, temp, before / temp)


def _by_loss(student: Float[Tensor, "rows x"], ssl: SSLBatch) -> tuple[Float[Tensor, "s b x"], Float[Tensor, "m x"]]:
    """(class tokens by crop, global ones first; masked patches) of rows in the order of the heads' input."""
    n_cls, batch = ssl.masks.shape[:2].numel(), ssl.masks.shape[1]
    glob, patches, local = student.tensor_split([n_cls, n_cls + len(ssl.mask_indices)])
    return torch.cat([glob, local]).unflatten(0, (-1, batch)), patches
