"""A referee for runs too small for ImageNet networks: a classifier trained in seconds on the set's own labels.

It says whether a generated picture shows the class that was asked for, and its features carry a Frechet distance,
`fd_judge`: comparable between runs with the same judge only, and never called FID.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtp.config import ConfigError
from vtp.data.samples import Source
from vtp.files import as_new, file_sha256
from vtp.images import normalise, squash
from vtp.metrics.extractors import Extractor
from vtp.models.cnn import ConvClassifier

ABSENT = -100  # a label that does not apply to a picture: no loss, no answer


def train_judge(
    source: Source,
    labels: Sequence[str],
    *,
    size: int = 32,
    images: int = 8_000,
    epochs: int = 5,
    batch_size: int = 64,
    lr: float = 4e-3,
    width: int = 32,
    seed: int = 0,
) -> ConvClassifier:
    """Train a classifier for several labels of a source at once; the same seed gives the same weights.

    AdamW with a one-cycle rate, on pictures shifted by up to an eighth of their side.

    Raises:
        ConfigError: a label that the source does not have.
    """
    pictures, targets = labelled_pictures(source, labels, size, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ConvClassifier({label: source.classes[label] for label in labels}, size, width)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(pictures) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(pictures), generator=generator).split(batch_size):
            if len(rows) < batch_size and len(pictures) >= batch_size:
                continue
            logits = judge(normalise(_shifted(pictures[rows], size // 8, generator)))
            losses = [
                F.cross_entropy(logits[label], targets[rows, i], ignore_index=ABSENT) for i, label in enumerate(labels)
            ]
            optimizer.zero_grad()
            # A batch without any picture of a label has no mean.
            torch.stack([loss for loss in losses if not loss.isnan()]).sum().backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


def judge_accuracy(judge: ConvClassifier, source: Source, images: int) -> dict[str, float]:
    """Top-1 accuracy of every label on pictures of a source, which should be held out."""
    pictures, targets = labelled_pictures(source, list(judge.classes), judge.size, images)
    correct = torch.zeros(targets.shape[1])
    for rows in torch.arange(len(pictures)).split(256):
        for i, guess in enumerate(answers(judge, pictures[rows]).values()):
            correct[i] += (guess == targets[rows, i]).sum()
    return dict(zip(judge.classes, (correct / (targets != ABSENT).sum(0)).tolist(), strict=True))


@torch.no_grad()
def answers(judge: ConvClassifier, pictures: UInt8[Tensor, "b 3 h w"]) -> dict[str, Int[Tensor, " b"]]:
    """The judge's class of every picture, for each label."""
    device = next(judge.parameters()).device
    return {label: logits.argmax(1).cpu() for label, logits in judge(normalise(pictures.to(device))).items()}


def save_judge(judge: ConvClassifier, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"classes": judge.classes, "size": judge.size, "width": judge.width}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(judge.state_dict(), folder / "model.safetensors")
    as_new(folder / "model.safetensors")


def load_judge(folder: Path, device: torch.device | str = "cpu") -> ConvClassifier:
    """Read what `save_judge` wrote.

    Raises:
        ConfigError: the folder holds no judge, or another model.
    """
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ConfigError(f"no judge in {folder}: it should hold config.json and model.safetensors")
    try:
        judge = ConvClassifier(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds no judge, or a damaged one: {str(error).splitlines()[0]}") from None
    return judge.to(device).eval().requires_grad_(False)


def judge_extractor(folder: Path, device: torch.device | str = "cpu") -> Extractor:
    """The features of a saved judge; the figure is `fd_judge`, and the protocol says which judge it was."""
    judge = load_judge(folder, device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Float[Tensor, "b d"]:
        return judge.features(normalise(pictures.to(device)))

    digest = file_sha256(folder / "model.safetensors")[:12]
    return Extractor("fd_judge", f"judge {digest} of {', '.join(judge.classes)} at {judge.size} px", features)


def labelled_pictures(
    source: Source, labels: Sequence[str], size: int, limit: int
) -> tuple[UInt8[Tensor, "n 3 size size"], Int[Tensor, "n labels"]]:
    """The first pictures that carry any of the labels (of a folder: drawn at random), and their classes or ABSENT."""
    unknown = [label for label in labels if label not in source.classes]
    if unknown:
        raise ConfigError(f"{source.name} has no label '{unknown[0]}' (its labels: {', '.join(source.classes)})")
    shards = source.shards
    if source.random_access:
        shards = [shards[i] for i in np.random.default_rng(0).permutation(len(shards))[: 4 * limit].tolist()]
    pictures, targets = [], []
    for raw in (raw for shard in shards for raw in source.read(shard, size)):
        row = [raw.labels.get(label, ABSENT) for label in labels]
        if set(row) == {ABSENT}:
            continue
        if (image := raw.pixels(source.report)) is None:
            continue
        pictures.append(np.asarray(squash(Image.fromarray(image), size)))
        targets.append(row)
        if len(pictures) == limit:
            break
    if not pictures:
        raise ConfigError(f"{source.name} has no readable picture with {' or '.join(labels)}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def _shifted(pictures: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """All pictures of a batch shifted alike, edges repeated: a shift for each would cost a copy for each."""
    side = pictures.shape[-1]
    padded = F.pad(pictures.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    y, x = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    return padded[..., y : y + side, x : x + side]
