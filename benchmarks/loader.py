"""Pictures a second that one core loads, beside the usual ways, alternating in this process. One JSON line a figure.

    python benchmarks/loader.py

Times are of this process's CPU on one thread, so that a busy machine blurs them less; both sides see the same JPEGs.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from vtp.data import scenes
from vtp.data.augment import AugmentConfig, finish
from vtp.data.loader import Loader
from vtp.data.sources import open_source
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.tokenizers import get_tokenizer

PICTURES, REPEATS = 64, 5
FULL = ViewsConfig(size=256, global_size=256, local_size=96, local_crops=8)


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


def write_shard(path: Path) -> list[bytes]:
    pictures = [jpeg(i) for i in range(PICTURES)]
    with tarfile.open(path, "w") as tar:
        for i, picture in enumerate(pictures):
            for suffix, data in (("jpg", picture), ("txt", b"a picture of coloured noise, number %d" % i)):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return pictures


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


def seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def report(
    name: str, pictures: int, ours, peer: str | None = None, theirs=None, unit: str = "images/s per core"
) -> None:
    """Print the median rates of `ours` and `theirs`, run in turns, each for the same number of pictures."""
    ours(), theirs and theirs()
    times = [(seconds(ours), seconds(theirs) if theirs else None) for _ in range(REPEATS)]
    value = pictures / statistics.median(t for t, _ in times)
    peer_value = pictures / statistics.median(t for _, t in times) if theirs else None
    line = {"name": name, "value": round(value, 1), "unit": unit, "peer": peer}
    line |= {"peer_value": peer_value and round(peer_value, 1), "ratio": peer_value and round(value / peer_value, 2)}
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tokenizer = get_tokenizer()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shard = f"{folder}/0.tar"
        pictures = write_shard(Path(shard))

        def stream(views: ViewsConfig, batch: BatchConfig, data: str = shard, patch: int = 16) -> Loader:
            return Loader(open_source(data), views, batch, tokenizer, patch_size=patch, shuffle=PICTURES)

        def take(loader: Loader, n: int, device_side: bool = False):
            def run() -> None:
                for batch in itertools.islice(loader, n):
                    if device_side:
                        finish(batch, AugmentConfig(), generator)

            return run

        full, theirs = BatchConfig(clip=16, ssl=16, rec=16), dinov2_views()
        peer = "torchvision transforms on PIL images (DINOv2's)"
        batches = PICTURES // 16

        def peer_run() -> None:
            for data in pictures:
                theirs(data)

        report("full_views_worker", PICTURES, take(stream(FULL, full), batches), peer, peer_run)
        report("full_views_all_on_cpu", PICTURES, take(stream(FULL, full), batches, True), peer, peer_run)
        one = next(stream(FULL, full))
        report("full_views_device_side_on_cpu", 16, lambda: finish(one, AugmentConfig(), generator))
        pipeline = open_clip_pipeline(shard, tokenizer)
        clip_only = take(stream(FULL, BatchConfig(clip=16, ssl=0, rec=0)), batches)
        report("clip_view", PICTURES, clip_only, "open_clip's webdataset pipeline", lambda: list(pipeline))

        small = ViewsConfig(size=32, global_size=32, local_size=16, local_crops=4)
        report("scenes_32px", 2000, lambda: [scenes.draw(i, 32) for i in range(2000)])
        loader = stream(small, BatchConfig(clip=128, ssl=64, rec=64), "scenes", 8)
        crops = 8 * (128 + 6 * 64)
        report("scenes_32px_views_worker", crops, take(loader, 8), unit="crops/s per core")
        report("scenes_32px_views_all_on_cpu", crops, take(loader, 8, True), unit="crops/s per core")


if __name__ == "__main__":
    main()
