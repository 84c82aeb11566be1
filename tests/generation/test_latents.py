import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vtp.cli import main
from vtp.config import ConfigError
from vtp.data import scenes
from vtp.generation.latents import Latents, LatentStats, encode_latents
from vtp.images import center_crop, normalise
from vtp.models.vtp_hf import VTPModel


def all_of(folder, key):
    return torch.cat([load_file(file)[key] for file in sorted(folder.glob("shard_*.safetensors"))])


def test_latents_are_the_tokenizers_in_the_datas_order(tokenizer, latents):
    model = VTPModel.from_pretrained(tokenizer).eval()
    found = [scene for scene in map(lambda i: scenes.draw(i, 16), range(200)) if "shape" in scene[2]][:40]
    images = normalise(torch.from_numpy(np.stack([image for image, *_ in found])).permute(0, 3, 1, 2))
    with torch.no_grad():
        # Rows of another batch size agree to the rounding of the bf16 rotary embedding, no further.
        torch.testing.assert_close(
            all_of(latents, "latents"), model.get_reconstruction_latents(images), rtol=0, atol=2e-2
        )
        mirrored = model.get_reconstruction_latents(images.flip(-1))
    torch.testing.assert_close(all_of(latents, "latents_flip"), mirrored, rtol=0, atol=2e-2)
    assert all_of(latents, "labels").tolist() == [labels["shape"] for *_, labels in found]


def test_statistics_are_those_of_all_latents(latents):
    stats, everything = LatentStats.read(latents / "stats.json"), all_of(latents, "latents").double()
    assert stats.count == 40 and stats.shape == (6, 2, 2) and stats.classes == scenes.SHAPES
    assert stats.left_out["no shape"] > 0
    by_channel = everything.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(stats.mean).double(), by_channel.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(stats.std).double(), by_channel.std(1), rtol=1e-6, atol=1e-6)
    normal = stats.normalise(everything.float())
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5 and (normal.std((0, 2, 3)) - 1).abs().max() < 1e-5
    torch.testing.assert_close(stats.denormalise(normal), everything.float())


def test_take_reads_rows_across_files(latents):
    rows = torch.tensor([39, 0, 16, 15, 0, 31])
    mirrored = torch.tensor([False, True, False, True, False, True])
    taken, labels = Latents(latents).take(rows, mirrored)
    plain, flipped = all_of(latents, "latents"), all_of(latents, "latents_flip")
    expected = torch.where(mirrored[:, None, None, None], flipped[rows], plain[rows])
    assert torch.equal(taken, expected) and torch.equal(labels, all_of(latents, "labels")[rows])


def test_made_once_and_refused_for_other_data(tokenizer, latents, capsys):
    before = (latents / "stats.json").stat().st_mtime_ns
    encode_latents(tokenizer, "scenes", latents, label="shape", limit=40, device="cpu")
    assert (latents / "stats.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="label: shape -> colour"):
        encode_latents(tokenizer, "scenes", latents, label="colour", limit=40, device="cpu")


def test_class_folders_with_a_broken_picture(tokenizer, tmp_path):
    """Pictures of any size are cropped as ADM does; a broken one is counted; one label needs no name."""
    generator = np.random.default_rng(0)
    pictures = {}
    for name in ("ant/0.png", "bee/1.png", "bee/2.png"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures[name] = Image.fromarray(generator.integers(0, 256, (24, 40, 3), np.uint8))
        pictures[name].save(file)
    (tmp_path / "data" / "bee" / "3.png").write_bytes(b"no picture")
    out = encode_latents(tokenizer, str(tmp_path / "data"), tmp_path / "out", flip=False, device="cpu")
    stats = LatentStats.read(out / "stats.json")
    assert stats.classes == ("ant", "bee") and stats.left_out == {"not an image": 1}
    tensors = load_file(out / "shard_00000.safetensors")
    assert tensors["labels"].tolist() == [0, 1, 1] and "latents_flip" not in tensors
    model = VTPModel.from_pretrained(tokenizer).eval()
    image = torch.from_numpy(np.array(center_crop(pictures["ant/0.png"], 16))).permute(2, 0, 1)
    with torch.no_grad():
        expected = model.get_reconstruction_latents(normalise(image[None]))
    torch.testing.assert_close(tensors["latents"][:1], expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_pictures_without_labels(tokenizer, tmp_path, kind, capsys):
    """Their latents are those of the same pictures with labels; only a diffusion transformer needs the labels."""
    data = tmp_path / "data"
    for i in range(5):
        file = data / f"ant/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 40, 3), np.uint8)).save(file)
    with_labels = encode_latents(tokenizer, str(data), tmp_path / "with", device="cpu")
    if kind == "folder":
        data = data / "ant"
    else:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for file in sorted(data.rglob("*.png")):
                tar.add(file, file.name)
        data = tmp_path / "0.tar"
    options = {"batch_size": 2, "shard_size": 3, "device": "cpu"}
    without = encode_latents(tokenizer, str(data), tmp_path / "without", **options)
    assert "without labels" in " ".join(capsys.readouterr().err.split())
    for key in ("latents", "latents_flip"):
        torch.testing.assert_close(all_of(without, key), all_of(with_labels, key), rtol=0, atol=2e-2)
    assert all("labels" not in load_file(file) for file in without.glob("shard_*"))
    found = Latents(without)
    assert (len(found), found.stats.label, found.stats.classes) == (5, None, ())
    assert encode_latents(tokenizer, str(data), without, device="cpu") == without  # there already
    with pytest.raises(ConfigError, match="has no labels; give labels by class folders or --annotations"):
        encode_latents(tokenizer, str(data), tmp_path / "x", label="class", device="cpu")
    mine = shutil.copytree(tokenizer, tmp_path / "mine")
    main(["publish", str(mine), "--stats", str(without)])  # statistics need no labels
    with pytest.raises(SystemExit):
        main(["train-dit", "dit_quickstart", f"latents={without}", f"out={tmp_path / 'run'}"])
    assert "holds latents without labels" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_constant_channel_becomes_zero(latents):
    stats = LatentStats.read(latents / "stats.json")
    flat = LatentStats(**{**stats.__dict__, "mean": (1.0,) * 6, "std": (0.0,) * 6})
    assert flat.normalise(torch.ones(1, 6, 2, 2)).eq(0).all()


def test_mistakes_are_named(tokenizer, latents, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        encode_latents(tmp_path, "scenes", tmp_path / "out")
    with pytest.raises(ConfigError, match="several labels; choose --label of colour"):
        encode_latents(tokenizer, "scenes", tmp_path / "out")
    with pytest.raises(ConfigError, match="no label 'shpae'"):
        encode_latents(tokenizer, "scenes", tmp_path / "out", label="shpae")
    with pytest.raises(ConfigError, match="size=20 is not a multiple of the tokenizer's patch size 8"):
        encode_latents(tokenizer, "scenes", tmp_path / "out", label="shape", size=20)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        encode_latents(tokenizer, "scenes", tmp_path / "out", label="shape", batch_size=0)
    with pytest.raises(ConfigError, match="vtp latents"):
        Latents(tmp_path)
    (tmp_path / "stats.json").write_text((latents / "stats.json").read_text())
    with pytest.raises(ConfigError, match="holds 0 latents, its stats.json says 40"):
        Latents(tmp_path)
    (tmp_path / "stats.json").write_text(json.dumps({"mean": [0.0]}))
    with pytest.raises(ConfigError, match="does not describe latents"):
        Latents(tmp_path)
