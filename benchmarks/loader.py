"""What loading costs, beside the usual ways. One process a figure, one JSON line a figure.

    python benchmarks/loader.py              all of them
    python benchmarks/loader.py FIGURE ...   some

Rates are of one thread, by the clock of this process's CPU, so that a busy machine blurs them less; peers take turns in
the same process and see the same JPEGs.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from vtp.data.augment import AugmentConfig, finish
from vtp.data.batches import Batch
from vtp.data.loader import Loader
from vtp.data.scenes import draw
from vtp.data.sources import open_source
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.recipes import pretrain_recipe
from vtp.tokenizers import get_tokenizer

PICTURES, REPEATS = 64, 5
FULL = ViewsConfig(size=256, global_size=256, local_size=96, local_crops=8)
PIL_WAY = "torchvision transforms on PIL images (DINOv2's)"
# What a good trainer reaches with a ViT-L in bf16 on an H100 or H200, 45% of 989 TFLOP/s; assumed, no GPU is used here.
GPU_FLOPS = 445e12


def jpeg(i: int, width: int = 500, height: int = 375) -> bytes:
    """Coloured noise with a photograph's spectrum, about 100 kB."""
    rng = np.random.default_rng(i)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.sqrt(fy**2 + fx**2), 1 / width) ** 1.1
    phase = np.exp(2j * np.pi * rng.random((3, height, width // 2 + 1)))
    grey, *tints = np.fft.irfft2(falloff * phase, s=(height, width))
    x = np.stack([grey, 0.9 * grey + 0.3 * tints[0], 0.8 * grey + 0.3 * tints[1]], -1)
    x = x / x.std() * 50 + 118 + rng.normal(0, 3, x.shape)
    buffer = io.BytesIO()
    Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, pictures: Sequence[bytes], n: int | None = None) -> str:
    """A shard of `n` captioned samples, the pictures over and over."""
    with tarfile.open(path, "w") as tar:
        for i in range(len(pictures) if n is None else n):
            caption = b"a picture of coloured noise, number %d" % i
            for suffix, data in (("jpg", pictures[i % len(pictures)]), ("txt", caption)):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def dinov2_views(size: int = 256, local: int = 96, local_crops: int = 8):
    """The views of `FULL` with torchvision's transforms on PIL images, as DINOv2 makes them."""
    from torchvision import transforms as t

    jitter = [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), t.RandomGrayscale(0.2)]
    end = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

    def blur(p: float):
        def apply(image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item()))

        return t.RandomApply([t.Lambda(apply)], p)

    def crop(size: int, scale: tuple[float, float]):
        bicubic = t.InterpolationMode.BICUBIC
        return [t.RandomResizedCrop(size, scale, interpolation=bicubic), t.RandomHorizontalFlip()]

    first = t.Compose([*crop(size, (0.32, 1)), *jitter, blur(1.0), *end])
    second = t.Compose([*crop(size, (0.32, 1)), *jitter, blur(0.1), t.RandomSolarize(128, 0.2), *end])
    small = t.Compose([*crop(local, (0.05, 0.32)), *jitter, blur(0.5), *end])
    clip = t.Compose([crop(size, (0.9, 1))[0], *end])

    def views(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [clip(image), first(image), second(image), *(small(image) for _ in range(local_crops))]

    return views


def open_clip_pipeline(shard: str, tokenizer):
    """open_clip's training pipeline on webdataset, without its shuffling."""
    import webdataset as wds
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(size=256), is_train=True)
    return wds.DataPipeline(
        wds.SimpleShardList([shard]),
        wds.tarfile_to_samples(),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(16),
    )


def stream(data: str, views: ViewsConfig, batch: BatchConfig, patch: int = 16, **options) -> Loader:
    return Loader(open_source(data), views, batch, get_tokenizer(), patch_size=patch, **options)


def take(loader: Loader, n: int, then: Callable[[Batch], object] = lambda batch: None) -> None:
    for batch in itertools.islice(loader, n):
        then(batch)


def on_device(batch: Batch) -> Batch:
    """What the training device does with a batch."""
    return finish(batch, AugmentConfig(), torch.Generator().manual_seed(0))


def line(name: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None, **more) -> None:
    found = {"name": name, "value": round(value, 1), "unit": unit, "peer": peer}
    found |= {"peer_value": peer_value and round(peer_value, 1), "ratio": peer_value and round(value / peer_value, 2)}
    print(json.dumps(found | more), flush=True)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def rates(pictures: int, *ways: Callable[[], object]) -> list[float]:
    """Pictures a second of each way, for as many pictures in each; they take turns, the median counts."""
    for way in ways:
        way()
    turns = [[seconds(way) for way in ways] for _ in range(REPEATS)]
    return [pictures / statistics.median(times) for times in zip(*turns, strict=True)]


# --- the figures; a folder each ---


