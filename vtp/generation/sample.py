"""`vtp sample`: a diffusion run -> pictures. Picture i is made from noise seeded by i, whatever the batch size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from vtp.config import ConfigError
from vtp.engine.logging import progress_bar, say
from vtp.engine.optim import Asked, autocast, pick_device, pick_precision
from vtp.files import file_sha256
from vtp.flow.guidance import classifier_free
from vtp.flow.samplers import Velocity, dopri5, euler, heun
from vtp.flow.times import warped_times
from vtp.generation.latents import STATS, LatentStats
from vtp.images import to_uint8
from vtp.models.dit import LightningDiT
from vtp.models.published import open_tokenizer

SAMPLERS = {"euler": euler, "heun": heun, "dopri5": dopri5}
GRID_ROWS, GRID_COLUMNS = 16, 8


@torch.no_grad()
def sample(
    run: Path,
    out: Path,
    *,
    num: int = 64,
    steps: int = 50,
    cfg_scale: float = 1.0,
    classes: Sequence[str] | None = None,
    sampler: Literal["euler", "heun", "dopri5"] = "euler",
    shift: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = 64,
    tokenizer: Path | None = None,
    device: str = "auto",
    precision: Asked = "fp32",
) -> Path:
    """Write `num` pictures 000000.png ..., grid.png (a row for each class) and samples.json to `out`; returns it.

    Args:
        run: a diffusion run's folder, or the model folder in it.
        steps: integration steps; the published 250 grid points are 249 steps.
        cfg_scale: classifier-free guidance, 1 is none.
        classes: names or numbers of the classes to draw; all if None. Picture i is of class i modulo their number.
        shift: warp of the time grid; below 1 spends more steps near the noise.
        interval: times (0 noise, 1 data) between which guidance acts.
        seed: picture i's noise is seeded by (seed, i).
        tokenizer: where the tokenizer is now, if not where the latents were made.

    Raises:
        ConfigError: unfinished run, unknown class, another tokenizer than the latents', or `out` holds other pictures.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"{run} holds no finished model; train it to its end with `vtp train-dit`")
    stats = LatentStats.read(folder / STATS)
    chosen = _classes(stats.classes, classes)
    for name, value in {"num": num, "steps": steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if shift <= 0:
        raise ConfigError(f"shift must be above 0, not {shift}; 1 is a uniform grid")
    if out.is_dir() and any(out.iterdir()) and not (out / "samples.json").is_file():
        raise ConfigError(f"{out} is not empty and holds no samples.json; choose another --out")
    target = pick_device(device)
    used = pick_precision(precision, target)
    model = LightningDiT.from_pretrained(folder).to(target)
    decoder, place = _tokenizer(stats, tokenizer)
    decoder.to(target)
    times = warped_times(steps + 1, shift)

    def pictures(first: int, last: int) -> UInt8[Tensor, "b 3 H W"]:
        labels = torch.tensor([chosen[i % len(chosen)] for i in range(first, last)], device=target)
        velocity = classifier_free(
            _velocity(model, labels), _velocity(model, torch.full_like(labels, model.null_class)), cfg_scale, interval
        )
        with autocast(target, used):
            latents = SAMPLERS[sampler](velocity, _noise(seed, first, last, stats.shape).to(target), times)
            return to_uint8(decoder.get_latents_decoded_images(stats.denormalise(latents)))

    out.mkdir(parents=True, exist_ok=True)
    earlier = list(out.glob("*.png"))
    if earlier:  # pictures of an earlier call never mix with these
        say(f"replacing the samples in {out}")
    for old in (*earlier, out / "samples.json"):
        old.unlink(missing_ok=True)
    protocol: dict[str, Any] = {
        "num": num,
        "sampler": sampler,
        "steps": steps,
        "shift": shift,
        "cfg_scale": cfg_scale,
        "interval": list(interval),
        "seed": seed,
        "precision": used,
        "classes": {stats.classes[c]: c for c in chosen},
        "labels": "picture i is of class i modulo the number of classes, its noise seeded by (seed, i)",
        "dit": str(folder.resolve()),
        "dit_sha256": file_sha256(folder / "model.safetensors"),
        "tokenizer": str(place.resolve()),
        "tokenizer_sha256": stats.tokenizer_sha256,
    }
    (out / "samples.json").write_text(json.dumps(protocol, indent=2) + "\n")
    rows: dict[int, list[UInt8[np.ndarray, "H W 3"]]] = {c: [] for c in chosen[:GRID_ROWS]}
    with progress_bar("sample") as bar:
        task = bar.add_task("sample", total=num, status="")
        for first in range(0, num, batch_size):
            for i, image in enumerate(pictures(first, min(num, first + batch_size)).cpu(), start=first):
                array = image.permute(1, 2, 0).numpy()
                Image.fromarray(array).save(out / f"{i:06d}.png")
                row = rows.get(chosen[i % len(chosen)])
                if row is not None and len(row) < GRID_COLUMNS:
                    row.append(array)
            bar.update(task, completed=min(num, first + batch_size))
    _grid({stats.classes[c]: row for c, row in rows.items() if row}).save(out / "grid.png")
    say(f"{num} pictures in {out}")
    return out


def _velocity(model: LightningDiT, labels: Int[Tensor, " b"]) -> Velocity:
    return lambda x, t: model(x, torch.full((len(x),), t, device=x.device), labels).float()


def _noise(seed: int, first: int, last: int, shape: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise of pictures first..last-1, drawn on the CPU so that every device starts from the same."""
    generator = torch.Generator()

    def one(i: int) -> Tensor:
        state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=generator.manual_seed(int(state) % 2**63))

    return torch.stack([one(i) for i in range(first, last)])


def _classes(names: Sequence[str], asked: Sequence[str] | None) -> list[int]:
    """Numbers of the classes asked for by name or number."""
    if asked is None:
        return list(range(len(names)))
    chosen = []
    for name in asked:
        if name in names:
            chosen.append(names.index(name))
        elif name.isdigit() and int(name) < len(names):
            chosen.append(int(name))
        else:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ConfigError(f"no class '{name}'; there are {len(names)}: {shown}")
    return chosen


def _tokenizer(stats: LatentStats, moved: Path | None) -> tuple[Any, Path]:
    """The tokenizer that made the latents, wherever it is now."""
    place = Path(stats.tokenizer) if moved is None else moved
    weights = place / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"no tokenizer at {place}; say where it is with --tokenizer")
    if file_sha256(weights) != stats.tokenizer_sha256:
        raise ConfigError(f"the tokenizer at {place} is not the one that made the latents; say where that one is")
    return open_tokenizer(place), place


def _grid(rows: dict[str, list[UInt8[np.ndarray, "H W 3"]]]) -> Image.Image:
    """Pictures in rows, each with its class's name to the left; small ones are enlarged by whole factors."""
    side = next(iter(rows.values()))[0].shape[0]
    scale = max(1, 96 // side)
    cell, margin, gap = side * scale, 12 + 7 * max(map(len, rows)), 4
    columns = max(map(len, rows.values()))
    canvas = Image.new("RGB", (margin + columns * (cell + gap), gap + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(rows.items()):
        top = gap + r * (cell + gap)
        draw.text((6, top + cell // 2 - 6), name, fill="black")
        for c, image in enumerate(images):
            picture = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + c * (cell + gap), top))
    return canvas
