"""What a published tokenizer does to held-out images: arrays and names, no HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from vtp.data.samples import Source
from vtp.data.sources import open_source
from vtp.evaluation.run import EvalConfig, Opened
from vtp.evaluation.zero_shot import text_classifier
from vtp.images import center_crop, denormalise, normalise, squash, to_uint8
from vtp.metrics.fidelity import psnr

SHOWN = 8  # images whose reconstructions and features are shown
RETRIEVAL_POOL = 200  # image-caption pairs that are searched
QUERIES = 5  # of them shown, each way
CLASSES = 32  # a larger confusion matrix cannot be read: the commonest classes stand for the rest
PER_CLASS = 3  # images a class needs on average, or its confusions are noise


class Sample(NamedTuple):
    image: UInt8[ndarray, "h w 3"]
    captions: tuple[str, ...]
    labels: dict[str, int]


class HeldOut(NamedTuple):
    """Images no run was trained on, where `data` says so."""

    data: str
    samples: list[Sample]
    classes: dict[str, tuple[str, ...]]
    templates: dict[str, tuple[str, ...]]

    def shown(self) -> list[Sample]:
        """A few, spread over all of them."""
        return self.samples[:: max(1, len(self.samples) // SHOWN)][:SHOWN]


class Confusion(NamedTuple):
    label: str
    names: tuple[str, ...]
    counts: Int[ndarray, "k k"]  # rows: truth, columns: answer
    left_out: int  # classes that are too rare to be shown


class Hit(NamedTuple):
    place: int  # in the pool or among the captions
    right: bool


class Retrieval(NamedTuple):
    """Search in a pool of images and of their distinct captions; images with one caption share it."""

    pool: list[Sample]
    captions: list[str]
    queries: list[int]  # images whose nearest captions, and whose captions' nearest images, are shown
    texts: list[list[Hit]]  # per query the five nearest captions of its image
    images: list[list[Hit]]  # per query the five nearest images of its caption
    recalls: dict[str, tuple[float, float]]  # name -> (recall over the pool, chance)


def read_held_out(data: str, annotations: str | None, size: int) -> HeldOut:
    """A spread of samples of `data` at about `size` pixels; broken ones are passed over.

    Raises:
        ConfigError: no such data.
    """
    source = open_source(data, annotations)
    count = 2000 if size <= 64 else 200
    return HeldOut(data, list(islice(_samples(source, size, count), count)), source.classes, source.templates)


def _samples(source: Source, size: int, count: int) -> Iterator[Sample]:
    """From shards spread over the whole source: sorted class folders begin with one class alone."""
    shards = [source.shards[i * len(source.shards) // count] for i in range(count)]
    shards = list(dict.fromkeys(shards))
    for shard in shards:
        for raw in islice(source.read(shard, size), math.ceil(count / len(shards))):
            if (image := raw.pixels(source.report)) is None:
                continue
            yield Sample(image, raw.captions, raw.labels)


class Tokenizer:
    """A published tokenizer, opened for the report's pictures."""

    def __init__(self, folder: Path) -> None:
        opened = Opened(folder, EvalConfig())
        self.model, self.size, self.device = opened.model, opened.size, opened.device
        self.text_features = opened.text()  # sentences -> unit features in the space shared with images
        self.aligned = bool(self.model.config.train_clip)
        self.draws = bool(self.model.config.train_reconstruction)

    def _images(self, samples: Sequence[Sample], fit: Callable[[Any, int], Any]) -> Float[Tensor, "b 3 s s"]:
        squares = [np.asarray(fit(Image.fromarray(sample.image), self.size)) for sample in samples]
        return normalise(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)).to(self.device)

    @torch.inference_mode()
    def reconstructions(
        self, samples: Sequence[Sample]
    ) -> tuple[UInt8[ndarray, "b s s 3"], UInt8[ndarray, "b s s 3"], list[float]]:
        """(originals, reconstructions, PSNR in dB of each)."""
        images = self._images(samples, center_crop)
        decoded = self.model.get_latents_decoded_images(self.model.get_reconstruction_latents(images))
        decibels = psnr(denormalise(decoded), denormalise(images)).tolist()
        return _pixels(to_uint8(images)), _pixels(to_uint8(decoded)), decibels

    @torch.inference_mode()
    def feature_colours(
        self, samples: Sequence[Sample]
    ) -> tuple[UInt8[ndarray, "b s s 3"], UInt8[ndarray, "b rows columns 3"]]:
        """(originals, three principal components of the patch features of all of them together, as colours)."""
        images = self._images(samples, center_crop)
        tokens = self.model.trunk(images)
        return _pixels(to_uint8(images)), principal_colours(tokens.patches.float().unflatten(1, tokens.grid))

    @torch.inference_mode()
    def image_features(self, samples: Sequence[Sample], batch: int = 50) -> Float[Tensor, "n t"]:
        """Unit features in the space shared with text."""
        parts = [samples[i : i + batch] for i in range(0, len(samples), batch)]
        return torch.cat([self.model.get_clip_image_feature(self._images(part, squash)).float() for part in parts])

    def confusion(self, held_out: HeldOut, features: Float[Tensor, "n t"], label: str) -> Confusion | None:
        """Zero-shot answers for one label over its held-out images, whose features are given; None for too few."""
        truth = np.array([s.labels.get(label, -1) for s in held_out.samples])
        names = held_out.classes[label]
        seen = np.bincount(truth[truth >= 0], minlength=len(names))
        kept = np.sort(np.argsort(-seen, kind="stable")[:CLASSES])
        kept = kept[seen[kept] > 0]
        if len(kept) < 2 or seen[kept].sum() < PER_CLASS * len(kept):
            return None
        classifier = text_classifier(self.text_features, [names[k] for k in kept], held_out.templates[label])
        rows = np.flatnonzero(np.isin(truth, kept))
        answers = (features[rows] @ classifier).argmax(1).cpu().numpy()
        counts = np.zeros((len(kept), len(kept)), np.int64)
        np.add.at(counts, (np.searchsorted(kept, truth[rows]), answers), 1)
        return Confusion(label, tuple(names[k] for k in kept), counts, len(names) - len(kept))

    def retrieval(self, held_out: HeldOut) -> Retrieval | None:
        """Image to text and text to image over a pool of captioned images; None where there are too few."""
        pool = [s for s in held_out.samples if s.captions][:RETRIEVAL_POOL]
        captions, own = np.unique([s.captions[0] for s in pool], return_inverse=True)
        if len(captions) < 10:
            return None
        similarity = (self.image_features(pool) @ self.text_features(captions.tolist()).T).cpu()  # [images, captions]
        right = torch.from_numpy(own[:, None] == np.arange(len(captions)))
        queries = list(range(0, len(pool), len(pool) // QUERIES))[:QUERIES]
        recalls = {}
        for name, scores, wanted in (("image to text", similarity, right), ("text to image", similarity.T, right.T)):
            for k in (1, 5):
                found = wanted.gather(1, scores.topk(k).indices).any(1).float().mean()
                recalls[f"{name}, recall@{k}"] = (float(found), _chance(wanted.sum(1).tolist(), wanted.shape[1], k))
        return Retrieval(
            pool,
            captions.tolist(),
            queries,
            _hits(similarity, right, queries),
            _hits(similarity.T, right.T, own[queries].tolist()),
            recalls,
        )


def _hits(scores: Float[Tensor, "q n"], right: Bool[Tensor, "q n"], queries: Sequence[int]) -> list[list[Hit]]:
    nearest = scores[queries].topk(5).indices.tolist()
    return [[Hit(i, bool(right[q, i])) for i in row] for q, row in zip(queries, nearest, strict=True)]


def _chance(relevant: Sequence[int], n: int, k: int) -> float:
    """Mean probability that k of n drawn blindly hold one of the m right ones: 1 - C(n-m, k) / C(n, k)."""
    return sum(1 - math.comb(n - m, k) / math.comb(n, k) for m in relevant) / len(relevant)


def principal_colours(features: Float[Tensor, "b rows columns d"]) -> UInt8[ndarray, "b rows columns 3"]:
    """The first three principal components over all images and places as red, green and blue.

    Each component is scaled from its 1st to its 99th percentile; its sign, which is arbitrary, is the one that makes
    its largest weight positive.
    """
    x = features.flatten(0, 2)
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    components = F.pad(x @ directions.T, (0, 3 - len(directions)))
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return (colours * 255).round().to(torch.uint8).unflatten(0, features.shape[:3]).cpu().numpy()


def _pixels(images: UInt8[Tensor, "b 3 h w"]) -> UInt8[ndarray, "b h w 3"]:
    return images.permute(0, 2, 3, 1).cpu().numpy()
