import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tokenizer
from vtp.config import ConfigError
from vtp.evaluation.codecs import open_codec, read_make
from vtp.images import denormalise, normalise
from vtp.models.vtp_hf import VTPModel


def save_autoencoder(folder):
    """A tiny AutoencoderKL with random weights: 4 channels, 2 x 2 pixels a latent."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
    )
    model.save_pretrained(folder)
    return model.eval()


def test_vtp(tmp_path):
    codec = open_codec(save_tokenizer(tmp_path), "cpu")
    model = VTPModel.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        latents = model.get_reconstruction_latents(images)
        assert torch.equal(codec.encode(images), latents)
        assert torch.equal(codec.reconstruct(images), model.get_latents_decoded_images(latents))
    assert (codec.make.kind, codec.make.size, codec.make.patch) == ("VTP", 16, 8)
    assert codec.parameters["decoder"] == sum(p.numel() for p in model.pixel_decoder.parameters())


def test_autoencoder_kl(tmp_path):
    model = save_autoencoder(tmp_path)
    codec = open_codec(tmp_path, "cpu")
    assert (codec.make.kind, codec.make.size, codec.make.patch) == ("AutoencoderKL", None, 2)
    pixels = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        latents = model.encode(pixels * 2 - 1).latent_dist.mode()
        back = model.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(codec.encode(normalise(pixels)), latents)
    torch.testing.assert_close(denormalise(codec.decode(latents)), back.clamp(0, 1))
    assert sum(codec.parameters.values()) == sum(p.numel() for p in model.parameters())


def test_a_tokenizer_that_diffusers_saved(tmp_path):
    from vtp.models.diffusers_vae import AutoencoderVTP

    save_tokenizer(tmp_path / "tokenizer")
    AutoencoderVTP.from_vtp(tmp_path / "tokenizer").save_pretrained(tmp_path / "vae")
    ours, theirs = open_codec(tmp_path / "tokenizer", "cpu"), open_codec(tmp_path / "vae", "cpu")
    assert (theirs.make.kind, theirs.make.size, theirs.make.patch) == ("AutoencoderVTP", 16, ours.make.patch)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(theirs.reconstruct(images), ours.reconstruct(images))
    assert theirs.parameters == ours.parameters


@pytest.mark.parametrize("make", [save_tokenizer, save_autoencoder])
def test_bf16_is_close_and_comes_back_in_float32(make, tmp_path):
    make(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    full, half = (open_codec(tmp_path, "cpu", precision).reconstruct(images) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert (full - half).abs().max() < 0.1 * full.abs().max()


def test_bad_folders_are_one_clear_error(tmp_path, monkeypatch):
    def refused(folder, message):
        with pytest.raises(ConfigError, match=message):
            open_codec(folder, "cpu")

    refused(tmp_path / "gone", "no tokenizer in .*gone")
    for text, message in (
        ("no json", "no tokenizer in"),
        ("[]", "no tokenizer in"),
        ('{"model_type": "vtp"}', "no weights in"),
        ('{"_class_name": "VQModel"}', "no VTP and no AutoencoderKL"),
    ):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, message)
    save_tokenizer(tmp_path / "blind", train_reconstruction=False)
    refused(tmp_path / "blind", "no decoder")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8]}))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert read_make(tmp_path).patch == 4
    refused(tmp_path, "cannot be read")
    save_autoencoder(tmp_path / "kl")
    state = load_file(tmp_path / "kl/diffusion_pytorch_model.safetensors")
    state.pop("encoder.conv_in.bias")
    save_file(state, tmp_path / "kl/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "kl", "'encoder.conv_in.bias' is missing")
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    refused(tmp_path, r"pip install 'vtp\[diffusers\]'")
