"""Feature networks by name: their features, and what is said when they cannot be had."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.config import ConfigError
from vtp.metrics.extractors import load_extractor


def test_squeezenet_gives_the_reference_features(shared):
    extractor = load_extractor(f"squeezenet:{shared}/data/weights/squeezenet_v1.0/squeezenet1_0-decoded-fp32.pth")
    assert extractor.figure == "fd_squeezenet"
    with tarfile.open(shared / "data/photos256/photos256.tar") as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:4]
        photos = [np.array(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in members]
    got = extractor.features(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2))
    want = torch.from_numpy(np.load(shared / "data/reference/squeezenet_photos_features.npz")["orig"])
    nearest = torch.cdist(got, want).min(1)
    assert (nearest.values / got.norm(dim=1)).max() < 2e-3, "another network, layer, channel order or mean"


def test_squeezenet_sees_small_pictures(shared):
    extractor = load_extractor(f"squeezenet:{shared}/data/weights/squeezenet_v1.0/squeezenet1_0-decoded-fp32.pth")
    small = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    assert extractor.features(small).shape == (2, 512)


def test_only_inception_is_called_fid_and_says_what_to_do_offline(monkeypatch, tmp_path):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match="inception:PATH.*no other network's distance is FID"):
        load_extractor("inception")


def test_inception_from_a_file(tmp_path, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(inception, "load_state_dict", lambda self, state: None)  # a random network will do
    torch.save({}, tmp_path / "inception.pth")
    extractor = load_extractor(f"inception:{tmp_path}/inception.pth")
    assert extractor.figure == "fid"
    assert extractor.features(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)).shape == (1, 2048)


def test_other_names_and_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="choose inception"):
        load_extractor("resnet")
    with pytest.raises(ConfigError, match=f"no weights at {tmp_path}/none.pth"):
        load_extractor("squeezenet:~/none.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="not a SqueezeNet"):
        load_extractor(f"squeezenet:{tmp_path}/other.pth")
