"""A run folder as the programs leave it, at the smallest size, with figures a test can set."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import save_tokenizer

PROTOTYPES = 256
ENTROPIES = {  # (mean, single) as shares of ln K at the start and at the end of the run
    "healthy": ((0.97, 0.99), (0.98, 0.6)),
    "one answer": ((0.97, 0.9), (0.1, 0.05)),
    "uniform": ((1.0, 1.0), (1.0, 0.99)),
    "back to uniform": ((0.97, 0.6), (1.0, 0.99)),
}


def write_metrics(file: Path, understands: bool, teacher: str = "healthy", seconds: float = 240.0) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(20, 1201, 20):
        t = step / 1200
        line = {"step": step, "l1": 0.25 + 0.8 * math.exp(-5 * t), "lr": 1e-3 * math.cos(math.pi * t / 2)}
        if understands:
            ceiling = math.log(PROTOTYPES)
            start, end = ENTROPIES[teacher]
            mean, single = (ceiling * (a + (b - a) * t) for a, b in zip(start, end, strict=True))
            falls = teacher == "healthy"
            line |= {
                "clip": 5.2 * math.exp(-1.5 * t),
                "dino": ceiling * (1 - 0.25 * t * falls),
                "ibot": ceiling * (1 - 0.15 * t * falls),
                "koleo": -0.3 * t,
                "perceptual": 0.4 * math.exp(-t),
                "logit_scale": 14 + 30 * t,
                "teacher_entropy_mean": mean,
                "teacher_entropy_single": single,
            }
        line["grad_norm"] = 1 + t
        line = {k: v if k == "step" else v * (1 + 0.02 * rng.normal()) for k, v in line.items()}
        line["total"] = sum(line.get(n, 0) for n in ("clip", "dino", "ibot", "l1"))
        line |= {"images": step * 128, "images_per_second": 600.0, "seconds": seconds * t}
        lines.append(json.dumps(line))
    file.write_text("\n".join(lines) + "\n")


def write_result(folder: Path, name: str, task: str, metrics: dict, protocol: dict) -> None:
    folder.mkdir(exist_ok=True)
    result = {"task": task, "metrics": metrics, "protocol": protocol, "model_sha256": "0" * 64, "data_sha256": "1" * 64}
    result |= {"seed": 0, "command": f"vtp eval {task}", "versions": {"torch": torch.__version__}}
    (folder / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[bool, Path]:
    """Two untrained tokenizers: with a text tower and without."""
    root = tmp_path_factory.mktemp("tokenizers")
    for understands in (True, False):
        save_tokenizer(root / str(understands), image_size=32, train_clip=understands)
    return {u: root / str(u) for u in (True, False)}


@pytest.fixture
def make_run(tmp_path, tokenizers):
    """make_run("vtp", rfd=..., gfd=...) -> the run folder tmp_path/vtp, complete."""

    def make(
        name: str,
        understands: bool = True,
        rfd: float = 2.0,
        gfd: float = 5.0,
        unguided: float | None = None,
        teacher: str = "healthy",
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "tokenizer").symlink_to(tokenizers[understands])
        (run / "config.yaml").write_text(
            f"data: scenes\nannotations: null\n"
            f"weights: {{clip: {float(understands)}, ssl: {float(understands)}, rec: 1.0}}\n"
            f"batch: {{clip: 128}}\ndistil: {{prototypes: {PROTOTYPES}, centering: sinkhorn}}\n"
        )
        environment = {"command": f"vtp pretrain {name} 'a <b>'", "started": "2026-01-02T03:04:05+0000", "cpus": 2}
        environment |= {"python": "3.12.1", "gpus": [], "world_size": 1, "versions": {"torch": torch.__version__}}
        (run / "environment.json").write_text(json.dumps(environment))
        write_metrics(run / "metrics.jsonl", understands, teacher, 240.0 if understands else 120.0)
        evaluation = run / "eval"
        if understands:
            protocol = {"data": "scenes:test", "label": "shape", "prompts": 8, "images": 1000, "tokenizer": str(run)}
            write_result(evaluation, "zero-shot-shape", "zero-shot", {"top1": 0.81, "chance": 0.125}, protocol)
        protocol = {"data": "scenes:test", "label": "letter", "features": "cls: class token", "images": 300}
        probe = {"top1": 0.5, "top5": 0.8, "chance": 1 / 26, "penalty": 0.1}
        write_result(evaluation, "linear-letter", "linear", probe, protocol)
        protocol = {"data": "scenes:test", "images": 5000, "extractor": "judge at 32 px"}
        fidelity = {"psnr": 24.2, "ssim": 0.9, "rfd_judge": rfd}
        write_result(evaluation, "reconstruction", "reconstruction", fidelity, protocol)
        for name, scale, distance in (
            ("generation", 2.0, gfd),
            ("generation_unguided", 1.0, gfd + 1 if unguided is None else unguided),
        ):
            protocol = {"reference": "scenes:test", "extractor": "judge at 32 px", "label": "shape", "cfg_scale": scale}
            protocol |= {"samples": str(run / "samples"), "num": 1024}
            metrics = {
                "gfd_judge": distance,
                "class_agreement": 0.7,
                "real.gfd_judge": 0.5,
                "real.class_agreement": 0.9,
            }
            metrics |= {"reconstructed.gfd_judge": rfd, "reconstructed.class_agreement": 0.8}
            write_result(evaluation, name, "generation", metrics, protocol)
        (run / "dit").mkdir()
        dit = [{"step": s, "total": 2 / s, "mse": 1 / s, "images": 64 * s, "seconds": s} for s in range(1, 40)]
        (run / "dit" / "metrics.jsonl").write_text("\n".join(map(json.dumps, dit)))
        (run / "latents").mkdir()
        (run / "latents" / "stats.json").write_text(
            json.dumps({"label": "shape", "classes": "circle square triangle star cross ring heart diamond".split()})
        )
        (run / "samples").mkdir()
        rng = np.random.default_rng(1)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(run / "samples" / f"{i:06d}.png")
        classes = {"circle": 0, "square": 1}
        (run / "samples" / "samples.json").write_text(json.dumps({"num": 8, "steps": 50, "classes": classes}))
        return run

    return make