def views(name: str, all_on_cpu: bool, folder: Path) -> None:
    """CLIP view shared with reconstruction, two global and eight local crops, from 500 x 375 JPEGs."""
    pictures, theirs = [jpeg(i) for i in range(PICTURES)], dinov2_views()
    ours = stream(write_shard(folder / "0.tar", pictures), FULL, BatchConfig(clip=16, ssl=16, rec=16), shuffle=PICTURES)
    then = on_device if all_on_cpu else lambda batch: None
    rate, peer = rates(
        PICTURES, lambda: take(ours, PICTURES // 16, then), lambda: [theirs(picture) for picture in pictures]
    )
    line(name, rate, "images/s per core", PIL_WAY, peer)


def device_side(folder: Path) -> None:
    """What is left to the training device, here on a CPU core."""
    shard = write_shard(folder / "0.tar", [jpeg(i) for i in range(16)])
    batch = next(stream(shard, FULL, BatchConfig(clip=16, ssl=16, rec=16), shuffle=16))
    line("views_device_side", *rates(16, lambda: on_device(batch)), "images/s per core")


def clip_view(folder: Path) -> None:
    shard = write_shard(folder / "0.tar", [jpeg(i) for i in range(PICTURES)])
    ours = stream(shard, FULL, BatchConfig(clip=16, ssl=0, rec=0), shuffle=PICTURES)
    theirs = open_clip_pipeline(shard, get_tokenizer())
    rate, peer = rates(PICTURES, lambda: take(ours, PICTURES // 16), lambda: list(theirs))
    line("clip_view", rate, "images/s per core", "open_clip's webdataset pipeline", peer)


def scenes(folder: Path) -> None:
    """Drawn with captions and labels, cropped and tokenised by the loader: batches of the CLIP objective.

    As in a run behind its first seconds: the masks of letters and words, kept for good, are made before.
    """
    small = ViewsConfig(size=32, global_size=32, local_size=16)
    ours = stream("scenes", small, BatchConfig(clip=128, ssl=0, rec=0), 8)
    take(ours, 80)
    rate, drawn = rates(2048, lambda: take(ours, 16), lambda: [draw(i, 32) for i in range(2048)])
    line("scenes_32px", rate, "images/s per core", drawn_alone=round(drawn))


def memory(folder: Path) -> None:
    """Growth of what this process and its worker hold, over 50,000 samples behind the first 10,000."""
    pictures = [jpeg(i, 320, 240) for i in range(PICTURES)]
    for i in range(8):
        write_shard(folder / f"{i}.tar", pictures, 1_000)
    small = ViewsConfig(size=32, global_size=32, local_size=16, local_crops=2)
    ours = stream(str(folder), small, BatchConfig(clip=100, ssl=100, rec=100), workers=1)
    held = []
    for n, batch in enumerate(itertools.islice(ours, 600)):
        on_device(batch)
        if n % 10 == 9:
            held.append(megabytes())
    line("memory_growth", max(held[10:]) - max(held[:10]), "MB", at_warm_up=round(max(held[:10])))


def megabytes() -> float:
    """Memory of this process and its children; not the libraries, whose pages come and go with other programs."""
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    maps = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes]
    found = [int(kb) for text in maps for kb in re.findall(r"^(?:Anonymous|Pss_Shmem):\s+(\d+)", text, re.M)]
    return sum(found) / 1e3


def start_up(folder: Path) -> None:
    """From `python` to the first batch, of 1,000 shards of 100 pictures; a wall clock, and two workers."""
    pictures = [jpeg(i, 160, 120) for i in range(PICTURES)]
    for i in range(1_000):
        write_shard(folder / f"{i:04d}.tar", pictures, 100)
    begun = time.perf_counter()
    child = [sys.executable, __file__, f"first_batch={folder}"]
    opening, first = map(float, subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.split())
    line("start_up_1000_shards", first - begun, "s", of_which_imports=round(opening - begun, 1))


def first_batch(data: str) -> None:
    """Print the system's clock before anything is opened and at the first batch."""
    print(time.perf_counter())
    ours = stream(data, FULL, BatchConfig(clip=64, ssl=16, rec=16), workers=2)
    next(ours)
    print(time.perf_counter())
    ours.close()


def cores(name: str, folder: Path) -> None:
    """Worker cores that keep a GPU busy with a recipe of the paper, whose batches are in the proportions 16 : 2 : 1."""
    from vtp.pretrain.flops import step_flops
    from vtp.pretrain.objectives import Pretraining

    cfg = replace(pretrain_recipe(name), perceptual="none")  # without VGG: fewer FLOPs a pair, so rather more cores
    shard = write_shard(folder / "0.tar", [jpeg(i) for i in range(PICTURES)])
    ours = stream(shard, cfg.views, BatchConfig(clip=64, ssl=8, rec=4), shuffle=PICTURES)
    batch = on_device(next(ours))
    full = cfg.model.text.context_length
    captions = batch.clip._replace(tokens=torch.ones(64, full, dtype=torch.int64), lengths=(full,) * 64)
    batch = batch._replace(clip=captions)
    with torch.device("meta"):  # shapes only: nothing is computed
        flops = step_flops(Pretraining(cfg), batch) / 64
    pairs = GPU_FLOPS / flops
    (rate,) = rates(PICTURES, lambda: take(ours, 1))
    more = {"gflop_per_pair": round(flops / 1e9), "assumed_tflops": round(GPU_FLOPS / 1e12)}
    more |= {"gpu_pairs_per_s": round(pairs), "worker_pairs_per_s": round(rate)}
    line(f"cores_for_an_h200_{name}", pairs / rate, "cores", **more)


FIGURES = {
    "views_worker": partial(views, "views_worker", False),
    "views_device_side": device_side,
    "views_all_on_cpu": partial(views, "views_all_on_cpu", True),
    "clip_view": clip_view,
    "scenes_32px": scenes,
    "memory_growth": memory,
    "start_up_1000_shards": start_up,
    "cores_for_an_h200_base": partial(cores, "base"),
    "cores_for_an_h200_large": partial(cores, "large"),
}


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        for name in argv or FIGURES:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if argv[0].startswith("first_batch="):
        first_batch(argv[0].partition("=")[2])
        return
    if argv[0] not in FIGURES:
        raise SystemExit(f"no figure {argv[0]!r}; one of {', '.join(FIGURES)}")
    with tempfile.TemporaryDirectory() as folder:
        FIGURES[argv[0]](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
