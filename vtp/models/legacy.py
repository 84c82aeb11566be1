"""`vtp convert`: a checkpoint of the published training class -> a tokenizer folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from vtp.config import ConfigError
from vtp.models.vtp_hf import VTPConfig, VTPModel, from_legacy_state, legacy_name, publish, yaml_names

_INSIDE = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")  # what wraps modules names
WRAPPERS = ("state_dict", "model", "module")  # keys under which training programs keep the weights
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
# What the training class also reads from the three sections, and the values that build the published network.
TRAINING_KEYS: dict[str, Any] = {"model_type": "dinov3", "norm_kwargs": None, "act_kwargs": None}


def convert(source: Path, config: Path, out: Path, weights: Literal["student", "teacher"] = "student") -> VTPModel:
    """Write the tokenizer in a training checkpoint to `out`, and return it.

    Args:
        source: .safetensors, or .pt, .pth, .ckpt, .bin with tensors only; the weights at its top or under
            state_dict, model or module.
        config: the run's YAML, with the sections data, training and vtp_model.
        out: a folder that holds no tokenizer yet.
        weights: whose trunk and projection; the decoder and the text tower have no teacher.

    Raises:
        ConfigError: file, key and reason, where anything is missing, unknown, of another shape, or not finite.
    """
    if (out / "model.safetensors").exists():
        raise ConfigError(f"{out} already holds a tokenizer; give another folder")
    network, read = _configuration(config), _read(source)
    if weights == "teacher" and not any(name.startswith("teacher_trunk.") for name in read):
        raise ConfigError(f"{source} holds no teacher_trunk.*: there is no teacher in it, take the student")
    state, model = from_legacy_state(read, weights), VTPModel(network)
    expected = model.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        where = f"{source}: '{legacy_name(name, weights)}'"
        if name not in state:
            raise ConfigError(f"{where} is missing, which the network of {config} has")
        if name not in expected:
            raise ConfigError(f"{where} is no part of the network of {config}")
        ours, theirs = expected[name], state[name]
        if theirs.shape != ours.shape:
            raise ConfigError(f"{where} is {list(theirs.shape)}, in the network of {config} {list(ours.shape)}")
        if not theirs.isfinite().all():
            raise ConfigError(f"{where} holds NaN or infinities; take an earlier checkpoint")
        if name.endswith("rope_embed.periods") and not torch.equal(theirs.to(ours.dtype), ours):
            raise ConfigError(f"{where} is not what the published networks rotate by; such weights cannot be converted")
    model.load_state_dict(state)
    publish(model, out)
    return model


def _configuration(path: Path) -> VTPConfig:
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        config = VTPConfig.from_vtp_yaml(path)
        config.model_config()
        sections: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml's own error classes are not part of OmegaConf's interface
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    # Reading a YAML ignores, as published, what it does not know; a conversion would then be silently another network.
    harmless = TRAINING_KEYS | {"upscale_factor": config.vision_patch_size}
    for section, names in yaml_names().items():
        for key, value in sections["vtp_model"][section].items():
            if key not in names and (key not in harmless or value != harmless[key]):
                raise ConfigError(
                    f"{path}: vtp_model.{section}.{key}={value} is unknown to the published network; "
                    "remove it if the network is the same without it"
                )
    return config


def _read(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names of the training class."""
    if not source.is_file():
        raise ConfigError(f"no checkpoint file at {source}")
    if source.suffix not in (".safetensors", *PICKLED):
        raise ConfigError(f"{source}: a checkpoint ends in .safetensors, {', '.join(PICKLED)}")
    try:
        if source.suffix == ".safetensors":
            tree: Any = load_file(source)
        else:
            tree = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and safetensors' own classes
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch colours its messages
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ConfigError(f"{source} cannot be read as tensors: {reason}; save the model's state_dict alone") from None
    for key in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(f"{source} holds no state_dict")
    for name, value in tree.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{source}: '{name}' is a {type(value).__name__}, not a tensor; save the state_dict alone"
            )
    named = {_INSIDE.sub("", name): tensor for name, tensor in tree.items()}
    wrapped = all(name.startswith("module.") for name in named)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in named.items()}
