"""The card of a published tokenizer: README.md, from plain values. What is not known is not written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "<!-- written by vtp, and written anew when the tokenizer is saved; without this line it is left alone -->"

TAGS = ("visual-tokenizer", "autoencoder", "image-generation", "vtp")
USE_IMAGES = """\
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from vtp.images import center_crop, normalise, to_uint8
from vtp.models.vtp_hf import VTPModel
{imports}
model = VTPModel.from_pretrained("{name}").eval()
picture = center_crop(Image.open("photo.jpg").convert("RGB"), {size})
images = normalise(pil_to_tensor(picture))[None]  # [1, 3, {size}, {size}]
with torch.no_grad():
    latents = model.get_reconstruction_latents(images)  # [1, {channels}, {rows}, {rows}]
"""
USE_DECODER = '    to_pil_image(to_uint8(model.get_latents_decoded_images(latents))[0]).save("reconstruction.png")\n'
USE_TEXT = """\
    texts = get_tokenizer("ViT-B-32", context_length={context})(["a photo of a cat", "a photo of a dog"])
    print(model.get_clip_image_feature(images) @ model.get_clip_text_feature(texts).T)  # [1, 2], cosine similarities
"""


def naming_parts(folder: Path) -> tuple[str, ...]:
    """The parts of a tokenizer's path that can name it, the name last: RUN/tokenizer is called after the run."""
    *before, last = folder.resolve().parts
    return tuple(before) if last == "tokenizer" and len(before) > 1 else (*before, last)


def model_card(
    name: str,
    config: Mapping[str, Any],
    parameters: Mapping[str, int],
    sha256: str,
    *,
    stats: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    title: str | None = None,
) -> str:
    """Markdown with the Hub's YAML front matter.

    Args:
        name: what `from_pretrained` in the example is given: a folder or a repository.
        config: the published configuration, every key.
        parameters: how many of them, by part: "trunk", "pixel_decoder", "text".
        sha256: of model.safetensors.
        stats: the contents of latent_stats.json.
        results: results files about these very weights.
        license: its identifier on the Hub.
        title: the heading; the last part of the name if None.
    """
    patch, channels = config["vision_patch_size"], latent_channels(config)
    parts = ["one ViT encodes"]
    if config["train_reconstruction"]:
        parts.append("a transformer decodes")
    if config["train_clip"]:
        parts.append("a text tower shares a space with the images")
    sections = [
        "\n".join(["---", *_front_matter(license), "---"]),
        MARK,
        f"# {name.rstrip('/').rpartition('/')[2] if title is None else title}",
        f"A visual tokenizer of the VTP family: {', '.join(parts)}. An image whose sides are multiples of {patch} "
        f"pixels becomes a map of {channels} channels, {patch} times smaller a side.",
        "## Architecture",
        _architecture(config, parameters),
        "## Use",
        f"```python\n{_example(name, config, channels)}```",
    ]
    if stats is not None:
        sections += ["## Latent statistics", _statistics(stats)]
    if results:
        sections += ["## Figures", _figures(results)]
    sections += ["## Weights", f"`model.safetensors` has the SHA-256 `{sha256}`."]
    return "\n\n".join(sections) + "\n"


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latents under a published configuration."""
    bottleneck = config["vision_feature_bottleneck"]
    return config["vision_embed_dim"] if bottleneck is None else bottleneck


def _front_matter(license: str | None) -> list[str]:
    lines = ["library_name: vtp", "pipeline_tag: image-feature-extraction", "tags:", *(f"- {tag}" for tag in TAGS)]
    return lines if license is None else [f"license: {license}", *lines]


def _architecture(config: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    names = {"trunk": ("encoder", "vision"), "pixel_decoder": ("decoder", "decoder"), "text": ("text tower", "text")}
    rows = []
    for part, count in parameters.items():
        title, key = names[part]
        rows.append(
            [title, *(str(config[f"{key}_{size}"]) for size in ("embed_dim", "depth", "num_heads")), f"{count:,}"]
        )
    rows.append(["all", "", "", "", f"{sum(parameters.values()):,}"])
    table = _table(["part", "width", "blocks", "heads", "parameters"], rows)
    text = f", text of at most {config['text_context_length']} tokens" if config["train_clip"] else ""
    return f"{table}\n\nImages of {config['image_size']} pixels, patches of {config['vision_patch_size']}{text}."


def _example(name: str, config: Mapping[str, Any], channels: int) -> str:
    size = config["image_size"] // config["vision_patch_size"] * config["vision_patch_size"]
    clip = config["train_clip"]
    code = USE_IMAGES.format(
        name=name,
        size=size,
        channels=channels,
        rows=size // config["vision_patch_size"],
        imports="from vtp.tokenizers import get_tokenizer\n" if clip else "",
    )
    code += USE_DECODER if config["train_reconstruction"] else ""
    return code + (USE_TEXT.format(context=config["text_context_length"]) if clip else "")


def _statistics(stats: Mapping[str, Any]) -> str:
    known = [
        f"{stats['count']:,} images" if stats["count"] is not None else "",
        f"of {stats['size']} pixels" if stats["size"] is not None else "",
        f"of `{_shown(stats['data'])}`" if stats["data"] is not None else "",
    ]
    over = " ".join(filter(None, known))
    ranges = "; ".join(f"{name} {min(stats[name]):.4f} to {max(stats[name]):.4f}" for name in ("mean", "std"))
    return (
        "`latent_stats.json` holds the mean and the standard deviation of each channel"
        f"{f', over {over}' if over else ''} ({ranges}). Diffusion models work on `(latents - mean) / std`; before "
        "decoding, `latents * std + mean`."
    )


def _figures(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        metrics = "<br>".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        protocol = {k: v for k, v in result["protocol"].items() if not k.endswith("sha256")} | {"seed": result["seed"]}
        rows.append([result["task"], metrics, ", ".join(f"{k}: {_shown(v)}" for k, v in protocol.items())])
    return f"Measured on these very weights by `vtp eval`.\n\n{_table(['task', 'figures', 'protocol'], rows)}"


def _shown(value: Any) -> str:
    """A value of a protocol in few words: of a path its last name, since the rest says only whose machine it was."""
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    if isinstance(value, list):
        return " to ".join(map(str, value))
    text = str(value)
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~", ".")) else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
