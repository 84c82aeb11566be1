"""Pixel and perceptual distances, and what a user is told when one cannot be had."""

import math

import pytest
import torch
from torch import nn

from vtp.config import ConfigError
from vtp.images import normalise
from vtp.objectives.reconstruction import feature_distance, l1_loss, load_perceptual


def test_l1_equals_the_loop_and_is_float32_inside_autocast():
    a, b = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    want = sum(abs(x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
    torch.testing.assert_close(l1_loss(a, b), torch.tensor(want, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert l1_loss(a.bfloat16(), b.float()).dtype == torch.float32


def test_feature_distance_equals_the_loop_and_ignores_lengths():
    a = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, 5, dtype=torch.float64)
    want = 0.0
    for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True):
        want = want + (1 - x.dot(y) / (x.dot(x).sqrt() * y.dot(y).sqrt())) / 6
    got = feature_distance(a, b)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, a), torch.autograd.grad(want, a))
    torch.testing.assert_close(feature_distance(3 * a, b / 7), got)
    assert math.isclose(float(feature_distance(b, -b)), 2.0)


class Blurred(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pred, target):
        return (self.conv(pred) - self.conv(target)).square().mean((1, 2, 3))


def test_an_exported_module_is_a_perceptual_distance(tmp_path):
    module, images = Blurred(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    dynamic = {"pred": {0: torch.export.Dim("b")}, "target": {0: torch.export.Dim("b")}}
    torch.export.save(torch.export.export(module, images, dynamic_shapes=dynamic), tmp_path / "blurred.pt2")
    distance = load_perceptual(str(tmp_path / "blurred.pt2"))
    pred = torch.randn(5, 3, 8, 8, requires_grad=True)
    target = torch.randn(5, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = distance(pred, target)
    torch.testing.assert_close(got, module(pred, target).mean())
    got.backward()
    assert pred.grad.abs().sum() > 0


def test_lpips_sees_pixels_between_minus_one_and_one(monkeypatch):
    lpips = pytest.importorskip("lpips")
    seen = []

    class Fake(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(lpips, "LPIPS", Fake)
    black, white = (normalise(torch.full((2, 3, 8, 8), v)) for v in (0.0, 1.0))
    torch.testing.assert_close(load_perceptual("lpips")(black, white), torch.tensor(4.0))
    torch.testing.assert_close(seen[0][0], torch.full((2, 3, 8, 8), -1.0))


def test_lpips_without_its_weights_says_what_to_do(monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match="vgg16-397923af.pth.*perceptual=teacher"):
        load_perceptual("lpips")


def test_other_names_and_files_are_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="choose lpips"):
        load_perceptual("vgg")
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.pt2: no such file"):
        load_perceptual("~/none.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"not a zip file")
    with pytest.raises(ConfigError, match="broken.pt2 is not a file"):
        load_perceptual(str(tmp_path / "broken.pt2"))
    assert capfd.readouterr().err == ""
