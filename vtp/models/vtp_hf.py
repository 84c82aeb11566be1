"""THE tokenizer: a transformers model whose configuration keys, weight names and methods are the published ones."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel

from vtp.files import as_new
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.models.decoder import PixelDecoder
from vtp.models.layers import Linear, Recomputable
from vtp.models.published import WEIGHTS, upload, write_card
from vtp.models.text import TextTransformer, pool_text
from vtp.models.vit import Tokens, ViT
from vtp.models.vtp_hf_processing import VTPImageProcessor

PARTS = {"vision": ViTConfig, "text": TextConfig, "decoder": DecoderConfig}


def _flatten(config: ModelConfig) -> dict[str, Any]:
    """Published keys: those of a part carry its name, as in vision_embed_dim."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        flat |= {f"{key}_{name}": v for name, v in value.items()} if key in PARTS else {key: value}
    return flat


DEFAULTS = _flatten(ModelConfig())
DEFAULT_ROPE_DTYPE = DEFAULTS["rope_dtype"]


class VTPConfig(PretrainedConfig):
    """The published flat configuration; any key may be left out. `rope_dtype` is ours, and saved only when changed."""

    model_type = "vtp"

    def __init__(self, **kwargs: Any) -> None:
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers reads config.json; but none, and another model's, are not the default configuration.

        Raises:
            FileNotFoundError: no configuration there.
            ValueError: that of another kind of model.
        """
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        place = "/".join(str(part) for part in (pretrained_model_name_or_path, kwargs.get("subfolder")) if part)
        if not found:
            raise FileNotFoundError(f"no config.json in {place}: a tokenizer's folder holds it and {WEIGHTS}")
        if found.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{place}/config.json is of a model of type {found['model_type']!r}, not {cls.model_type!r}"
            )
        return found, unused

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> VTPConfig:
        """The flat form of a typed configuration."""
        return cls(**_flatten(config))

    def model_config(self) -> ModelConfig:
        """The typed form. Raises ValueError, naming the key, for values no network can be built from."""
        parts = {part: config(**self._values(config, f"{part}_")) for part, config in PARTS.items()}
        return ModelConfig(**parts, **self._values(ModelConfig, ""))

    def _values(self, config: type, prefix: str) -> dict[str, Any]:
        values = {}
        for field in dataclasses.fields(config):
            if field.name not in PARTS:
                value = getattr(self, prefix + field.name)
                # published files hold whole numbers where fractions may stand: "vision_mlp_ratio": 4
                whole = type(value) is int and "float" in str(field.type)
                values[field.name] = float(value) if whole else value
        return values

    @classmethod
    def from_vtp_yaml(cls, path: str | Path) -> VTPConfig:
        """Read the model from a published training configuration (sections data, training, vtp_model)."""
        from omegaconf import OmegaConf

        return cls(**_flat_from_yaml(OmegaConf.to_container(OmegaConf.load(path), resolve=True), path))

    def to_dict(self) -> dict[str, Any]:
        """As published: without `rope_dtype` where it is the published arithmetic."""
        return {k: v for k, v in super().to_dict().items() if k != "rope_dtype" or v != DEFAULT_ROPE_DTYPE}


# vtp_model.SECTION.KEY of a published YAML -> our key, where the two differ; keys that may be left out
YAML_SECTIONS = {"vision_encoder": "vision", "text_encoder": "text", "pixel_decoder": "decoder"}
YAML_NAMES = {
    "vision_norm_layer": "norm_type",
    "vision_feature_bottleneck": "vit_feature_bottleneck",
    "text_num_heads": "heads",
    "text_depth": "layers",
    "decoder_init_values": "layerscale_init",
}
YAML_OPTIONAL = (
    "vision_init_values",
    "vision_use_qk_norm",
    "text_ls_init_value",
    "decoder_init_values",
    "decoder_use_qk_norm",
)


def _flat_from_yaml(tree: Any, path: str | Path) -> dict[str, Any]:
    try:
        training = tree["training"]
        flat = {"image_size": tree["data"]["image_size"]}
        flat |= {key: training[key] for key in ("train_clip", "train_reconstruction")}
        optional = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
        flat |= {key: training[key] for key in optional if key in training}
        for section, part in YAML_SECTIONS.items():
            values = tree["vtp_model"][section]
            for field in dataclasses.fields(PARTS[part]):
                key = f"{part}_{field.name}"
                name = YAML_NAMES.get(key, field.name)
                if name in values or key not in YAML_OPTIONAL:
                    flat[key] = values[name]
        return flat
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error} is missing in data, training or vtp_model") from None


def yaml_names() -> dict[str, set[str]]:
    """The keys of each section of vtp_model that describe the network."""
    return {
        section: {YAML_NAMES.get(f"{part}_{field.name}", field.name) for field in dataclasses.fields(PARTS[part])}
        for section, part in YAML_SECTIONS.items()
    }


LEGACY_NAMES = {"transformer": "text_transformer", "proj": "visual_proj"}


def from_legacy_state(
    state: Mapping[str, Tensor], weights: Literal["student", "teacher"] = "student"
) -> dict[str, Tensor]:
    """Weights of the published training class under the published model's names, without its head.

    `weights` says whose trunk and projection; the other's are left out. All else has no teacher.
    """
    renamed: dict[str, Tensor] = {}
    replaced = {"trunk", "proj"} if weights == "teacher" else set()
    for name, tensor in state.items():
        first, dot, rest = name.partition(".")
        if first in replaced or first.endswith("dino_head"):
            continue
        if first.startswith("teacher_"):
            first = first.removeprefix("teacher_")
            if first not in replaced:
                continue
        renamed[LEGACY_NAMES.get(first, first) + dot + rest] = tensor
    return renamed


def legacy_name(name: str, weights: Literal["student", "teacher"] = "student") -> str:
    """The training class's name of one of the published model's weights."""
    first, dot, rest = name.partition(".")
    first = {ours: theirs for theirs, ours in LEGACY_NAMES.items()}.get(first, first)
    return ("teacher_" if weights == "teacher" and first in ("trunk", "proj") else "") + first + dot + rest


HUB_OPTIONS = ("repo_id", "private", "token", "commit_message", "commit_description", "revision", "create_pr")


class VTPModel(PreTrainedModel):
    """A visual tokenizer: ViT encoder, optional pixel decoder, optional text tower.

    Images are ImageNet-normalised [b 3 H W] of any size; rows = H // patch, columns = W // patch. Text is CLIP token
    ids [b L], L at most the context length: text cut after its end token has the same feature as padded text.
    """

    config_class = VTPConfig
    base_model_prefix = ""
    main_input_name = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "TextBlock"]

    visual_proj: Linear  # None without CLIP, as published
    pixel_decoder: PixelDecoder  # None without reconstruction
    text_projection: nn.Parameter | Linear | None
    logit_bias: nn.Parameter | None

    def __init__(self, config: VTPConfig) -> None:
        super().__init__(config)
        cfg = config.model_config()
        vision, text = cfg.vision, cfg.text
        self.vision, self.text = vision, text
        self.trunk = ViT(vision, cfg.rope_dtype)
        if not cfg.train_clip:
            self.register_module("visual_proj", None)
        if not cfg.train_reconstruction:
            self.register_module("pixel_decoder", None)
        if cfg.train_clip:
            self.context_length, self.vocab_size = text.context_length, text.vocab_size
            self.text_pool_type = text.pool_type
            width = text.embed_dim
            shape = [1] if cfg.nonscalar_logit_scale else []
            self.visual_proj = Linear(vision.clip_dim, width, bias=False, std=vision.clip_dim**-0.5)
            self.text_transformer = TextTransformer(text)
            self.token_embedding = nn.Embedding(text.vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.empty(text.context_length, width))
            self.ln_final = nn.LayerNorm(width)
            if text.proj_type == "none":
                self.text_projection = None
            elif text.proj_bias:
                self.text_projection = Linear(width, width, std=width**-0.5)
            else:
                self.text_projection = nn.Parameter(torch.empty(width, width))
            self.logit_scale = nn.Parameter(torch.empty(shape))
            self.logit_bias = None if cfg.init_logit_bias is None else nn.Parameter(torch.empty(shape))
        if cfg.train_reconstruction:
            self.pixel_decoder = PixelDecoder(cfg.decoder, vision.latent_dim, vision.patch_size, cfg.rope_dtype)
        self.reset_parameters()
        self.post_init()

    def reset_parameters(self) -> None:
        """Draw CLIP's own tensors (Radford et al. 2021); the layers have drawn theirs."""
        if not self.config.train_clip:
            return
        scale, bias = self.config.init_logit_scale, self.config.init_logit_bias
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.text_projection, nn.Parameter):
            nn.init.normal_(self.text_projection, std=self.text.embed_dim**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07) if scale is None else scale)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, bias)

    def init_weights(self) -> None:
        """Nothing to do: every layer drew its weights when it was built, and transformers would draw them again."""

    def _init_weights(self, module: nn.Module) -> None:
        """Called by from_pretrained for modules whose weights are not in the file."""
        if not isinstance(module, nn.Embedding) and hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What transformers calls to recompute every n-th block of trunk, decoder and text tower, or none."""
        blocks = [module for module in self.modules() if isinstance(module, Recomputable)]
        for i, block in enumerate(blocks):
            block.gradient_checkpointing = enable and i % every_n_layers == 0
            block._gradient_checkpointing_func = gradient_checkpointing_func

    # What the published methods are made of, for one pass of the trunk that serves many.

    def latents(self, tokens: Tokens) -> Float[Tensor, "b c h w"]:
        """The latent map of the patch tokens."""
        return self.trunk.bottleneck(tokens.patches).mT.unflatten(2, tokens.grid)

    def clip_image(self, tokens: Tokens, normalize: bool = True) -> Float[Tensor, "b t"]:
        """The image features in the space shared with text."""
        self._require("train_clip")
        x = tokens.cls if self.vision.clip_feat == "cls" else tokens.patches.mean(dim=1)
        x = self.visual_proj(x if self.vision.bottleneck_ae_only else self.trunk.bottleneck(x))
        return F.normalize(x, dim=-1) if normalize else x

    def clip_text(self, texts: Sequence[Int[Tensor, "_ _"]], normalize: bool = True) -> Float[Tensor, "b *l t"]:
        """The text features, in their order, of texts in groups of one length each (padding included)."""
        self._require("train_clip")
        for text in texts:
            self._check_text(text)
        # One look-up for all groups: each has a gradient as large as the whole embedding.
        tokens = self.token_embedding(torch.cat([text.flatten() for text in texts])).split([t.numel() for t in texts])
        embedded = [
            x.unflatten(0, text.shape) + self.positional_embedding[: text.shape[1]]
            for x, text in zip(tokens, texts, strict=True)
        ]
        groups = zip(self.text_transformer.grouped(embedded), texts, strict=True)
        pooled = [pool_text(x, text, self.text.pool_type) for x, text in groups]
        x = self.ln_final(pooled[0] if len(pooled) == 1 else torch.cat(pooled))
        if isinstance(self.text_projection, nn.Module):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def _check_text(self, text: Any) -> None:
        known = isinstance(text, Tensor)
        given = f"shape {list(text.shape)}, {text.dtype}" if known else f"type {type(text).__name__}"
        ids = known and text.ndim == 2 and not text.is_floating_point()
        if not ids or not 1 <= text.shape[1] <= self.text.context_length:
            raise ValueError(
                f"text of {given}: give token ids [texts, tokens], 1 to {self.text.context_length} tokens each, as "
                "the tokenizer does"
            )
        if torch.compiler.is_compiling() or text.device.type != "cpu" or text.numel() == 0:
            return  # a GPU would have to be waited for
        least, most = (int(x) for x in text.aminmax())
        if least < 0 or most >= self.text.vocab_size:
            raise ValueError(f"token ids from {least} to {most}: the model has 0 to {self.text.vocab_size - 1}")

    # The published methods.

    def get_last_layer_feature(
        self, image: Float[Tensor, "b 3 H W"], use_bottleneck: bool = False
    ) -> dict[str, Tensor]:
        """{"cls_token": [b d], "patch_tokens": [b n d]} after the final norm; d is the latents' with use_bottleneck."""
        cls, patches, _ = self.trunk(image)
        if use_bottleneck:
            cls, patches = self.trunk.bottleneck(cls), self.trunk.bottleneck(patches)
        return {"cls_token": cls, "patch_tokens": patches}

    def get_intermediate_layers_feature(
        self,
        image: Float[Tensor, "b 3 H W"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch features of the last n blocks, or of the blocks n, before the bottleneck: see the trunk's method."""
        return self.trunk.get_intermediate_layers(image, n, reshape, return_class_token, norm)

    def get_clip_image_feature(self, image: Float[Tensor, "b 3 H W"], normalize: bool = True) -> Float[Tensor, "b t"]:
        """Image features in the space shared with text; of length 1 with normalize."""
        return self.clip_image(self.trunk(image), normalize)

    def get_clip_text_feature(self, text: Int[Tensor, "b l"], normalize: bool = True) -> Float[Tensor, "b *l t"]:
        """Text features in the space shared with images; of length 1 with normalize."""
        return self.clip_text([text], normalize)

    def get_clip_logits(
        self, image: Float[Tensor, "a 3 H W"], text: Int[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "a b"], Float[Tensor, "b a"]]:
        """Scaled similarities of images and texts, and their transpose."""
        self._require("train_clip")
        logits = self.logit_scale.exp() * self.get_clip_image_feature(image) @ self.get_clip_text_feature(text).T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def get_reconstruction_latents(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """The latents of images."""
        return self.latents(self.trunk(image))

    def get_latents_decoded_images(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """The images of latents: ImageNet-normalised, not clamped."""
        self._require("train_reconstruction")
        return self.pixel_decoder(latents)

    def forward(
        self,
        image: Float[Tensor, "a 3 H W"] | None = None,
        text: Int[Tensor, "b l"] | None = None,
        forward_type: str = "clip",
        *,
        pixel_values: Float[Tensor, "a 3 H W"] | None = None,
    ) -> dict[str, Tensor]:
        """The published entry: "clip" (features, exp'ed logit_scale), "rec" (latents and images) or "feature".

        `pixel_values` is the image under the name that an image processor gives it.
        """
        image = pixel_values if image is None else image
        if forward_type == "clip":
            out = {} if image is None else {"image_features": self.get_clip_image_feature(image)}
            out |= {} if text is None else {"text_features": self.get_clip_text_feature(text)}
            self._require("train_clip")
            out["logit_scale"] = self.logit_scale.exp()
            return out if self.logit_bias is None else out | {"logit_bias": self.logit_bias}
        if image is None:
            raise ValueError(f"forward_type={forward_type!r} needs an image")
        if forward_type == "rec":
            latents = self.get_reconstruction_latents(image)
            decoded = self.get_latents_decoded_images(latents)
            return {"latents": latents, "reconstructed_image": decoded, "target_image": image}
        if forward_type == "feature":
            return self.get_last_layer_feature(image, use_bottleneck=True)
        raise ValueError(f"forward_type={forward_type!r} is unknown; one of 'clip', 'rec', 'feature'")

    # Publishing: what transformers does, and a card.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers loads; but a path where nothing is, is no name of a repository.

        Raises:
            FileNotFoundError: no such folder.
        """
        place = str(pretrained_model_name_or_path)
        if place.startswith(("/", ".", "~")) and not os.path.exists(place):
            raise FileNotFoundError(f"no folder {place}: it should hold config.json and {WEIGHTS}")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers saves, and README.md, with what is known about these weights: see `published.write_card`.

        With push_to_hub also as `push_to_hub` does, to repo_id (default: the folder's name).
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        folder = Path(save_directory)
        repo_id = hub.pop("repo_id", folder.name)
        self._save(folder, repo_id if push_to_hub else None, *args, **kwargs)
        if push_to_hub:
            upload(folder, repo_id, **hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Save, and send to a repository on the Hub, image processor and card included.

        Options and errors as `published.upload`.
        """
        with TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id)
            VTPImageProcessor(self.config.image_size).save_pretrained(folder)
            return upload(Path(folder), repo_id, **options)

    def _save(self, folder: Path, name: str | None, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(folder, *args, **kwargs)
        for file in folder.glob("*.safetensors"):
            as_new(file)
        if (folder / WEIGHTS).is_file() and kwargs.get("is_main_process", True):  # not: shards, variants, other ranks
            origin = Path(self.name_or_path or "")  # a folder, a repository, or nothing
            write_card(folder, name=name, origin=origin if self.name_or_path and origin.is_dir() else None)

    def _require(self, key: str) -> None:
        if not getattr(self.config, key):
            raise RuntimeError(f"this tokenizer was built with {key}=false and has no such part")


def publish(model: VTPModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a tokenizer folder: configuration, weights (the model's own unless given), image processor of its size.

    Other files in it stay, and those of before until the new ones are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)  # of a file in the way transformers merely logs
    for left in folder.glob(".new_*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=".new_", dir=folder) as name:
        model.save_pretrained(name, state_dict=None if weights is None else dict(weights))
        VTPImageProcessor(model.config.image_size).save_pretrained(name)
        for file in Path(name).iterdir():
            file.replace(folder / file.name)


AutoConfig.register("vtp", VTPConfig)
AutoModel.register(VTPConfig, VTPModel)
AutoImageProcessor.register(
    VTPConfig,
    slow_image_processor_class=VTPImageProcessor,
    # transformers 5 asks for it first, and says so where there is none; 4 takes no class of another base.
    fast_image_processor_class=None if transformers.__version__.startswith("4.") else VTPImageProcessor,
)
