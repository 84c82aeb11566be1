"""One joint step beside the three steps that it joins, alternating in this process. One JSON line a figure.

    PEERS_SRC=DIR python benchmarks/step.py [fp32|bf16 ...] [compile]

DIR/facebookresearch+dinov2 is a checkout of DINOv2; open_clip and timm are installed packages. The setting: ViT-S/16 at
96 px, 16 images for each objective, text tower and decoder 384 x 12, captions of 8 to 30 tokens, 2 crops of 96 and 8 of
48 px, 8,192 prototypes, centring, L1; 2 threads. All steps start from finished views, the same crops, masks and
captions on both sides, and end with AdamW's update and the teacher's. The process keeps memory that is freed, as
`vtp pretrain` does, so the peers gain by it too; three steps of each warm up.

- open_clip: CLIP's forward, ClipLoss, backward, AdamW. It pads captions to its context of 77 tokens, as it is used.
- DINOv2: SSLMetaArch.forward_backward with its collate, on a CPU by the shims in `dinov2_step`.
- auto-encoder: timm's ViT-S/16, 64 channels, 12 blocks of a decoder, L1.

`ratio` is their sum over ours in the same round, its median. `utilisation` is FLOPs of the step, counted by torch, over
its time, over the rate of a 1536^3 product just before it. `compile` adds our step with parallel.compile=true, as a
user would run it; it takes minutes to compile. The peers run as they are used, uncompiled.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from operator import truediv
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from figures import line
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vtp.engine.speed import reuse_memory

THREADS, ROUNDS, WARM, BATCH, SIZE, LOCAL, CROPS, PROTOTYPES = 2, 7, 3, 16, 96, 48, 8, 8192
WIDTH, DEPTH, HEADS, PATCH, CONTEXT = 384, 12, 6, 16, 77
GRID = SIZE // PATCH
OURS, COMPILED = "joint step", "joint step, torch.compile"

Step = Callable[[], object]


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def captions() -> Tensor:
    """[B, 77] token ids: start, words, end, padding; 8 to 30 tokens, evenly spread."""
    tokens = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    for row, length in zip(tokens, torch.linspace(8, 30, BATCH).round().int().tolist(), strict=True):
        row[:length] = torch.randint(1, 49_000, (length,))
        row[0], row[length - 1] = 49_406, 49_407
    return tokens


def open_clip_step(precision: str, images: Tensor, tokens: Tensor) -> Step:
    import open_clip
    from open_clip.model import CLIP

    vision = {"image_size": SIZE, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH}
    text = {"context_length": CONTEXT, "vocab_size": 49_408, "width": WIDTH, "heads": HEADS, "layers": DEPTH}
    model, loss = CLIP(WIDTH, vision, text).train(), open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            image, words, scale = model(images, tokens)[:3]
            value = loss(image.float(), words.float(), scale)
        value.backward()
        optimizer.step()

    return step


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import timm
        from timm.models.vision_transformer import Block

        self.encoder = timm.create_model("vit_small_patch16_224", img_size=SIZE, num_classes=0, pretrained=False)
        self.narrow, self.widen = nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, GRID**2, WIDTH))
        self.decoder = nn.Sequential(*[Block(WIDTH, HEADS, qkv_bias=True) for _ in range(DEPTH)])
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, images: Tensor) -> Tensor:
        latents = self.narrow(self.encoder.forward_features(images)[:, 1:])
        x = self.out(self.norm(self.decoder(self.widen(latents) + self.position)))
        return F.pixel_shuffle(x.mT.unflatten(2, (GRID, GRID)), PATCH)


def auto_encoder_step(precision: str, images: Tensor) -> Step:
    model = AutoEncoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            decoded = model(images)
        F.l1_loss(decoded.float(), images).backward()
        optimizer.step()

    return step


class _BlockDiagonalMask:
    """What DINOv2's collate needs of xformers."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple[_BlockDiagonalMask, Tensor]:
        return cls([x.shape[1] for x in tensors]), torch.cat(tensors, 1)

    def split(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self.lengths, 1))


