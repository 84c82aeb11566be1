"""The tokenizer under diffusers' interface: the same latents and pictures, and a component of pipelines."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

from tests.models.test_vtp_hf import small
from vtp.config import ConfigError
from vtp.files import file_sha256
from vtp.images import normalise
from vtp.models.diffusers_vae import AutoencoderVTP
from vtp.models.latent_stats import ChannelStats, write_stats
from vtp.models.vtp_hf import VTPModel

MEAN, STD = (0.5, -1.0) * 4, (2.0, 0.5) * 4


@pytest.fixture
def folder(tmp_path):
    """A published tokenizer with statistics: 16 px, patch 4, 8 channels."""
    small().save_pretrained(tmp_path / "tokenizer")
    sha256 = file_sha256(tmp_path / "tokenizer/model.safetensors")
    stats = ChannelStats(mean=MEAN, std=STD, count=9, size=16, data="photos", tokenizer_sha256=sha256)
    write_stats(tmp_path / "tokenizer", stats)
    return tmp_path / "tokenizer"


@torch.no_grad()
def test_latents_and_images_are_the_tokenizers(folder):
    vae, model = AutoencoderVTP.from_vtp(folder), VTPModel.from_pretrained(folder)
    unit = torch.rand(2, 3, 16, 24)
    posterior = vae.encode(2 * unit - 1).latent_dist
    latents = model.get_reconstruction_latents(normalise(unit))
    torch.testing.assert_close(posterior.mode(), latents, atol=2e-2, rtol=0)  # 2x - 1 and back moves the last bit
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(1)), posterior.mode())
    images = vae.decode(latents).sample
    torch.testing.assert_close(
        normalise((images + 1) / 2), model.get_latents_decoded_images(latents), atol=1e-5, rtol=0
    )
    assert images.shape == (2, 3, 16, 24)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], images)
    assert torch.equal(vae.encode(2 * unit - 1, return_dict=False)[0].mode(), posterior.mode())
    assert torch.equal(vae(2 * unit - 1).sample, vae.decode(posterior.mode()).sample)


def test_constants_standardise(folder):
    config = AutoencoderVTP.from_vtp(folder).config
    assert tuple(config.latents_mean) == MEAN and tuple(config.latents_std) == STD
    assert (config.latent_channels, config.spatial_compression_ratio) == (8, 4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 8, 2, 2, generator=generator) * torch.tensor(STD).view(8, 1, 1)
    latents += torch.tensor(MEAN).view(8, 1, 1)
    scaled = (latents - config.shift_factor) * config.scaling_factor
    assert abs(scaled.mean()) < 0.02 and abs(scaled.std() - 1) < 0.02


def test_without_statistics_nothing_is_scaled(tmp_path):
    small().save_pretrained(tmp_path)
    config = AutoencoderVTP.from_vtp(tmp_path).config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std) == (1, 0, None, None)


@torch.no_grad()
def test_round_trip(folder, tmp_path):
    vae = AutoencoderVTP.from_vtp(folder)
    vae.save_pretrained(tmp_path / "vae")
    again = AutoencoderVTP.from_pretrained(tmp_path / "vae")
    assert all(again.config[key] == value for key, value in vae.config.items() if not key.startswith("_"))
    assert not again.training
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(image).latent_dist.mode(), vae.encode(image).latent_dist.mode())
    assert torch.equal(again(image).sample, vae(image).sample)
    assert not any("text" in name or "visual_proj" in name for name in again.state_dict())
    half = AutoencoderVTP.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
    assert half.decode(half.encode(image.bfloat16()).latent_dist.sample()).sample.dtype == torch.bfloat16


def test_a_component_of_a_pipeline(folder, tmp_path):
    vae = AutoencoderVTP.from_vtp(folder)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=1000,  # the pipeline's null class is 1000
        norm_num_groups=2,
    )
    pipeline = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_inference_steps=2, generator=generator, output_type="np").images

    images = draw(pipeline)
    assert images.shape == (2, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again) is DiTPipeline and type(again.vae) is AutoencoderVTP
    again.set_progress_bar_config(disable=True)
    assert (draw(again) == images).all()


def test_mistakes_are_named(folder, tmp_path):
    vae = AutoencoderVTP.from_vtp(folder)
    with pytest.raises(ValueError, match="18 x 16; both sides must be multiples of 4"):
        vae.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ConfigError, match="no tokenizer in"):
        AutoencoderVTP.from_vtp(tmp_path)
    small(train_reconstruction=False).save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="has no decoder"):
        AutoencoderVTP.from_vtp(tmp_path / "blind")
    small(vision_depth=1).save_pretrained(folder)
    with pytest.raises(ConfigError, match="of other weights"):
        AutoencoderVTP.from_vtp(folder)
