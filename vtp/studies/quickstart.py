"""The paper's question at toy size: does a tokenizer that also understands make latents that are easier to generate?

Each tokenizer is pre-trained on equally many images of `scenes`, asked the same questions, and gives its latents to the
same small diffusion transformer. Whatever comes out is what the page says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vtp.data.sources import open_source
from vtp.engine.logging import console
from vtp.evaluation import run as evaluate
from vtp.evaluation.judge import judge_accuracy, save_judge, train_judge
from vtp.evaluation.run import EvalConfig
from vtp.generation.config import DiTTrainConfig
from vtp.generation.latents import encode_latents
from vtp.generation.run import train_dit
from vtp.generation.sample import sample
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.run import pretrain

TRAIN, TEST = "scenes", "scenes:test"
ZERO_SHOT = ("shape", "colour")
LINEAR = ("shape", "letter")
DRAWN = "shape"  # the label whose classes the diffusion transformer is asked to draw
LATENTS = 12_288  # training images of the diffusion transformer
SAMPLES = 256
PROBE_TRAIN = 6_000
GUIDANCE = 3.0


def compare_tokenizers(tokenizers: Mapping[str, PretrainConfig], dit: DiTTrainConfig, out: Path) -> list[Path]:
    """Run the whole pipeline once for each tokenizer and return the run folders, in order; what is done is kept.

    out/judge     the referee: a classifier trained on the labels, which no tokenizer sees
    out/NAME      the tokenizer's run, with latents/, dit/, samples/ and eval/*.json
    """
    size = next(iter(tokenizers.values())).views.size
    judge = out / "judge"
    if not (judge / "model.safetensors").is_file():
        referee = train_judge(open_source(TRAIN), ("shape", "colour"), size=size, images=6_000)
        save_judge(referee, judge)
        accuracy = judge_accuracy(referee, open_source(TEST), 1_000)
        console.print("the judge is right on " + ", ".join(f"{v:.1%} ({k})" for k, v in accuracy.items()))
    pairs = max(cfg.active_batch.pairs for cfg in tokenizers.values())
    runs = []
    for name, cfg in tokenizers.items():
        run = out / name
        if cfg.active_batch.pairs < pairs:  # equal images: what reads fewer a step reconstructs them all
            cfg = replace(cfg, batch=replace(cfg.batch, rec=pairs))
        tokenizer = pretrain(replace(cfg, out=str(run)))
        _judge_tokenizer(run, tokenizer, judge, clip=cfg.weights.clip > 0)
        latents = encode_latents(
            tokenizer, TRAIN, run / "latents", label=DRAWN, flip=False, limit=LATENTS, batch_size=256, precision="bf16"
        )
        train_dit(replace(dit, data=str(latents), out=str(run / "dit")))
        for samples, scale in (("samples", GUIDANCE), ("samples_unguided", 1.0)):
            drawn = sample(run / "dit", run / samples, num=SAMPLES, cfg_scale=scale, batch_size=256, precision="bf16")
            evaluate.generation(
                drawn,
                TEST,
                extractor=f"judge:{judge}",
                judge=judge,
                label=DRAWN,
                cfg=EvalConfig(out=run / "eval" / f"{samples.replace('samples', 'generation')}.json"),
            )
        runs.append(run)
    return runs


def _judge_tokenizer(run: Path, tokenizer: Path, judge: Path, clip: bool) -> None:
    """Zero-shot, probes and reconstruction on the held-out pictures."""

    def asked(name: str) -> EvalConfig:
        return EvalConfig(out=run / "eval" / f"{name}.json", batch_size=250, precision="bf16")

    for label in ZERO_SHOT if clip else ():
        evaluate.zero_shot(tokenizer, TEST, label=label, cfg=asked(f"zero-shot-{label}"))
    for label in LINEAR:
        evaluate.linear(tokenizer, TRAIN, TEST, label=label, train_limit=PROBE_TRAIN, cfg=asked(f"linear-{label}"))
    evaluate.linear(tokenizer, TRAIN, TEST, label=DRAWN, features="latent", cfg=asked(f"linear-latent-{DRAWN}"))
    evaluate.knn(tokenizer, TRAIN, TEST, label=DRAWN, cfg=asked(f"knn-{DRAWN}"))
    evaluate.reconstruction(tokenizer, TEST, extractor=f"judge:{judge}", cfg=asked("reconstruction"))
