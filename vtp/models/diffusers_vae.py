"""The tokenizer as diffusers' pipelines know an autoencoder: images from -1 to 1, `latent_dist`, scaling constants."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vtp.images import from_symmetric, to_symmetric
from vtp.models.published import open_tokenizer, published_stats
from vtp.models.vtp_hf import DEFAULTS, VTPConfig, VTPModel

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise ImportError("AutoencoderVTP needs diffusers: pip install 'vtp[diffusers]'") from error


class LatentPoint:
    """The posterior of a tokenizer without noise: all its mass lies on one latent, so sample() is mode()."""

    def __init__(self, latents: Float[Tensor, "b c h w"]) -> None:
        self.mean = latents

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c h w"]:
        """The latents; the generator is not used."""
        return self.mean

    def mode(self) -> Float[Tensor, "b c h w"]:
        """The latents."""
        return self.mean


class AutoencoderVTP(ModelMixin, ConfigMixin):  # type: ignore[misc]  # config_name differs
    """Encoder and decoder of a tokenizer under diffusers' interface.

    Images are [b 3 H W] from -1 to 1, H and W multiples of the patch size. Latents are the tokenizer's own; a pipeline
    standardises them by the configuration, either per channel (`latents_mean`, `latents_std`: mean 0 and variance 1 in
    every channel) or all alike, (z - shift_factor) * scaling_factor. Without statistics the constants are 0 and 1, and
    the lists None.

    Args:
        tokenizer: its published configuration, of a tokenizer without CLIP's parts.
        latent_channels: of the latents, for pipelines to read.
        spatial_compression_ratio: the patch size, for pipelines to read.
        block_out_channels: its length alone means something: pipelines take their scale to be 2**(length - 1). The
            network has no such blocks; all entries are the encoder's width. Worked out from the tokenizer if None, and
            left None, with a warning, for a patch size that is not a power of two.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        tokenizer: dict[str, Any],
        latent_channels: int | None = None,
        spatial_compression_ratio: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        block_out_channels: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.vtp = VTPModel(VTPConfig(**tokenizer))
        patch, width = self.vtp.vision.patch_size, self.vtp.vision.embed_dim
        if block_out_channels is None and patch & (patch - 1) == 0:
            self.register_to_config(block_out_channels=[width] * patch.bit_length())
        elif block_out_channels is None:
            warnings.warn(
                f"the patch size {patch} is not a power of two: encode and decode work, but not in pipelines that "
                "take their scale from block_out_channels (Stable Diffusion's, FLUX's)",
                stacklevel=2,
            )

    @classmethod
    def from_vtp(cls, folder: str | Path) -> AutoencoderVTP:
        """From a published tokenizer folder, without CLIP's parts, with its latent_stats.json if it has one.

        Raises:
            ConfigError: no tokenizer there, one that is not whole, or statistics of other weights.
            ValueError: a tokenizer without a decoder.
        """
        stats = published_stats(Path(folder))
        model = open_tokenizer(Path(folder))
        if not model.config.train_reconstruction:
            raise ValueError(f"the tokenizer in {folder} has no decoder (train_reconstruction=false)")
        mean, std = (0.0, 1.0) if stats is None else stats.overall
        vae = cls(
            tokenizer={key: getattr(model.config, key) for key in DEFAULTS} | {"train_clip": False},
            latent_channels=model.vision.latent_dim,
            spatial_compression_ratio=model.vision.patch_size,
            scaling_factor=1 / max(std, 1e-6),
            shift_factor=mean,
            latents_mean=None if stats is None else list(stats.mean),
            latents_std=None if stats is None else list(stats.std),
        )
        kept, weights = vae.vtp.state_dict(), model.state_dict()
        vae.vtp.load_state_dict({name: weights[name] for name in kept})
        vae.vtp.to(model.dtype)  # not vae.to: diffusers would warn of an empty list of modules to be kept in float32
        return vae.eval()

    def encode(self, x: Float[Tensor, "b 3 H W"], return_dict: bool = True) -> AutoencoderKLOutput | tuple[LatentPoint]:
        """The latents [b c H/patch W/patch] of images, as `.latent_dist.mode()`; a tuple of it without return_dict.

        Raises:
            ValueError: sides that are not multiples of the patch size.
        """
        point = LatentPoint(self._latents(x))
        return AutoencoderKLOutput(latent_dist=point) if return_dict else (point,)

    def decode(
        self, z: Float[Tensor, "b c h w"], return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Float[Tensor, "b 3 H W"]]:
        """The images of latents, as `.sample`, -1 to 1 but not clamped; a tuple of them without return_dict."""
        images = to_symmetric(self.vtp.get_latents_decoded_images(z))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self, sample: Float[Tensor, "b 3 H W"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Float[Tensor, "b 3 H W"]]:
        """Encode and decode."""
        return self.decode(self._latents(sample), return_dict=return_dict)

    def _latents(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        patch = self.vtp.vision.patch_size
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]}; both sides must be multiples of {patch}")
        return self.vtp.get_reconstruction_latents(from_symmetric(x))
