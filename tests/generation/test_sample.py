import json

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.cli import main
from vtp.config import ConfigError
from vtp.generation.run import train_dit
from vtp.generation.sample import sample
from vtp.images import to_uint8
from vtp.models.dit import LightningDiT
from vtp.models.vtp_hf import VTPModel


@pytest.fixture
def run(tiny):
    """A finished run, its weights drawn at random: five steps leave the network as good as zero."""
    folder = train_dit(tiny)
    model = LightningDiT.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder.parent


def pictures(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("[0-9]*.png"))]).astype(int)


def test_picture_i_is_the_same_whatever_the_batch(run, tmp_path):
    one = pictures(sample(run, tmp_path / "one", num=5, steps=3, batch_size=1, device="cpu"))
    many = pictures(sample(run, tmp_path / "many", num=7, steps=3, batch_size=4, device="cpu"))
    assert one.shape == (5, 16, 16, 3)
    assert abs(one - many[:5]).max() <= 1  # a level of rounding between batch sizes
    assert abs(many[0] - many[1]).max() > 1
    other = pictures(sample(run, tmp_path / "other", num=5, steps=3, seed=1, device="cpu"))
    assert abs(other - one).max() > 1


def test_files_and_protocol(run, tmp_path):
    out = sample(run, tmp_path / "out", num=6, steps=2, cfg_scale=2.0, classes=["star", "0"], device="cpu")
    assert sorted(f.name for f in out.iterdir()) == [*(f"{i:06d}.png" for i in range(6)), "grid.png", "samples.json"]
    protocol = json.loads((out / "samples.json").read_text())
    assert protocol["classes"] == {"star": 3, "circle": 0}
    assert (protocol["steps"], protocol["cfg_scale"], protocol["sampler"]) == (2, 2.0, "euler")
    with Image.open(out / "grid.png") as grid:
        assert grid.height == 4 + 2 * 100  # two rows of pictures enlarged to 96


def test_outputs_below_a_file_are_one_line(run, latents, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = f"{tmp_path}/file/out"
    for words in (
        ["sample", str(run), "--out", out],
        ["train-dit", "dit_quickstart", f"latents={latents}", f"out={out}"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and f"vtp: {tmp_path / 'file'}" in capsys.readouterr().err


def test_an_earlier_calls_pictures_do_not_stay(run, tmp_path):
    sample(run, tmp_path / "out", num=4, steps=1, device="cpu")
    assert len(pictures(sample(run, tmp_path / "out", num=2, steps=1, device="cpu"))) == 2


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_guidance_changes_pictures_with_every_sampler(run, tmp_path, sampler):
    plain = pictures(sample(run, tmp_path / "plain", num=2, steps=2, sampler=sampler, device="cpu"))
    guided = pictures(sample(run, tmp_path / "guided", num=2, steps=2, sampler=sampler, cfg_scale=4.0, device="cpu"))
    assert (guided != plain).any()


def test_pictures_are_rounded_decodings(run, tokenizer, tmp_path, monkeypatch):
    """What is decoded is de-normalised latents, and what is saved is rounded."""
    decoded = []
    original = VTPModel.get_latents_decoded_images

    def spy(self, latents):
        decoded.append((latents, original(self, latents)))
        return decoded[-1][1]

    monkeypatch.setattr(VTPModel, "get_latents_decoded_images", spy)
    out = sample(run, tmp_path / "out", num=2, steps=2, device="cpu")
    expected = to_uint8(decoded[0][1]).permute(0, 2, 3, 1).numpy()
    assert (pictures(out) == expected).all()


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(ConfigError, match="no finished model"):
        sample(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="no class 'strar'; there are 8: circle"):
        sample(run, tmp_path / "out", classes=["strar"])
    for wrong in ({"num": 0}, {"steps": 0}, {"batch_size": 0}, {"shift": 0.0}):
        (name,) = wrong
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            sample(run, tmp_path / "out", **wrong)
    with pytest.raises(ConfigError, match="--tokenizer"):
        sample(run, tmp_path / "out", tokenizer=tmp_path)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ConfigError, match="not the one that made the latents"):
        sample(run, tmp_path / "out", tokenizer=tmp_path / "moved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="not empty"):
        sample(run, tmp_path / "full")
    assert (tmp_path / "full" / "holiday.png").exists()
