"""`vtp reconstruct`: picture files of any size through a tokenizer and back, next to what went in."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from vtp.config import ConfigError
from vtp.data.decode import BadImage, decode
from vtp.engine.logging import progress_bar
from vtp.evaluation.codecs import Codec, open_codec
from vtp.evaluation.results import write_result
from vtp.evaluation.run import EvalConfig
from vtp.images import denormalise, normalise, to_uint8
from vtp.metrics.fidelity import psnr, ssim

if TYPE_CHECKING:
    from rich.table import Table

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # what a folder is searched for
MOST_PATCHES = 256  # a side; beyond it the published bfloat16 rotary positions of neighbouring patches collide
SSIM_WINDOW = 11  # pixels; smaller pictures have no SSIM
WHOLE = 1024  # pixels a side; the memory of attention grows with the square of a picture's area
GAP = 8  # pixels between the pictures of a strip
GROUND = (233, 233, 233)  # neither black nor white, which are the ends of an error map and colours of pictures
ERROR_GAIN = 5  # error maps: an error of 51 levels is white

Fit = Literal["pad", "crop"]


class Picture(NamedTuple):
    """A decoded file on its way through the tokenizer."""

    file: Path
    name: str  # of the files written, without suffix
    pixels: UInt8[ndarray, "h w 3"]  # as it will be compared: the original, or its crop
    done: str  # what was done to make it fit, for people


def reconstruct_files(
    tokenizer: Path, inputs: Sequence[Path], out: Path, *, fit: Fit = "pad", tile: int | None = None, cfg: EvalConfig
) -> dict[str, Any]:
    """Encode and decode picture files; write OUT/NAME.png, OUT/strips/NAME.png and OUT/reconstruct.json.

    A strip shows the original, the reconstruction and the error. Files of one size go through together, as many as have
    the pixels of `cfg.batch_size` pictures of the tokenizer's size. Files that cannot be read are skipped and counted.

    Args:
        tokenizer: a VTP folder or one of diffusers' AutoencoderKL.
        inputs: picture files, and folders that are searched for them.
        fit: sides are multiples of the patch. "pad" repeats the last row and column, and cuts the result back; "crop"
            keeps the central part.
        tile: pictures with a longer side go through in overlapping squares of this side, blended. None tiles only those
            of more than 1,024 pixels or 256 patches a side, in tiles of the tokenizer's own size.
        cfg: batch_size, device and precision count.

    Returns:
        The results object: metrics psnr (dB) and ssim (means over pictures), "pictures" (each with what was done, psnr
        and ssim; None where a figure does not exist) and "skipped" (file, reason).

    Raises:
        ConfigError: no picture, an output that would overwrite an input, a tile that is no multiple of the patch.
    """
    codec = open_codec(tokenizer, cfg.device, cfg.precision)
    patch = codec.make.patch
    side = max(2, (codec.make.size or 256) // patch) * patch
    if tile is not None and (tile % patch or tile < 2 * patch):
        raise ConfigError(f"tile={tile}: choose a multiple of the patch of {patch} pixels, at least {2 * patch}")
    names = output_names(find_files(inputs, out))
    written = {(folder / f"{name}.png").resolve() for name in names.values() for folder in (out, out / "strips")}
    clash = next((f for f in names if f.resolve() in written), None)
    if clash is not None:
        raise ConfigError(f"{clash} would be overwritten by a reconstruction; choose another --out")
    skipped: dict[Path, BadImage] = {}
    digest = hashlib.sha256()
    pictures = _read(names, fit, patch, skipped, digest)
    (out / "strips").mkdir(parents=True, exist_ok=True)
    rows = []
    budget = cfg.batch_size * side**2
    with progress_bar("reconstruct") as bar:
        task = bar.add_task("reconstruct", total=len(names), status="")

        def tell(done: int, total: int) -> None:
            bar.update(task, status=f"{done} of {total} tiles" if done < total else "")

        for group in same_size(pictures, budget):
            shape = group[0].pixels.shape[:2]
            tiled = tile_for(shape, patch, tile, side)
            back = _through(codec, [p.pixels for p in group], tiled, budget, tell)
            rows += [_write(p, b, out, tiled) for p, b in zip(group, back, strict=True)]
            bar.update(task, completed=len(rows) + len(skipped))
        bar.update(task, completed=len(rows) + len(skipped))
    if not rows:
        reasons = ", ".join(f"{n} {r}" for r, n in Counter(e.reason for e in skipped.values()).items())
        file, error = next(iter(skipped.items()))
        raise ConfigError(f"none of {len(names)} files could be read: {reasons}; {file}: {error}")
    order = {str(file): i for i, file in enumerate(names)}
    result = write_result(
        None,
        task="reconstruct",
        metrics=_means(rows),
        protocol={
            "pictures": len(rows),
            "skipped": len(skipped),
            "fit": fit,
            "tokenizer": f"{tokenizer} ({codec.make.kind})",
            "precision": codec.precision,
        },
        weights=codec.make.weights,
        data_sha256=digest.hexdigest(),
    )
    result["pictures"] = sorted(rows, key=lambda row: order[row["file"]])
    result["skipped"] = [{"file": str(file), "reason": str(error)} for file, error in skipped.items()]
    (out / "reconstruct.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def find_files(inputs: Sequence[Path], out: Path) -> list[Path]:
    """The files named, and the pictures in the folders named, each once, in order; not those below `out`.

    Raises:
        ConfigError: something named that is not there, or no picture at all.
    """
    found: dict[Path, None] = {}
    for path in inputs:
        if path.is_dir():
            named = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
            inside = [f for f in named if f.is_file() or f.is_symlink()]  # one that leads nowhere is counted
            shown = (f for f in inside if not any(p.startswith(".") for p in f.relative_to(path).parts))
            found |= dict.fromkeys(f for f in shown if out.resolve() not in f.resolve().parents)
        elif path.is_file():
            found[path] = None
        else:
            raise ConfigError(f"no file or folder {path}")
    if not found:
        theirs = any(p.is_dir() and out.resolve() in (p.resolve(), *p.resolve().parents) for p in inputs)
        raise ConfigError(
            f"no picture ({', '.join(SUFFIXES)}) in {', '.join(map(str, inputs))}"
            + (f" that is not in --out {out}; choose another --out" if theirs else "")
        )
    return list(found)


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its own without suffix, numbered where that is taken (whatever the case of the letters)."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, n = file.stem, 1
        while name.lower() in taken:
            n += 1
            name = f"{file.stem}-{n}"
        taken.add(name.lower())
        names[file] = name
    return names


def _read(
    names: dict[Path, str], fit: Fit, patch: int, skipped: dict[Path, BadImage], digest: Any
) -> Iterator[Picture]:
    for file, name in names.items():
        try:
            pixels = decode(file.read_bytes())
            height, width = pixels.shape[:2]
            if fit == "crop" and min(height, width) < patch:
                raise BadImage("too small to crop", f"{width} x {height}, the patch is {patch} x {patch}")
        except OSError as error:
            skipped[file] = BadImage("unreadable", str(error))
        except BadImage as error:
            skipped[file] = error
        else:
            digest.update(hashlib.sha256(pixels.tobytes()).digest())
            yield fitted(Picture(file, name, pixels, ""), fit, patch)


def fitted(picture: Picture, fit: Fit, patch: int) -> Picture:
    """The picture, cropped if so asked, and what is done to make its sides multiples of the patch."""
    height, width = picture.pixels.shape[:2]
    if height % patch == 0 and width % patch == 0:
        return picture._replace(done="as it is")
    if fit == "pad":
        return picture._replace(done=f"padded to {width + -width % patch} x {height + -height % patch}")
    rows, columns = height - height % patch, width - width % patch
    top, left = (height - rows) // 2, (width - columns) // 2
    inner = picture.pixels[top : top + rows, left : left + columns]
    return picture._replace(pixels=inner, done=f"cropped to {columns} x {rows}")


def same_size(pictures: Iterator[Picture], budget: int) -> Iterator[list[Picture]]:
    """Groups of pictures of one size, at most `budget` pixels (or one picture) each; so many pixels wait at most."""
    waiting: dict[tuple[int, ...], list[Picture]] = {}
    pixels = 0
    for picture in pictures:
        size = picture.pixels[..., 0].size
        if pixels + size > budget:
            yield from waiting.values()
            waiting, pixels = {}, 0
        waiting.setdefault(picture.pixels.shape, []).append(picture)
        pixels += size
    yield from waiting.values()


def tile_for(shape: tuple[int, ...], patch: int, asked: int | None, side: int) -> int | None:
    """Side of the tiles of a picture of this (height, width), or None where it goes through whole."""
    longest = -(-max(shape) // patch) * patch
    if asked is not None:
        return asked if longest > asked else None
    return side if longest > max(side, min(WHOLE, MOST_PATCHES * patch)) else None


def _through(
    codec: Codec,
    pixels: Sequence[UInt8[ndarray, "h w 3"]],
    tile: int | None,
    budget: int,
    tell: Callable[[int, int], None],
) -> Float[Tensor, "b 3 h w"]:
    """Encoded and decoded, ImageNet-normalised; padded before and cut back after."""
    height, width = pixels[0].shape[:2]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(codec.device)
    patch = codec.make.patch
    images = F.pad(normalise(images), (0, -width % patch, 0, -height % patch), mode="replicate")
    if tile is None:
        back = codec.reconstruct(images)
    else:
        back = torch.cat([tiled(codec.reconstruct, image, tile, patch, budget, tell) for image in images.split(1)])
    return back[..., :height, :width]


def tiled(
    function: Callable[[Tensor], Tensor],
    image: Float[Tensor, "1 3 H W"],
    tile: int,
    patch: int,
    budget: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "1 3 H W"]:
    """A function of images, applied to overlapping tiles whose results are blended.

    Tiles overlap by about a quarter; their weights fall linearly towards the edges over the overlap and are divided by
    the sum of weights, so that what the function leaves as it is comes back as it was.

    Args:
        image: sides are multiples of the patch.
        tile: a multiple of the patch, at least two.
        budget: pixels that go through the function at once.
        tell: is told of tiles done and their number.
    """
    overlap = max(patch, tile // 4 // patch * patch)
    height, width = (min(tile, side) for side in image.shape[-2:])
    corners = [(y, x) for y in starts(image.shape[2], height, overlap) for x in starts(image.shape[3], width, overlap)]
    ramps = [torch.minimum(r := torch.arange(n) + 0.5, n - r).clamp(max=overlap) for n in (height, width)]
    weight = (ramps[0][:, None] * ramps[1]).to(image)  # [height, width]
    result, total = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    at_once = max(1, budget // (height * width))
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        done = function(torch.cat([image[..., y : y + height, x : x + width] for y, x in some]))
        for (y, x), part in zip(some, done, strict=True):
            result[..., y : y + height, x : x + width] += part * weight
            total[..., y : y + height, x : x + width] += weight
        tell(first + len(some), len(corners))
    return result / total


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover a side: neighbours overlap by `overlap`, the last by what is left over."""
    regular = list(range(0, side - tile, tile - overlap)) if side > tile else []
    return [*regular, side - tile]