def dinov2_step(precision: str, source: str) -> tuple[Step, dict]:
    """DINOv2's step, and its collated batch.

    It needs CUDA, xformers and FSDP; here .cuda() gives the tensor, crops of one size run through each block apart
    (instead of packed), attention is torch's, parameters are plain, the teacher follows by the same foreach
    operations. Losses, heads, masks, collate and their order are its own.
    """
    root = f"{source}/facebookresearch+dinov2"
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, root)
    attention = types.ModuleType("xformers.ops")
    attention.fmha = types.SimpleNamespace(BlockDiagonalMask=_BlockDiagonalMask)
    xformers = types.ModuleType("xformers")
    xformers.ops = attention
    sharding = types.ModuleType("dinov2.fsdp")
    for name in ("get_fsdp_wrapper", "get_fsdp_modules", "ShardedGradScaler", "reshard_fsdp_model"):
        setattr(sharding, name, lambda *_: None)
    train = types.ModuleType("dinov2.train")  # its __init__ asks for submitit and the evaluations
    train.__path__ = [f"{root}/dinov2/train"]
    sys.modules |= {
        "xformers": xformers,
        "xformers.ops": attention,
        "dinov2.fsdp": sharding,
        "dinov2.train": train,
    }
    Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.synchronize = lambda *_: None

    from omegaconf import OmegaConf

    block = importlib.import_module("dinov2.layers.block")
    alone = block.Block.forward
    block.NestedTensorBlock.forward = lambda self, x: (
        [alone(self, part) for part in x] if isinstance(x, list) else alone(self, x)
    )
    models = importlib.import_module("dinov2.models")
    arch = importlib.import_module("dinov2.train.ssl_meta_arch")
    arch.build_model_from_cfg = lambda cfg: models.build_model(cfg.student, img_size=cfg.crops.global_crops_size)
    collate = importlib.import_module("dinov2.data.collate").collate_data_and_cast
    masking = importlib.import_module("dinov2.data.masking").MaskingGenerator
    cfg = OmegaConf.load(f"{root}/dinov2/configs/ssl_default_config.yaml")
    head = {"head_n_prototypes": PROTOTYPES}
    crops = {"global_crops_size": SIZE, "local_crops_size": LOCAL, "local_crops_number": CROPS}
    changes = {"student": {"arch": "vit_small", "drop_path_rate": 0.0}, "crops": crops, "dino": head, "ibot": head}
    changes |= {"compute_precision": {"grad_scaler": False}, "train": {"centering": "centering"}}
    model = arch.SSLMetaArch(OmegaConf.merge(cfg, OmegaConf.create(changes)))
    for name, part in model.student.items():
        model.teacher[name].load_state_dict(part.state_dict())
    model.need_to_synchronize_fsdp_streams = False
    model.train()
    student, teacher = list(model.student.parameters()), list(model.teacher.parameters())
    optimizer = torch.optim.AdamW(student, 1e-4, foreach=True)

    def views(side: int, count: int) -> list[Tensor]:
        return [torch.randn(3, side, side) for _ in range(count)]

    random.seed(0), np.random.seed(0)
    samples = [({"global_crops": views(SIZE, 2), "local_crops": views(LOCAL, CROPS)}, 0) for _ in range(BATCH)]
    generator = masking((GRID, GRID), max_num_patches=0.5 * GRID**2)
    data = collate(samples, (0.1, 0.5), 0.5, torch.float32, n_tokens=GRID**2, mask_generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            model.forward_backward(data, teacher_temp=0.04)
        nn.utils.clip_grad_norm_(student, 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(teacher, 0.99)
            torch._foreach_add_(teacher, student, alpha=0.01)

    return step, data


def our_step(precision: str, images: Tensor, tokens: Tensor, data: dict, compile: bool = False) -> Step:
    """The joint step on the same images, captions, crops and masks; captions are cut as in training."""
    from vtp.data.batches import Batch, ClipBatch, RecBatch, SSLBatch, cut, token_counts
    from vtp.data.views import BatchConfig, ViewsConfig
    from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
    from vtp.pretrain.learner import PretrainLearner
    from vtp.recipes import pretrain_recipe

    cfg = pretrain_recipe("small")
    cfg = replace(
        cfg,
        precision=precision,
        perceptual="none",
        parallel=replace(cfg.parallel, compile=compile),
        batch=BatchConfig(clip=BATCH, ssl=BATCH, rec=BATCH),
        distil=replace(cfg.distil, prototypes=PROTOTYPES, centering="centering"),
        views=ViewsConfig(size=SIZE, global_size=SIZE, local_size=LOCAL, local_crops=CROPS),
        model=ModelConfig(
            image_size=SIZE,
            vision=ViTConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS),
            text=TextConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS),
            decoder=DecoderConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS),
        ),
    )
    ssl = SSLBatch(
        data["collated_global_crops"].view(2, BATCH, 3, SIZE, SIZE),
        data["collated_local_crops"].view(CROPS, BATCH, 3, LOCAL, LOCAL),
        data["collated_masks"].view(2, BATCH, -1),
        data["mask_indices_list"],
        data["masks_weight"],
    )
    clip = ClipBatch(images, cut(tokens), tuple(token_counts(tokens).tolist()))  # by length, as the loader orders them
    batch = Batch(clip, ssl, RecBatch(images, shared=BATCH), cursor=None, report={})
    learner = PretrainLearner(cfg, torch.device("cpu"))
    return lambda: float(learner.learn(batch, 1)["total"])


