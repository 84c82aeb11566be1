"""The tokenizer as diffusers' pipelines know an autoencoder: images from -1 to 1, `latent_dist`, scaling constants."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vtp.images import from_symmetric, to_symmetric
from vtp.models.published import WEIGHTS, open_tokenizer, published_stats
from vtp.models.vtp_hf import DEFAULTS, VTPConfig, VTPModel

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise ImportError("AutoencoderVTP needs diffusers: pip install 'vtp[diffusers]'") from error


class AutoencoderVTP(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]  # config_name differs
    """Encoder and decoder of a tokenizer under diffusers' interface.

    Images are [b 3 H W] from -1 to 1, H and W multiples of the patch size. Latents are the tokenizer's own; a pipeline
    standardises them by the configuration, either per channel (`latents_mean`, `latents_std`: mean 0 and variance 1 in
    every channel) or all alike, (z - shift_factor) * scaling_factor. Without statistics the constants are 0 and 1, and
    the lists None. `enable_slicing()` sends one image at a time through the network; there are no tiles
    (`vtp reconstruct` makes them).

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
        self.use_slicing = False
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers loads what `save_pretrained` wrote.

        Raises:
            ValueError: a tokenizer's folder, which `from_vtp` reads.
        """
        if (Path(pretrained_model_name_or_path) / kwargs.get("subfolder", "") / WEIGHTS).is_file():
            raise ValueError(f"{pretrained_model_name_or_path} is a tokenizer's folder; use AutoencoderVTP.from_vtp")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def encode(
        self, x: Float[Tensor, "b 3 H W"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The latents [b c H/patch W/patch] of images, as `.latent_dist.mode()`; a tuple of it without return_dict.

        The posterior has no noise: sample() is mode().

        Raises:
            ValueError: another shape, or sides that are not multiples of the patch size.
        """
        latents = torch.cat([self._latents(part) for part in self._slices(x)])
        parameters = torch.cat([latents, torch.zeros_like(latents)], dim=1)
        point = DiagonalGaussianDistribution(parameters, deterministic=True)
        return AutoencoderKLOutput(latent_dist=point) if return_dict else (point,)

    def decode(
        self, z: Float[Tensor, "b c h w"], return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Float[Tensor, "b 3 H W"]]:
        """The images of latents, as `.sample`, -1 to 1 but not clamped; a tuple of them without return_dict."""
        images = torch.cat([to_symmetric(self.vtp.get_latents_decoded_images(part)) for part in self._slices(z)])
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: Float[Tensor, "b 3 H W"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Float[Tensor, "b 3 H W"]]:
        """Encode and decode; what asks for noise changes nothing."""
        return self.decode(self.encode(sample, return_dict=False)[0].mode(), return_dict=return_dict)

    def _slices(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(1) if self.use_slicing else [x]

    def _latents(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        patch = self.vtp.vision.patch_size
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images of shape {list(x.shape)}; give [b, 3, H, W], -1 to 1")
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]}; both sides must be multiples of {patch}")
        return self.vtp.get_reconstruction_latents(from_symmetric(x))
