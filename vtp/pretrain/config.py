"""Everything that decides what a pre-training run learns. Batch sizes are per rank; schedules are shares of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtp.config import ConfigError, within
from vtp.data.augment import AugmentConfig
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.engine.loop import LoopConfig
from vtp.engine.optim import OptimConfig
from vtp.engine.parallel import ParallelConfig
from vtp.models.config import ModelConfig
from vtp.schedules import Ramp
from vtp.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Factors of the losses: L = rec (l1 + perceptual) + ssl (dino + ibot + koleo) + clip; 0 removes one whole."""

    clip: float = 1.0
    ssl: float = 1.0
    rec: float = 0.1  # small on purpose: it helps generation (paper)
    perceptual: float = 1.0  # inside rec
    koleo: float = 0.1  # inside ssl

    def __post_init__(self) -> None:
        within(self, "clip ssl rec perceptual koleo", 0)

    def by_loss(self) -> dict[str, float]:
        """Factor of each named loss in the total; only what is not switched off."""
        factors = {
            "clip": self.clip,
            "dino": self.ssl,
            "ibot": self.ssl,
            "koleo": self.ssl * self.koleo,
            "l1": self.rec,
            "perceptual": self.rec * self.perceptual,
        }
        return {name: factor for name, factor in factors.items() if factor > 0}


@dataclass(frozen=True, kw_only=True)
class DropPath:
    """Stochastic depth of the student's trunk in each objective's pass; a shared pass uses clip's."""

    clip: float = 0.0
    ssl: float = 0.0
    rec: float = 0.0

    def __post_init__(self) -> None:
        within(self, "clip ssl rec", 0, 1, below=True)


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """Self-distillation: DINO on class tokens and iBOT on masked patches, through one head (DINOv2's values)."""

    prototypes: int = 65_536  # K; scale it with the run: 65k needs ImageNet, 256 learns within minutes
    head_layers: int = 3
    head_hidden: int = 2_048
    head_bottleneck: int = 256
    student_temp: float = 0.1
    teacher_temp: Ramp = Ramp(start=0.04, end=0.07, share=0.06)
    momentum: Ramp = Ramp(start=0.994, end=1.0, cosine=True)
    centering: Literal["sinkhorn", "centering"] = "sinkhorn"

    def __post_init__(self) -> None:
        within(self, "prototypes", 2)
        within(self, "head_layers head_hidden head_bottleneck", 1)
        within(self, "student_temp teacher_temp.start teacher_temp.end", 0, above=True)
        within(self, "momentum.start momentum.end", 0, 1)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run."""

    data: str = "scenes"  # class folders, folder with metadata.jsonl, tar shards, hf:NAME, scenes, or a mixture
    ssl_data: str | None = None  # pictures of self-distillation alone; they need no captions
    rec_data: str | None = None  # pictures of reconstruction alone
    annotations: str | None = None  # jsonl of more captions and labels, by key
    out: str = "runs/pretrain"
    steps: int = 1_000
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device multiplies it, else fp32
    resume: Literal["auto", "never", "anyway"] = "auto"  # anyway: go on although the configuration has changed
    publish: Literal["student", "teacher"] = "student"  # whose trunk the tokenizer has; all else has no teacher
    workers: int = 1  # loader processes per rank; 0 loads in the training process
    model: ModelConfig = ModelConfig()
    init: Literal["published", "fan_in"] = "published"  # fan_in suits networks much narrower than 768
    batch: BatchConfig = BatchConfig()
    weights: Weights = Weights()
    contrast: Literal["clip", "siglip"] = "clip"
    distil: DistilConfig = DistilConfig()
    perceptual: str = "lpips"  # lpips, teacher, none, or the path of an exported module (.pt2)
    drop_path: DropPath = DropPath()
    views: ViewsConfig = ViewsConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        within(self, "steps", 1, 10**10)
        within(self, "seed", 0)
        within(self, "workers", 0, 1024)  # processes of a rank; a typing mistake must not take the machine
        if not self.weights.clip + self.weights.ssl + self.weights.rec:
            raise ConfigError(
                "weights.clip, weights.ssl and weights.rec are all 0: no view is made and nothing can be learned; "
                "give one of them a weight (a loss of your own reads the views of one, too)"
            )
        if self.weights.ssl > 0 and self.weights.koleo > 0 and self.batch.ssl == 1:
            raise ConfigError("batch.ssl=1 leaves koleo no neighbour; take at least 2, or set weights.koleo=0")
        if self.weights.clip > 0 and self.contrast == "clip" and self.batch.clip == 1:
            raise ConfigError("batch.clip=1 leaves a pair nothing to be told from; take at least 2, or contrast=siglip")
        text = self.model.text
        if self.weights.clip > 0 and (text.no_causal_mask or text.pool_type not in ("argmax", "first")):
            raise ConfigError(
                "captions are cut to their lengths, which a tower that reads its padding would notice; "
                "set model.text.no_causal_mask=false and model.text.pool_type=argmax"
            )
        if self.publish == "teacher" and self.weights.ssl == 0:
            raise ConfigError("publish=teacher, but weights.ssl=0 leaves no teacher; set publish=student")
        for part, name in (("train_clip", "clip"), ("train_reconstruction", "rec")):
            if getattr(self.weights, name) > 0 and not getattr(self.model, part):
                raise ConfigError(f"model.{part}=false is for weights.{name} to decide; set weights.{name}=0")
        if self.weights.clip > 0:
            within(self, "model.text.context_length", 2)  # the start and end tokens
            within(self, "model.text.vocab_size", Tokenizer.vocab_size)
        if self.contrast == "siglip" and self.model.init_logit_bias is None and self.weights.clip > 0:
            raise ConfigError("contrast=siglip needs a logit bias: set model.init_logit_bias=-10")

    @property
    def active_batch(self) -> BatchConfig:
        """The batch sizes of the objectives that are on; 0 for those that are not, so that no view of them is made."""
        w, b = self.weights, self.batch
        sizes = {"clip": (b.clip, w.clip), "ssl": (b.ssl, w.ssl), "rec": (b.rec, w.rec)}
        for name, (size, weight) in sizes.items():
            if weight > 0 and size < 1:
                raise ConfigError(f"batch.{name}={size} but weights.{name}={weight}; give it pairs or weight 0")
        return BatchConfig(**{name: size if weight > 0 else 0 for name, (size, weight) in sizes.items()})