def product_rate(precision: str, side: int = 1536) -> float:
    """FLOP/s of a square product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    a @ b
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * side**3 / median(times)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def counted(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure(precision: str, source: str, compile: bool) -> None:
    reuse_memory(torch.device("cpu"))
    torch.manual_seed(0)
    images, tokens = torch.randn(BATCH, 3, SIZE, SIZE), captions()
    dinov2, data = dinov2_step(precision, source)
    mine = {OURS: our_step(precision, images, tokens, data)}
    peers = {
        "open_clip CLIP": open_clip_step(precision, images, tokens),
        "DINOv2 SSL": dinov2,
        "ViT auto-encoder": auto_encoder_step(precision, images),
    }
    flops = {name: counted(step) for name, step in (mine | peers).items()}
    if compile:
        mine[COMPILED] = our_step(precision, images, tokens, data, compile=True)
        mine[COMPILED]()
        flops[COMPILED] = flops[OURS]
    steps = mine | peers
    for _ in range(WARM - 1):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    used: dict[str, list[float]] = {name: [] for name in steps}  # share of the product's rate
    rates = []
    for i in range(ROUNDS):
        for name in list(steps) if i % 2 else list(reversed(steps)):
            rates.append(product_rate(precision))
            times[name].append(seconds(steps[name]))
            used[name].append(flops[name] / times[name][-1] / rates[-1])
    together = [sum(each) for each in zip(*(times[name] for name in peers), strict=True)]
    for name in mine:
        ratio = median(map(truediv, together, times[name]))
        line(f"{name}, {precision}", median(times[name]), "s", "sum of " + ", ".join(peers), median(together), ratio, 3)
    ours, rate = median(times[OURS]), median(rates)
    for name in peers:
        of = median(map(truediv, times[name], times[OURS]))
        line(f"{OURS}, {precision}", ours, "s", f"{name} alone", median(times[name]), of, 3)
        theirs = median(used[name])
        for own in mine:
            use = median(used[own])
            line(f"{own}, {precision}, utilisation", use, "of matmul", name, theirs, use / theirs, 3)
    line(f"{OURS}, {precision}, {flops[OURS] / 1e9:.0f} GFLOP", flops[OURS] / ours / 1e9, "GFLOP/s", "1536^3 product",
         rate / 1e9, flops[OURS] / ours / rate, 3)  # fmt: skip


def main(words: list[str]) -> None:
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    source = os.environ.get("PEERS_SRC")
    if source is None:
        raise SystemExit("set PEERS_SRC to a folder that holds a checkout of DINOv2 as facebookresearch+dinov2")
    for precision in [word for word in words if word != "compile"] or ["fp32", "bf16"]:
        measure(precision, source, "compile" in words)


if __name__ == "__main__":
    main(sys.argv[1:])
