"""Encoding and decoding, beside upstream VTP and the SD-VAE, alternating in this process. One JSON line a figure.

    PEERS_SRC=DIR python benchmarks/tokenizer.py

DIR/MiniMax-AI+VTP is a checkout of upstream; without PEERS_SRC its lines are left out, as are those of diffusers where
it is not installed. VTP-S at 256 px in batches of 8 on 2 cores, random weights, the same in both; bf16 is autocast;
upstream is not compiled, ours is as it is and by torch.compile with frozen weights (TORCHINDUCTOR_FREEZING=1).
Rates are medians of rounds, ratios medians of the rounds' ratios. Memory is what one encode adds to the peak of a fresh
process that has loaded the model (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from figures import line, watch_peak
from torch import Tensor, nn
from torch._inductor import config as inductor

SIZE, BATCH, THREADS, ROUNDS = 256, 8, 2, 15
SLOW_BATCH, SLOW_ROUNDS = 2, 3  # the SD-VAE takes seconds for two pictures
WIDTHS = {"vision_embed_dim": 384, "vision_num_heads": 6, "decoder_embed_dim": 384, "decoder_num_heads": 6}
UPSTREAM = "upstream VTP"
TOLERANCE = {"fp32": 0.02, "bf16": 0.05}  # of the largest output; queries and keys are rounded to bf16 in either


def our_model() -> nn.Module:
    from vtp.models.vtp_hf import VTPConfig, VTPModel

    torch.manual_seed(0)
    return VTPModel(VTPConfig(train_clip=False, **WIDTHS)).eval()


def upstream_model(source: Path) -> nn.Module:
    """Upstream's class, under another name than ours; its weights are ours."""
    name = "upstream_vtp"
    root = source / "MiniMax-AI+VTP" / "vtp"
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    module = importlib.import_module(f"{name}.models.vtp_hf")
    model = module.VTPModel(module.VTPConfig(train_clip=False, **WIDTHS)).eval()
    model.load_state_dict(our_model().state_dict())
    return model


def sd_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIZE,
    ).eval()


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def measured(run: Callable[[], Tensor], precision: str) -> tuple[float, Tensor]:
    """(seconds, output)"""
    with torch.no_grad(), autocast(precision):
        start = time.perf_counter()
        out = run()
        return time.perf_counter() - start, out


def alternate(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], precision: str, rounds: int) -> list[tuple]:
    """(our seconds, their seconds) of each round, taking turns in going first; one round to warm up is left out."""
    pairs = []
    for i in range(rounds + 1):
        if i % 2:
            a, b = measured(ours, precision)[0], measured(theirs, precision)[0]
        else:
            b, a = measured(theirs, precision)[0], measured(ours, precision)[0]
        pairs.append((a, b))
    return pairs[1:]


def rates(name: str, pairs: list[tuple], batches: tuple[int, int], peer: str) -> None:
    """Print images a second; the two may have had batches of different sizes."""
    ratio = statistics.median(b / a for a, b in pairs) * batches[0] / batches[1]
    value, peer_value = (
        n / statistics.median(times) for n, times in zip(batches, zip(*pairs, strict=True), strict=True)
    )
    line(name, value, "images/s", peer, peer_value, ratio)


def check(ours: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    error = ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
    if error > tolerance:
        raise SystemExit(f"{name}: outputs differ by {error:.1e} of the largest; at most {tolerance} are rounding")


def beside_upstream(source: Path, precision: str, images: Tensor) -> None:
    models = our_model(), upstream_model(source)
    encoders = [partial(m.get_reconstruction_latents, images) for m in models]
    latents = measured(encoders[1], precision)[1]
    decoders = [partial(m.get_latents_decoded_images, latents) for m in models]
    for name, pair in (("encode", encoders), ("decode", decoders)):
        name = f"VTP-S {name}, {precision}"
        check(*(measured(run, precision)[1] for run in pair), TOLERANCE[precision], name)
        rates(name, alternate(*pair, precision, ROUNDS), (BATCH, BATCH), UPSTREAM)
        pair = [partial(torch.compile(pair[0].func), *pair[0].args), pair[1]]
        with inductor.patch(freezing=True):  # weights laid out for the products, once; torch.compile's option does not
            check(*(measured(run, precision)[1] for run in pair), TOLERANCE[precision], name)
        rates(f"{name}, torch.compile", alternate(*pair, precision, ROUNDS), (BATCH, BATCH), UPSTREAM)


def beside_sd_vae(precision: str, images: Tensor) -> None:
    model, vae, few = our_model(), sd_vae(), images[:SLOW_BATCH]
    encoders = (partial(model.get_reconstruction_latents, images), lambda: vae.encode(few).latent_dist.mode())
    latents = [measured(run, precision)[1] for run in encoders]
    decoders = (partial(model.get_latents_decoded_images, latents[0]), lambda: vae.decode(latents[1]).sample)
    for name, pair in (("encode", encoders), ("decode", decoders)):
        pairs = alternate(*pair, precision, SLOW_ROUNDS)
        rates(f"VTP-S {name}, {precision}", pairs, (BATCH, SLOW_BATCH), "diffusers AutoencoderKL, SD-VAE configuration")


def encode_memory(whose: str, precision: str, source: str) -> None:
    """Print the MB that one encode adds to the peak of this process."""
    model = our_model() if whose == "ours" else upstream_model(Path(source))
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the model left free would hide what encoding takes
    added = watch_peak()
    measured(lambda: model.get_reconstruction_latents(images), precision)
    print(added())


def memory(source: Path, precision: str) -> None:
    def fresh(whose: str) -> float:
        command = [sys.executable, __file__, "memory", whose, precision, str(source)]
        done = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
        return statistics.median(float(d.stdout.split()[-1]) for d in done)

    ours, theirs = fresh("ours"), fresh("upstream")
    line(f"VTP-S encode, {precision}, peak memory added", ours, "MB", UPSTREAM, theirs, theirs / ours)


def main() -> None:
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["memory"]:
        return encode_memory(*sys.argv[2:])
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    source = os.environ.get("PEERS_SRC")
    for precision in ("fp32", "bf16"):
        if source is not None:
            beside_upstream(Path(source), precision, images)
            memory(Path(source), precision)
        if importlib.util.find_spec("diffusers") is not None:
            beside_sd_vae(precision, images)


if __name__ == "__main__":
    main()
