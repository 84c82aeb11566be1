"""A small convolutional classifier: the referee of toy-size runs, trained in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ConvClassifier(nn.Module):
    """Four 3x3 convolutions, three of them halving, mean pooling, one linear head for each label.

    Args:
        classes: class names of each label.
        size: side of the pictures it sees, pixels; others are resized.
        width: channels of the first layer.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]], size: int = 32, width: int = 32) -> None:
        super().__init__()
        self.classes = {label: tuple(names) for label, names in classes.items()}
        self.size, self.width = size, width
        widths, strides = (3, width, 2 * width, 2 * width, 4 * width), (2, 2, 1, 2)
        self.layers = nn.Sequential()
        for i, stride in enumerate(strides):
            self.layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(widths[i + 1]))
            self.layers.append(nn.ReLU())
        self.heads = nn.ModuleDict({label: nn.Linear(widths[-1], len(names)) for label, names in self.classes.items()})

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pooled features of ImageNet-normalised images."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.layers(images).mean((2, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Logits for every label."""
        x = self.features(images)
        return {label: head(x) for label, head in self.heads.items()}
