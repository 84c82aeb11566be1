"""Tokenizers of several makes behind one pair of functions: VTP folders, published or diffusers', and AutoencoderKL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vtp.config import ConfigError
from vtp.engine.optim import Asked, Precision, inference, pick_device, pick_precision
from vtp.images import from_symmetric, to_symmetric
from vtp.models.published import check_tokenizer, open_tokenizer, reading, refuse_other_weights, where_instead

WEIGHTS = {
    "VTP": "model.safetensors",
    "AutoencoderVTP": "diffusion_pytorch_model.safetensors",
    "AutoencoderKL": "diffusion_pytorch_model.safetensors",
}


class Make(NamedTuple):
    """What a tokenizer's folder says before its weights are read."""

    kind: str  # a key of WEIGHTS
    weights: Path
    size: int | None  # side of the images it was trained on, pixels; None where its file does not tell
    patch: int  # sides of images are multiples of it, pixels


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer on a device, without gradients: images are ImageNet-normalised and stay on that device."""

    make: Make
    encode: Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b c h w"]]
    decode: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b 3 H W"]]  # not clamped
    parameters: dict[str, int]  # of "encoder" and "decoder"
    device: torch.device
    precision: Precision

    def reconstruct(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        """There and back, in float32."""
        return self.decode(self.encode(images))


def read_make(folder: Path) -> Make:
    """What kind of tokenizer a folder holds, by its config.json.

    Raises:
        ConfigError: neither a VTP with a decoder nor an AutoencoderKL, no weights, or a VTP that is not whole.
    """
    wanted = "config.json and model.safetensors (VTP) or diffusion_pytorch_model.safetensors (diffusers)"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = "VTP" if config.get("model_type") == "vtp" else str(config.get("_class_name"))
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"no tokenizer in {folder}: {where_instead(folder, wanted)}") from None
    if kind not in WEIGHTS:
        raise ConfigError(f"{folder} is no VTP and no AutoencoderKL: it should hold {wanted}")
    weights = folder / WEIGHTS[kind]
    if not weights.is_file():
        raise ConfigError(f"no weights in {folder}: it should hold {wanted}")
    if kind == "AutoencoderKL":
        # its sample_size is what a diffusion model was given, and often just the default
        return Make(kind, weights, None, 2 ** (len(config.get("block_out_channels", [64])) - 1))
    if kind == "AutoencoderVTP":
        return Make(kind, weights, config["tokenizer"]["image_size"], config["tokenizer"]["vision_patch_size"])
    known = check_tokenizer(folder)
    if not known.train_reconstruction:
        raise ConfigError(f"{folder} was trained with train_reconstruction=false: it has no decoder")
    return Make(kind, weights, known.image_size, known.vision_patch_size)


def open_codec(folder: Path, device: str = "auto", asked: Asked = "fp32") -> Codec:
    """Open a VTP folder, published or of AutoencoderVTP, or one of AutoencoderKL (latents: the mode of its posterior).

    Raises:
        ConfigError: as `read_make`, weights that are not the network's, or diffusers is not installed.
    """
    make = read_make(folder)
    parts = _autoencoder_kl(folder) if make.kind == "AutoencoderKL" else _vtp(folder, make.kind)
    here = pick_device(device)
    precision = pick_precision(asked, here)
    parts.model.eval().to(here)
    parameters = {"encoder": _count(parts.encoder), "decoder": _count(parts.decoder)}
    encode, decode = (inference(part, here, precision) for part in (parts.encode, parts.decode))
    return Codec(make=make, encode=encode, decode=decode, parameters=parameters, device=here, precision=precision)


class _Parts(NamedTuple):
    model: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    encoder: Sequence[nn.Module | None]
    decoder: Sequence[nn.Module | None]


def _vtp(folder: Path, kind: str) -> _Parts:
    if kind == "AutoencoderVTP":
        try:
            from vtp.models.diffusers_vae import AutoencoderVTP
        except ImportError as error:
            raise ConfigError(f"{folder}: {error}") from None
        with reading(folder):
            model: Any = AutoencoderVTP.from_pretrained(folder).vtp
    else:
        model = open_tokenizer(folder)
    encode, decode = model.get_reconstruction_latents, model.get_latents_decoded_images
    return _Parts(model, encode, decode, [model.trunk], [model.pixel_decoder])


def _autoencoder_kl(folder: Path) -> _Parts:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(f"{folder} is a diffusers AutoencoderKL: pip install 'vtp[diffusers]'") from None
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    with reading(folder):
        loaded: Any = AutoencoderKL.from_pretrained(folder, **options)
    model, info = loaded
    refuse_other_weights(folder / WEIGHTS["AutoencoderKL"], info["missing_keys"])

    def encode(images: Tensor) -> Tensor:
        return model.encode(to_symmetric(images).clamp(-1, 1)).latent_dist.mode()

    def decode(latents: Tensor) -> Tensor:
        return from_symmetric(model.decode(latents).sample.float())

    encoder, decoder = [model.encoder, model.quant_conv], [model.decoder, model.post_quant_conv]
    return _Parts(model, encode, decode, encoder, decoder)


def _count(modules: Sequence[nn.Module | None]) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())
