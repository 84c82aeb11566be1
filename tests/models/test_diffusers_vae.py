"""The tokenizer under diffusers' interface: the same latents and pictures, and a component of pipelines."""

import json
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

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
    noisy = vae(2 * unit - 1, sample_posterior=True, generator=torch.Generator())
    assert torch.equal(noisy.sample, vae.decode(posterior.mode()).sample)
    assert posterior.std.eq(0).all() and posterior.kl().eq(0).all() and posterior.parameters.shape[1] == 16
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(latents).sample, images)
    torch.testing.assert_close(vae.encode(2 * unit - 1).latent_dist.mode(), posterior.mode(), atol=2e-2, rtol=0)
    vae.disable_slicing()
    with pytest.raises(NotImplementedError, match="Tiling"):
        vae.enable_tiling()


def test_a_tokenizers_own_folder_is_read_by_from_vtp(folder):
    with pytest.raises(ValueError, match="is a tokenizer's folder; use AutoencoderVTP.from_vtp"):
        AutoencoderVTP.from_pretrained(folder)


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


PROMPT = {"prompt_embeds": torch.zeros(1, 3, 8)}  # as a text encoder would give it, so that there need be none
PARTS_OFF = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "image_encoder"))


def stable_diffusion(vae):
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=8,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = PARTS_OFF | {"safety_checker": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **parts), PROMPT | {"guidance_scale": 1.0}


def stable_diffusion_3(vae):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    parts = PARTS_OFF | dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = StableDiffusion3Pipeline(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
    return pipeline, PROMPT | {"pooled_prompt_embeds": torch.zeros(1, 8), "guidance_scale": 1.0}


def flux(vae):
    transformer = FluxTransformer2DModel(
        in_channels=4 * 8,  # its pipeline packs 2 x 2 latents into one
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    parts = PARTS_OFF | dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    return pipeline, PROMPT | {"pooled_prompt_embeds": torch.zeros(1, 8)}


@pytest.mark.parametrize(("build", "multiple"), [(stable_diffusion, 4), (stable_diffusion_3, 4), (flux, 8)])
def test_pipelines_work_at_the_patch_size(folder, build, multiple):
    """Pictures of the size that was asked for come out: the pipelines know the patch size."""
    torch.manual_seed(0)
    pipeline, prompt = build(AutoencoderVTP.from_vtp(folder))
    assert (pipeline.vae_scale_factor, pipeline.image_processor.config.vae_scale_factor) == (4, multiple)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(**prompt, height=32, width=16, num_inference_steps=1, output_type="np").images
    assert drawn.shape == (1, 32, 16, 3)


def test_the_scale_is_in_files_that_lack_it_and_a_patch_without_one_is_told(folder, tmp_path):
    vae = AutoencoderVTP.from_vtp(folder)
    assert len(vae.config.block_out_channels) == 3  # 2 ** (3 - 1) = 4
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "block_out_channels"}))
    assert len(AutoencoderVTP.from_pretrained(tmp_path / "vae").config.block_out_channels) == 3
    small(vision_patch_size=12, image_size=24).save_pretrained(tmp_path / "twelve")
    with pytest.warns(UserWarning, match="12 is not a power of two.*not in pipelines"):
        vae = AutoencoderVTP.from_vtp(tmp_path / "twelve")
    assert vae.config.block_out_channels is None
    assert vae(torch.zeros(1, 3, 24, 12)).sample.shape == (1, 3, 24, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_warns_of_nothing(folder, dtype, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    small().to(dtype).save_pretrained(folder.parent / "typed")
    vae = AutoencoderVTP.from_vtp(folder.parent / "typed")
    opened = VTPModel.from_pretrained(folder.parent / "typed").dtype  # float32 in transformers 4, as saved in 5
    assert vae.dtype == opened and caplog.messages == []


def test_mistakes_are_named(folder, tmp_path, monkeypatch):
    vae = AutoencoderVTP.from_vtp(folder)
    with pytest.raises(ValueError, match="18 x 16; both sides must be multiples of 4"):
        vae.encode(torch.zeros(1, 3, 18, 16))
    with monkeypatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)  # which objects first here
        with pytest.raises(ValueError, match=r"shape \[1, 1, 16, 16\]; give \[b, 3, H, W\], -1 to 1"):
            vae.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ConfigError, match="no tokenizer in"):
        AutoencoderVTP.from_vtp(tmp_path)
    small(train_reconstruction=False).save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="has no decoder"):
        AutoencoderVTP.from_vtp(tmp_path / "blind")
    small(vision_depth=1).save_pretrained(folder)
    with pytest.raises(ConfigError, match="of other weights"):
        AutoencoderVTP.from_vtp(folder)
