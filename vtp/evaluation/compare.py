"""Tokenizers side by side: the same pictures, the same crops, each with its protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
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


class Compared(NamedTuple):
    """One tokenizer's results object, and what it made of the pictures to be shown."""

    result: dict[str, Any]
    shown: Float[Tensor, "n 3 s s"]  # ImageNet-normalised, on the CPU


class Timed:
    """A codec whose passes are timed. The first batch pays for memory and kernels: it counts only if it is alone."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.latent: tuple[int, ...] = ()  # (channels, rows, columns)
        self._passes: list[tuple[int, float, float]] = []  # (images, seconds of encoding, of decoding)

    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        """There and back."""
        images = images.to(self.codec.device)
        times = [self._now()]
        latents = self.codec.encode(images)
        times.append(self._now())
        back = self.codec.decode(latents)
        times.append(self._now())
        self.latent = tuple(latents.shape[1:])
        self._passes.append((len(images), times[1] - times[0], times[2] - times[1]))
        return back

    def rates(self) -> dict[str, float]:
        """Images a second."""
        images, encoding, decoding = (sum(column) for column in zip(*(self._passes[1:] or self._passes), strict=True))
        return {"encode_images_per_second": images / encoding, "decode_images_per_second": images / decoding}

    def _now(self) -> float:
        if self.codec.device.type == "cuda":
            torch.cuda.synchronize(self.codec.device)
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
    compared = []
    for folder in tokenizers:
        codec, seen = open_codec(folder, cfg.device, cfg.precision), Seen()
        timed = Timed(codec)
        batches = image_batches(source, size, cfg.batch_size, center_crop, cfg.limit)
        metrics = reconstruction(timed, seen.passing(batches), network)
        protocol = {"data": data, "images": seen.count, "resize": "centre crop", "size": size}
        protocol |= {"precision": codec.precision, "batch_size": cfg.batch_size, "device": str(device)}
        protocol |= {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
        protocol |= {} if network is None else {"extractor": network.protocol}
        result = write_result(
            None,
            task="compare",
            metrics=metrics | timed.rates(),
            protocol=protocol,
            weights=codec.make.weights,
            data_sha256=seen.sha256,
        )
        values = timed.latent[0] * timed.latent[1] * timed.latent[2]
        result["tokenizer"] = {
            "folder": str(folder),
            "kind": codec.make.kind,
            "latent": list(timed.latent),
            "compression": 3 * size**2 / values,
            "parameters": codec.parameters,
        }
        back = [codec.reconstruct(part).cpu() for part in shown.split(cfg.batch_size)]
        compared.append(Compared(result, torch.cat(back)))
    return compared
