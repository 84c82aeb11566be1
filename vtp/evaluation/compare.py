"""Tokenizers side by side: the same pictures, the same crops, each with its protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vtp.config import ConfigError
from vtp.data.passes import image_batches
from vtp.data.sources import open_source
from vtp.engine.optim import pick_device
from vtp.evaluation.codecs import Codec, open_codec, read_make
from vtp.evaluation.reconstruction import reconstruction
from vtp.evaluation.results import Seen, write_result
from vtp.evaluation.run import EvalConfig, open_extractor
from vtp.images import center_crop

PASSES = 5  # that are timed


class Compared(NamedTuple):
    """One tokenizer's results object, and what it made of the pictures to be shown."""

    result: dict[str, Any]
    shown: Float[Tensor, "n 3 s s"]  # ImageNet-normalised, on the CPU


def rates(codecs: Sequence[Codec], images: Float[Tensor, "b 3 H W"]) -> list[dict[str, float]]:
    """Images a second that each codec encodes and decodes: medians of `PASSES` passes over the same images.

    The passes go round the codecs in turn, so that a busy minute of the machine falls on all of them alike, after one
    round that is not counted, which pays for memory and kernels.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in codecs]
    for i in range(1 + PASSES):
        for codec, passes in zip(codecs, seconds, strict=True):
            here = images.to(codec.device)
            times = [_now(codec)]
            latents = codec.encode(here)
            times.append(_now(codec))
            codec.decode(latents)
            times.append(_now(codec))
            if i > 0:
                passes.append((times[1] - times[0], times[2] - times[1]))
    names = ("encode_images_per_second", "decode_images_per_second")
    return [
        {name: len(images) / median(column) for name, column in zip(names, zip(*passes, strict=True), strict=True)}
        for passes in seconds
    ]


def _now(codec: Codec) -> float:
    if codec.device.type == "cuda":
        torch.cuda.synchronize(codec.device)
    return time.perf_counter()


def common_size(tokenizers: Sequence[Path], size: int | None) -> int:
    """The side at which all are compared: the one asked for, or else the one that the tokenizers' files agree on.

    Raises:
        ConfigError: one that is no tokenizer, none or several sizes, or a size that some patch does not divide.
    """
    makes = {folder: read_make(folder) for folder in tokenizers}
    if size is None:
        sizes = {make.size for make in makes.values() if make.size is not None}
        if len(sizes) != 1:
            found = f"are made for {', '.join(map(str, sorted(sizes)))} pixels" if sizes else "do not tell their size"
            raise ConfigError(f"the tokenizers {found}; say --size")
        (size,) = sizes
    for folder, make in makes.items():
        if size % make.patch:
            raise ConfigError(f"size={size} is not a multiple of the patch of {folder}, {make.patch} pixels")
    return size


def compare(
    tokenizers: Sequence[Path],
    data: str,
    size: int,
    shown: Float[Tensor, "n 3 s s"],
    *,
    extractor: str | None = None,
    cfg: EvalConfig,
) -> list[Compared]:
    """Encode and decode the images of `data`, centre-cropped at `size`, with each tokenizer in turn.

    All of them are in memory together, for the rates: see `rates`. These are of the first batch.

    Args:
        shown: ImageNet-normalised pictures that each reconstructs besides, to be looked at.
        extractor: as in `vtp eval reconstruction`.
        cfg: limit, batch_size, device, precision and annotations count.

    Returns:
        For each a results object: metrics psnr, ssim, the r-distance that the extractor names, and images a second of
        encoding and decoding; with "tokenizer": folder, kind, latent shape, compression (pixel values for each latent
        value) and parameters.

    Raises:
        ConfigError: as `vtp eval reconstruction`.
    """
    source, device = open_source(data, cfg.annotations), pick_device(cfg.device)
    network = None if extractor is None else open_extractor(extractor, device)
    codecs = [open_codec(folder, cfg.device, cfg.precision) for folder in tokenizers]

    def batches() -> Iterator[tuple[Tensor, Any]]:
        return image_batches(source, size, cfg.batch_size, center_crop, cfg.limit)

    seen = [Seen() for _ in codecs]
    quality = [
        reconstruction(codec.reconstruct, s.passing(batches()), network) for codec, s in zip(codecs, seen, strict=True)
    ]
    first, _ = next(batches())
    compared = []
    for folder, codec, s, metrics, rate in zip(tokenizers, codecs, seen, quality, rates(codecs, first), strict=True):
        protocol = {"data": data, "images": s.count, "resize": "centre crop", "size": size}
        protocol |= {"precision": codec.precision, "batch_size": cfg.batch_size, "device": str(device)}
        protocol |= {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
        protocol |= {} if network is None else {"extractor": network.protocol}
        protocol |= {"rates": f"medians of {PASSES} passes over {len(first)} images, tokenizers in turn"}
        result = write_result(
            None,
            task="compare",
            metrics=metrics | rate,
            protocol=protocol,
            weights=codec.make.weights,
            data_sha256=s.sha256,
        )
        latent = tuple(codec.encode(shown[:1].to(codec.device)).shape[1:])
        result["tokenizer"] = {
            "folder": str(folder),
            "kind": codec.make.kind,
            "latent": list(latent),
            "compression": shown[0].numel() / math.prod(latent),
            "parameters": codec.parameters,
        }
        back = [codec.reconstruct(part.to(codec.device)).cpu() for part in shown.split(cfg.batch_size)]
        compared.append(Compared(result, torch.cat(back)))
    return compared
