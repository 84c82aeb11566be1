"""Peak memory of a recipe's step on one GPU, counted without one. JSON lines.

    python benchmarks/memory.py [RECIPE [key=value ...]]

A step goes through on tensors that have shapes and no values (torch's FakeTensorMode), in bf16, on one rank, with
captions of 77 tokens, or latents of 64 x 16 x 16 and 1,000 classes; the figure is the most bytes of tensors alive at
once, rounded up as CUDA's allocator does. By default the three published tokenizers, each with all of a rank's pairs
embedded at once, in micro-batches, and with activations recomputed; and the two diffusion transformers. Blocks are not
compiled, whatever is asked for; that would keep 15% less of each. What a GPU holds besides is not in it: its context,
kernels' workspaces, gaps between tensors, and with several ranks DDP's copy of the gradients and NCCL's buffers.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lpips
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtp import config
from vtp.data.batches import Batch, ClipBatch, RecBatch, SSLBatch
from vtp.data.views import check
from vtp.generation import learner as dit_learner
from vtp.generation.config import DiTTrainConfig
from vtp.generation.learner import LatentBatch
from vtp.models import layers, rope
from vtp.models.dit import DiTConfig, LightningDiT
from vtp.models.vtp_hf import VTPModel
from vtp.pretrain import learner
from vtp.pretrain.config import PretrainConfig
from vtp.recipes import DITS, PRETRAIN, dit_recipe, pretrain_recipe

CPU = torch.device("cpu")
BLOCK = 512  # bytes, CUDA's allocator's
WAYS = [
    (recipe, f"parallel.micro_batch={micro}", f"parallel.recompute={again}")
    for recipe in ("small", "base", "large")
    for micro, again in ((0, "false"), (256, "false"), (128, "false"), (0, "true"))
] + [(recipe, f"recompute={again}") for recipe in ("dit_b", "dit_xl") for again in ("false", "true")]
LATENTS, CLASSES = (64, 16, 16), 1_000


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most, from when it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._sizes = 0, 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = size = -(-x.untyped_storage().nbytes() // BLOCK) * BLOCK
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def batch(cfg: PretrainConfig) -> Batch:
    """One of the sizes that the configuration asks for, with as many masked patches as are expected."""
    sizes, views = cfg.active_batch, cfg.views
    check(views, sizes, cfg.model.vision.patch_size)
    clip = rec = ssl = None
    if sizes.clip:
        tokens = torch.zeros(sizes.clip, cfg.model.text.context_length, dtype=torch.long)
        clip = ClipBatch(torch.zeros(sizes.clip, 3, views.size, views.size), tokens)
    if sizes.rec:
        shared = sizes.rec if clip is not None and views.share and cfg.rec_data is None else 0
        images = clip.images[:shared] if shared else torch.zeros(sizes.rec, 3, views.size, views.size)
        rec = RecBatch(images, shared)
    if sizes.ssl:
        patches = (views.global_size // cfg.model.vision.patch_size) ** 2
        masked = int(2 * sizes.ssl * patches * views.mask_probability * sum(views.mask_ratio) / 2)
        ssl = SSLBatch(
            torch.zeros(2, sizes.ssl, 3, views.global_size, views.global_size),
            torch.zeros(views.local_crops, sizes.ssl, 3, views.local_size, views.local_size),
            torch.zeros(2, sizes.ssl, patches, dtype=torch.bool),
            torch.zeros(masked, dtype=torch.long),
            torch.ones(masked),
        )
    return Batch(clip, ssl, rec, None, {})  # type: ignore[arg-type]


def on_a_gpu(asked: str, _: torch.device) -> str:
    return "bf16" if asked == "auto" else asked


def joint(cfg: PretrainConfig) -> Callable[[int], Any]:
    """The step of `vtp pretrain`."""
    learns = learner.PretrainLearner(cfg, CPU)
    return lambda i: learns.learn(batch(cfg), i)


def diffusion(cfg: DiTTrainConfig) -> Callable[[int], Any]:
    """The step of `vtp train-dit`."""
    shape = DiTConfig(input_size=LATENTS[-1], in_channels=LATENTS[0], num_classes=CLASSES, **asdict(cfg.model))
    latents: Any = SimpleNamespace(stats=SimpleNamespace(normalise=lambda x: x))
    learns = dit_learner.DiTLearner(cfg, LightningDiT(shape), latents, CPU)
    labels = torch.zeros(cfg.batch_size, dtype=torch.long)
    return lambda i: learns.step(LatentBatch(torch.zeros(cfg.batch_size, *LATENTS), labels), i)


def count(cfg: PretrainConfig | DiTTrainConfig) -> tuple[float, float]:
    """GB (held between steps, at most in a step)."""
    with (
        warnings.catch_warnings(action="ignore"),  # copying the teacher looks for a tensor's values
        FakeTensorMode(allow_non_fake_inputs=True),
        Alive() as alive,
        mock.patch.object(rope, "_cached_tables", functools.cache(rope._cached_tables.__wrapped__)),  # these alone
        mock.patch.object(layers, "SHORT_SEQUENCE", 0),  # a GPU takes the fused kernel for all
        mock.patch.object(VTPModel, "_check_text"),  # reads values
        mock.patch.object(nn.Module, "to", lambda module, *_: module),  # cannot be told from a change of its parameters
        mock.patch.object(lpips, "LPIPS", lambda **_: RandomLPIPS()),
        mock.patch.object(learner, "pick_precision", new=on_a_gpu),
        mock.patch.object(dit_learner, "pick_precision", new=on_a_gpu),
        mock.patch.object(learner, "matmul_rate", return_value=1.0),
        mock.patch.object(learner, "step_flops", return_value=0.0),
    ):
        step = diffusion(cfg) if isinstance(cfg, DiTTrainConfig) else joint(cfg)
        step(0)  # makes the moments
        held = alive.now
        alive.most = 0
        step(1)
    return held / 1e9, alive.most / 1e9


class RandomLPIPS(lpips.LPIPS):
    """Without the weights, which a count does not need."""

    def __init__(self) -> None:
        super().__init__(net="vgg", pretrained=False, pnet_rand=True, verbose=False)


def main(words: Sequence[str]) -> None:
    for recipe, *changes in [words] if words else WAYS:
        if recipe not in (*PRETRAIN, *DITS):
            raise SystemExit(f"no recipe '{recipe}'; one of {', '.join((*PRETRAIN, *DITS))}")
        default: Any = dit_recipe(recipe) if recipe in DITS else pretrain_recipe(recipe)
        try:
            held, most = count(config.merge(default, changes))
        except config.ConfigError as error:
            raise SystemExit(str(error)) from None
        record = {"name": " ".join(["peak memory of a step,", recipe, *changes]), "value": round(most, 1), "unit": "GB"}
        print(json.dumps(record | {"held_between_steps": round(held, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
