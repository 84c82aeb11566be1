"""Networks whose features Frechet distances are measured in. The network names the figure; only Inception's is FID."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vtp.config import ConfigError
from vtp.files import path_of


class Extractor(NamedTuple):
    """Bytes [b, 3, h, w] -> features [b, d], and how the distance in them must be called."""

    figure: str  # "fid", "fd_squeezenet", "fd_..."
    protocol: str  # one line for the results file: network, layer, size
    features: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b d"]]


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Open a feature network by name.

    Args:
        name: "inception" (TensorFlow's Inception-v3 through torch-fidelity, which downloads it), "inception:PATH" (the
            same from a local file), or "squeezenet:PATH" (SqueezeNet v1.0, a float32 state dict).
        device: where it runs.

    Raises:
        ConfigError: another name, no weights at the path, weights of another network, or no download.
    """
    kind, _, path = name.partition(":")
    if kind == "inception":
        return _inception(str(path_of(path)) if path else None, device)
    if kind == "squeezenet" and path:
        return _squeezenet(path_of(path), device)
    raise ConfigError(f"extractor '{name}': choose inception, inception:PATH or squeezenet:PATH")


def _inception(path: str | None, device: torch.device | str) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ConfigError("extractor inception needs torch-fidelity: pip install 'vtp[eval]'") from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"extractor inception: could not get its weights ({error}); give the file of torch-fidelity "
            "(weights-inception-2015-12-05-6726825d.pth) as inception:PATH, or another extractor: "
            "no other network's distance is FID"
        ) from None
    network = network.to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network(images.to(device))[0]

    return Extractor("fid", "TF Inception-v3 2015-12-05, 2048 pooled features, torch-fidelity, 299 px", features)


def _squeezenet(path: Path, device: torch.device | str) -> Extractor:
    if not path.is_file():
        raise ConfigError(f"extractor squeezenet: no weights at {path}")
    network = SqueezeNet()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling and load_state_dict raise many classes
        raise ConfigError(f"extractor squeezenet: {path} is not a SqueezeNet v1.0 state dict: {error}") from None
    network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network(images.to(device))

    return Extractor("fd_squeezenet", "SqueezeNet v1.0, fire9 mean-pooled (512), at least 128 px", features)


class Fire(nn.Module):
    """Squeeze to few channels, expand by two convolutions side by side."""

    def __init__(self, width_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 (Iandola et al. 2016) as its Caffe original: bytes in, BGR minus mean, mean-pooled fire9 out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        self.fire2, self.fire3, self.fire4 = Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128)
        self.fire5, self.fire6 = Fire(256, 32, 128), Fire(256, 48, 192)
        self.fire7, self.fire8 = Fire(384, 48, 192), Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv_final = nn.Conv2d(512, 1000, 1, padding=1)  # in the file; the features end before it

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 512"]:
        x = images.float()
        if min(x.shape[-2:]) < 128:  # three poolings leave nothing of a small picture
            scale = 128 / min(x.shape[-2:])
            size = [round(side * scale) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = x.flip(1) - torch.tensor([104.0, 117.0, 123.0], device=x.device).view(3, 1, 1)
        x = _pool(F.relu(self.conv1(x)))
        x = _pool(self.fire4(self.fire3(self.fire2(x))))
        x = _pool(self.fire8(self.fire7(self.fire6(self.fire5(x)))))
        return self.fire9(x).mean((2, 3))


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)
