"""The paper's question at toy size: does a tokenizer that also understands make latents that are easier to generate?

Each tokenizer is pre-trained on equally many images of `scenes`, asked the same questions, and gives its latents to the
same small diffusion transformer. Whatever comes out is what the page says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtp.data.sources import open_source
from vtp.engine.logging import say
from vtp.evaluation import run as evaluate
from vtp.evaluation.judge import judge_accuracy, save_judge, train_judge
from vtp.evaluation.run import EvalConfig
from vtp.generation.config import DiTTrainConfig
from vtp.generation.latents import encode_latents
from vtp.generation.run import train_dit
from vtp.generation.sample import sample
from vtp.pretrain.config import PretrainConfig
from vtp.pretrain.run import pretrain
from vtp.studies.side_by_side import Stage, last_metrics, side_by_side

TRAIN, TEST = "scenes", "scenes:test"
ZERO_SHOT = ("shape", "colour")
LINEAR = ("shape", "letter")
DRAWN = "shape"  # the label whose classes the diffusion transformer is asked to draw


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What every tokenizer goes through after its pre-training, in images unless said otherwise."""

    dit: DiTTrainConfig
    judge_images: int = 6_000
    judge_epochs: int = 5
    probe_images: int = 6_000  # that a probe is fitted on
    test_images: int | None = None  # held out, for each question; None is all 5,000
    latents: int = 12_288  # that the diffusion transformer learns from
    samples: int = 512
    sampling_steps: int = 30
    guidance: float = 4.0


def compare_tokenizers(tokenizers: Mapping[str, PretrainConfig], ask: Comparison, out: Path) -> list[Path]:
    """Run the whole pipeline for each tokenizer, side by side, and return the run folders in order; what is done stays.

    out/judge     the referee: a classifier trained on the labels, which no tokenizer sees
    out/NAME      the tokenizer's run, with latents/, dit/, samples/ and eval/*.json, and log.txt of what it said
    """
    out.mkdir(parents=True, exist_ok=True)  # before the work: it may fail
    judge = out / "judge"
    size = next(iter(tokenizers.values())).views.size
    if not (judge / "model.safetensors").is_file():
        say("training the judge, a classifier that no tokenizer sees")
        referee = train_judge(
            open_source(TRAIN), ("shape", "colour"), size=size, images=ask.judge_images, epochs=ask.judge_epochs
        )
        save_judge(referee, judge)
        accuracy = judge_accuracy(referee, open_source(TEST), 1_000)
        say("the judge is right on " + ", ".join(f"{v:.1%} ({k})" for k, v in accuracy.items()))
    pairs = max(cfg.active_batch.pairs for cfg in tokenizers.values())
    jobs = {}
    for name, cfg in tokenizers.items():
        if cfg.active_batch.pairs < pairs:  # equal images: what reads fewer a step reconstructs them all
            cfg = replace(cfg, batch=replace(cfg.batch, rec=pairs))
        jobs[name] = (run_tokenizer, (replace(cfg, out=str(out / name)), ask, judge))
    side_by_side(jobs, out, lambda name: _stage(out / name, tokenizers[name], ask))
    return [out / name for name in tokenizers]


def run_tokenizer(cfg: PretrainConfig, ask: Comparison, judge: Path) -> None:
    """Pre-train, ask, encode, learn to draw, draw: everything about one tokenizer, in its run folder."""
    run = Path(cfg.out)
    tokenizer = pretrain(cfg)
    _question(run, tokenizer, judge, ask, clip=cfg.weights.clip > 0)
    latents = encode_latents(
        tokenizer, TRAIN, run / "latents", label=DRAWN, flip=False, limit=ask.latents, batch_size=256, precision="auto"
    )
    train_dit(replace(ask.dit, data=str(latents), out=str(run / "dit")))
    for samples, scale in (("samples", ask.guidance), ("samples_unguided", 1.0)):
        drawn = sample(
            run / "dit",
            run / samples,
            num=ask.samples,
            steps=ask.sampling_steps,
            cfg_scale=scale,
            batch_size=256,
            precision="auto",
        )
        evaluate.generation(
            drawn,
            TEST,
            extractor=f"judge:{judge}",
            judge=judge,
            label=DRAWN,
            real=TRAIN,
            cfg=EvalConfig(out=run / "eval" / f"{samples.replace('samples', 'generation')}.json"),
        )


def _question(run: Path, tokenizer: Path, judge: Path, ask: Comparison, clip: bool) -> None:
    """Zero-shot, probes and reconstruction on the held-out pictures."""

    def asked(name: str) -> EvalConfig:
        return EvalConfig(out=run / "eval" / f"{name}.json", batch_size=250, precision="auto", limit=ask.test_images)

    for label in ZERO_SHOT if clip else ():
        evaluate.zero_shot(tokenizer, TEST, label=label, cfg=asked(f"zero-shot-{label}"))
    for label in LINEAR:
        asking = asked(f"linear-{label}")
        evaluate.probe("linear", tokenizer, TRAIN, TEST, label=label, train_limit=ask.probe_images, cfg=asking)
    fitted: dict[str, Any] = {"label": DRAWN, "train_limit": ask.probe_images}
    evaluate.probe("linear", tokenizer, TRAIN, TEST, features="latent", **fitted, cfg=asked(f"linear-latent-{DRAWN}"))
    evaluate.probe("knn", tokenizer, TRAIN, TEST, **fitted, cfg=asked(f"knn-{DRAWN}"))
    evaluate.reconstruction(tokenizer, TEST, extractor=f"judge:{judge}", cfg=asked("reconstruction"))


def _stage(run: Path, cfg: PretrainConfig, ask: Comparison) -> Stage:
    """What a run's files say that it is doing."""
    learning = {
        "pre-training": (run / "metrics.jsonl", cfg.steps, run / "tokenizer"),
        "diffusion": (run / "dit" / "metrics.jsonl", ask.dit.steps, run / "dit" / "model"),
    }
    questions = len(LINEAR) + 3 + (len(ZERO_SHOT) if cfg.weights.clip > 0 else 0)
    results = len(list((run / "eval").glob("*.json")))
    for name, (metrics, steps, published) in learning.items():
        if name == "diffusion" and not metrics.is_file():
            return Stage("questions", min(results, questions), questions)
        if not published.is_dir():
            now = last_metrics(metrics)
            status = f"loss {now['total']:.3f}  {now['images_per_second']:.0f} images/s" if now.get("total") else ""
            return Stage(name, now.get("step", 0), steps, status)
    return Stage("drawing", results - questions, 2)
