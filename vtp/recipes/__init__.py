"""Which runs exist. A recipe is a function that returns a typed configuration; a variant calls it and changes a field.

The names stand here without their functions, so that `vtp --help` can list them without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtp.generation.config import DiTTrainConfig
    from vtp.pretrain.config import PretrainConfig

SIZES = ("quickstart", "cpu", "small", "base", "large")
CORNERS = ("ae", "clip_ae", "ssl_ae", "vtp")  # which objectives are on
DITS = ("dit_quickstart", "dit_b", "dit_xl")

# `base` is `base_vtp`; a bare corner is that corner of `small`.
PRETRAIN = (*SIZES, *CORNERS, *(f"{size}_{corner}" for size in SIZES for corner in CORNERS[:-1]))


def pretrain_recipe(name: str) -> PretrainConfig:
    """The configuration of a name in `PRETRAIN`."""
    from vtp.recipes import pretrain

    size, _, corner = name.partition("_")
    if name in CORNERS:
        size, corner = "small", name
    return pretrain.corner(getattr(pretrain, size)(), corner or "vtp")


def dit_recipe(name: str) -> DiTTrainConfig:
    """The configuration of a name in `DITS`."""
    from vtp.recipes import dit

    return getattr(dit, name)()
