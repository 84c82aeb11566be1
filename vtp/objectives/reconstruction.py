"""How far a reconstruction is from its image: pixels, and perception."""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vtp.config import ConfigError
from vtp.files import path_of
from vtp.images import IMAGENET_MEAN, IMAGENET_STD
from vtp.objectives.precision import full_precision

Perceptual = Callable[[Tensor, Tensor], Tensor]


@full_precision
def l1_loss(pred: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """mean |pred - target| over all elements; of ImageNet-normalised images, 1 is about 58 of 255 levels."""
    return F.l1_loss(pred, target)


@full_precision
def feature_distance(pred: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, ""]:
    """Perceptual distance in a network's own tokens: mean over tokens of 1 - cos(pred, target), 0..2.

    Half the squared distance of unit-normalised features, which is LPIPS without its learned channel weights and
    with one layer (Zhang et al. 2018, Eq. 1). `target` should carry no gradient.
    """
    return (1 - F.cosine_similarity(pred, target, dim=-1)).mean()


def load_perceptual(name: str, device: torch.device | str = "cpu") -> Perceptual:
    """A frozen perceptual distance f(pred, target) -> scalar of two batches of ImageNet-normalised images.

    Args:
        name: "lpips" for LPIPS-VGG v0.1 (Zhang et al. 2018) through the `lpips` library, or the path of a `.pt2` file
            that `torch.export.save` wrote: a module called as f(pred, target), whose output is averaged.
        device: where the distance runs.

    Raises:
        ConfigError: another name, no such file, a file that cannot be opened, or weights that cannot be fetched.
    """
    if name == "lpips":
        network = _lpips()
    elif name.endswith(".pt2"):
        network = _exported(path_of(name))
    else:
        raise ConfigError(f"perceptual '{name}': choose lpips, teacher, none or the path of a .pt2 file (torch.export)")
    network = network.to(device).requires_grad_(False)
    return full_precision(lambda pred, target: network(pred, target).mean())


def _lpips() -> nn.Module:
    try:
        from lpips import LPIPS
    except ImportError:
        raise ConfigError("perceptual=lpips needs the lpips library: pip install 'vtp[eval]'") from None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # torchvision deprecates the spelling that lpips uses
            distance = LPIPS(net="vgg", verbose=False)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigError(
            f"perceptual=lpips could not fetch its VGG-16 weights ({error}); put vgg16-397923af.pth into {folder}, "
            "or choose perceptual=teacher, which needs no download"
        ) from None
    return _OnNormalisedImages(distance)


class _OnNormalisedImages(nn.Module):
    """LPIPS wants pixels in -1..1; not clamped, so that out-of-range pixels still get a gradient."""

    mean: Tensor
    std: Tensor

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.distance(*((x * self.std + self.mean) * 2 - 1 for x in (pred, target)))


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"perceptual={path}: no such file")
    if not zipfile.is_zipfile(path):  # torch would log a traceback
        raise ConfigError(f"perceptual={path} is not a file of torch.export.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own read-only buffer
            return torch.export.load(path).module()
    except Exception as error:  # torch.export promises no exception class
        raise ConfigError(f"perceptual={path} is not a file of torch.export.save: {error}") from None
