"""`vtp export`: a tokenizer -> programs that run without this package, for any number and size of images.

encoder      image [b 3 H W] -> latents [b c H/patch W/patch]       decoder      latents -> image
clip_image   image [b 3 H W] -> features [b t]                      clip_text    text [b l] -> features [b t]

Images are ImageNet-normalised, sides multiples of the patch size and at least two patches; features have length 1.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vtp.config import ConfigError
from vtp.models.latent_stats import LATENT_STATS
from vtp.models.published import open_tokenizer, published_stats

Format = Literal["torch", "onnx"]
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
OPSET = 20
_SYMBOL = re.compile(r"\bs\d+\b")
TEXT_PARTS = ("token_embedding", "positional_embedding", "text_transformer", "ln_final", "text_projection")


class Program(NamedTuple):
    """One method of the tokenizer, as it is exported."""

    method: str
    parts: tuple[str, ...]  # modules and parameters that it reads
    example: Tensor
    dims: dict[int, Any]  # dimensions of the input that may change
    names: tuple[str, str]  # of input and output


class Part(nn.Module):
    """A method of the tokenizer as a module's forward, which is what exporters take, over the weights it reads."""

    def __init__(self, model: nn.Module, method: str, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.method = method
        self.model = copy.copy(model)  # sharing the weights; those of the other parts would all be written to the file
        for members in ("_modules", "_parameters"):
            kept = {name: value for name, value in getattr(model, members).items() if name in parts}
            setattr(self.model, members, kept)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.method)(x)


def export(tokenizer: Path, out: Path, format: Format = "torch") -> list[Path]:
    """Write a program for each thing the tokenizer can do, with its configuration and latent statistics, to `out`.

    As "torch", NAME.pt2 for torch.export.load: the published arithmetic. As "onnx", NAME.onnx with rotations in
    float32: ONNX runtimes do not compute in bfloat16 on a CPU; the config.json beside it says rope_dtype fp32.

    Returns:
        The programs' files.

    Raises:
        ConfigError: no such tokenizer, a package that is missing, or statistics of other weights.
    """
    if format not in SUFFIXES:
        raise ConfigError(f"format={format}: choose {', '.join(SUFFIXES)}")
    missing = [name for name in ("onnx", "onnxscript") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX files need {' and '.join(missing)}: pip install 'vtp[onnx]'")
    stats = published_stats(tokenizer)  # also says whether there is a tokenizer
    changed: dict[str, Any] = {"rope_dtype": "fp32"} if format == "onnx" else {}
    model: Any = open_tokenizer(tokenizer, **changed)
    model.requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    if stats is not None:
        shutil.copyfile(tokenizer / LATENT_STATS, out / LATENT_STATS)
    files = []
    for name, program in programs(model).items():
        file = (out / name).with_suffix(SUFFIXES[format])
        _write(model, program, file, format)
        files.append(file)
    return files


def programs(model: Any) -> dict[str, Program]:
    """What a VTPModel can do, by name."""
    from torch.export import Dim

    config, patch = model.config, model.vision.patch_size
    batch, rows, columns = Dim("batch"), Dim("rows", min=2), Dim("columns", min=2)  # one patch would be broadcast
    image = torch.zeros(2, 3, 4 * patch, 6 * patch)
    images = {0: batch, 2: patch * rows, 3: patch * columns}
    found = {"encoder": Program("get_reconstruction_latents", ("trunk",), image, images, ("image", "latents"))}
    if config.train_reconstruction:
        latents = torch.zeros(2, model.vision.latent_dim, 4, 6)
        dims = {0: batch, 2: rows, 3: columns}
        found["decoder"] = Program(
            "get_latents_decoded_images", ("pixel_decoder",), latents, dims, ("latents", "image")
        )
    if config.train_clip:
        vision = ("trunk", "visual_proj")
        found["clip_image"] = Program("get_clip_image_feature", vision, image, images, ("image", "features"))
        length = config.text_context_length
        text = torch.zeros(2, length, dtype=torch.int64)
        dims = {0: batch, 1: Dim("length", max=length)}
        found["clip_text"] = Program("get_clip_text_feature", TEXT_PARTS, text, dims, ("text", "features"))
    return found


def _write(model: nn.Module, program: Program, file: Path, format: Format) -> None:
    part = Part(model, program.method, program.parts)
    exported = torch.export.export(part, (program.example,), dynamic_shapes=(program.dims,), strict=False)
    if format == "torch":
        torch.export.save(exported, file)
        return
    given, returned = program.names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter calls parts of torch that torch has deprecated
        onnx = torch.onnx.export(
            exported, input_names=[given], output_names=[returned], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert onnx is not None  # it is, for dynamo=True
    _name_dims(onnx.model.graph, program.dims)
    onnx.save(file)  # with the weights, up to the 2 GB that one file can hold; beyond, they lie in a file beside it


def _name_dims(graph: Any, dims: dict[int, Any]) -> None:
    """Call the dimensions that may change by our names; the exporter numbers them, as s77."""
    given = graph.inputs[0].shape
    named = {_SYMBOL.findall(str(given[i]))[0]: re.findall("[a-z]+", dim.__name__)[0] for i, dim in dims.items()}
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        for i, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                value.shape[i] = _SYMBOL.sub(lambda found: named.get(found[0], found[0]), str(dim))