def _write(picture: Picture, back: Float[Tensor, "3 h w"], out: Path, tile: int | None) -> dict[str, Any]:
    height, width = picture.pixels.shape[:2]
    original = normalise(torch.from_numpy(picture.pixels).permute(2, 0, 1)[None]).to(back.device)
    pair = denormalise(back[None]), denormalise(original)
    pixels = to_uint8(back).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(out / f"{picture.name}.png")
    strip = in_a_row([picture.pixels, pixels, error_map(picture.pixels, pixels)])
    Image.fromarray(strip).save(out / "strips" / f"{picture.name}.png")
    decibels = float(psnr(*pair))
    return {
        "file": str(picture.file),
        "name": picture.name,
        "size": [width, height],
        "done": picture.done + ("" if tile is None else f", in tiles of {tile}"),
        "psnr": decibels if np.isfinite(decibels) else None,  # nothing was lost
        "ssim": float(ssim(*pair)) if min(height, width) >= SSIM_WINDOW else None,
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over the pictures that have the figure."""
    values = {name: [row[name] for row in rows if row[name] is not None] for name in ("psnr", "ssim")}
    return {name: sum(v) / len(v) for name, v in values.items() if v}


def error_map(before: UInt8[ndarray, "h w 3"], after: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "h w 3"]:
    """Mean absolute error of the three colours of each pixel, five times enlarged, as grey on black."""
    error = np.abs(before.astype(np.float32) - after).mean(-1, keepdims=True) * ERROR_GAIN
    return np.repeat(error.clip(0, 255).round().astype(np.uint8), 3, axis=-1)


def in_a_row(pictures: Sequence[UInt8[ndarray, "h _ 3"]]) -> UInt8[ndarray, "h _ 3"]:
    """Pictures of one height in a row, with a grey gap."""
    gap = np.full((pictures[0].shape[0], GAP, 3), GROUND, np.uint8)
    parts = [pictures[0]]
    for picture in pictures[1:]:
        parts += [gap, picture]
    return np.concatenate(parts, axis=1)


def table(result: dict[str, Any]) -> Table:
    """The results of `reconstruct_files` for the terminal: `rich.print(table(result))`."""
    from rich.markup import escape
    from rich.table import Column, Table

    shown = Table(
        Column("file", overflow="fold"), "size", "done", "PSNR dB", "SSIM", Column("written", overflow="fold")
    )
    for row in result["pictures"]:
        decibels = "exact" if row["psnr"] is None else f"{row['psnr']:.2f}"
        similarity = "too small" if row["ssim"] is None else f"{row['ssim']:.4f}"
        size = f"{row['size'][0]} x {row['size'][1]}"
        shown.add_row(escape(row["file"]), size, row["done"], decibels, similarity, escape(f"{row['name']}.png"))
    for row in result["skipped"]:
        shown.add_row(escape(row["file"]), "", f"[red]skipped: {escape(row['reason'])}[/]", "", "", "")
    shown.add_section()
    means = [f"{result['metrics'][k]:.{n}f}" if k in result["metrics"] else "" for k, n in (("psnr", 2), ("ssim", 4))]
    shown.add_row("mean", "", "", *means, "")
    shown.caption = f"{len(result['pictures'])} pictures, {len(result['skipped'])} skipped"
    return shown
