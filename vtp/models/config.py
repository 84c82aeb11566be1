"""What the networks are built from: the published keys, by part, with the published defaults (VTP-Base)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

FFN_LAYERS = ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")
NORM_LAYERS = ("layernorm", "layernormbf16", "rmsnorm")
ROPE_DTYPES = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The vision trunk. Raises ValueError for values no network can be built from."""

    patch_size: int = 16  # pixels
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0  # hidden width = int(embed_dim * mlp_ratio); SwiGLU keeps 2/3 of it
    ffn_layer: str = "swiglu"  # mlp | swiglu[32|64|128]: the hidden width is a multiple of the number (8)
    norm_layer: str = "rmsnorm"  # layernorm (eps 1e-6) | layernormbf16 (eps 1e-5) | rmsnorm (eps 1e-5)
    init_values: float | None = None  # initial LayerScale; null or 0: no LayerScale
    use_qk_norm: bool = False
    feature_bottleneck: int | None = 64  # channels of the latents; null or embed_dim: no projection
    bottleneck_ae_only: bool = True  # CLIP and self-distillation read the features before the bottleneck
    clip_feat: str = "cls"  # cls | pooled (mean of the patch tokens)

    def __post_init__(self) -> None:
        _check_kinds(self, "vision_")
        channels = {} if self.feature_bottleneck is None else {"vision_feature_bottleneck": self.feature_bottleneck}
        _check_whole(vision_patch_size=self.patch_size, vision_depth=self.depth, **channels)
        _check_width("vision", self.embed_dim, self.num_heads, multiple=4)
        _check_ratio("vision", self.mlp_ratio, self.embed_dim)
        _check_name("vision_ffn_layer", self.ffn_layer, FFN_LAYERS)
        _check_name("vision_norm_layer", self.norm_layer, NORM_LAYERS)
        _check_name("vision_clip_feat", self.clip_feat, ("cls", "pooled"))

    @property
    def latent_dim(self) -> int:
        """Channels of the latents."""
        return self.embed_dim if self.feature_bottleneck is None else self.feature_bottleneck

    @property
    def clip_dim(self) -> int:
        """Width of the features which CLIP and self-distillation read."""
        return self.embed_dim if self.bottleneck_ae_only else self.latent_dim


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower; its width is also the width of the space shared with images."""

    context_length: int = 77  # tokens
    vocab_size: int = 49_408
    embed_dim: int = 768
    num_heads: int = 12
    depth: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None  # LayerScale, 0.0 included; null: none
    embed_cls: bool = False  # published key; true never worked there and is refused
    pad_id: int = 0  # published key; only used with embed_cls
    no_causal_mask: bool = False  # true: every token sees every token, padding included
    pool_type: str = "argmax"  # argmax (the end token has the largest id) | first | last | none (all tokens)
    proj_type: str | None = "linear"  # none: no projection; null and mlp mean linear, as published
    proj_bias: bool = False
    output_tokens: bool = False  # published key, without effect
    quick_gelu: bool = False  # x * sigmoid(1.702 x) instead of the exact GELU

    def __post_init__(self) -> None:
        _check_kinds(self, "text_")
        _check_whole(text_context_length=self.context_length, text_vocab_size=self.vocab_size, text_depth=self.depth)
        _check_width("text", self.embed_dim, self.num_heads, multiple=1)
        _check_ratio("text", self.mlp_ratio, self.embed_dim)
        _check_name("text_pool_type", self.pool_type, ("argmax", "first", "last", "none"))
        _check_name("text_proj_type", self.proj_type, ("linear", "none", "mlp", None))
        if self.embed_cls:
            raise ValueError("text_embed_cls=true is not supported: no published model has a text class token")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The pixel decoder; its patch is the trunk's, so that decoding undoes the trunk's reduction."""

    embed_dim: int = 768
    num_heads: int = 12
    depth: int = 12
    ffn_layer: str = "swiglu"
    norm_layer: str = "layernorm"
    init_values: float | None = None
    use_qk_norm: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self, "decoder_")
        _check_whole(decoder_depth=self.depth)
        _check_width("decoder", self.embed_dim, self.num_heads, multiple=4)
        _check_name("decoder_ffn_layer", self.ffn_layer, FFN_LAYERS)
        _check_name("decoder_norm_layer", self.norm_layer, NORM_LAYERS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole tokenizer."""

    image_size: int = 256  # pixels; recorded for the evaluations, no shape depends on it
    train_clip: bool = True  # false: no text tower, no projection to the shared space
    train_reconstruction: bool = True  # false: no pixel decoder
    vision: ViTConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    init_logit_scale: float | None = None  # null: ln(1 / 0.07)
    init_logit_bias: float | None = None  # a number creates logit_bias (SigLIP)
    nonscalar_logit_scale: bool = False  # true: shape [1] instead of []
    rope_dtype: str = "bf16"  # bf16: rotations as published | fp32: exact ones, for other weights than the official

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_whole(image_size=self.image_size)
        _check_name("rope_dtype", self.rope_dtype, ROPE_DTYPES)


def _check_kinds(config: Any, prefix: str = "") -> None:
    """Switches are booleans, and initial values numbers or null."""
    for each in fields(config):
        value, number = getattr(config, each.name), str(each.type) == "float | None"
        if each.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{prefix}{each.name}={value!r} must be true or false")
        if number and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{prefix}{each.name}={value!r} must be a number or null")


def _check_whole(**values: Any) -> None:
    for key, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}={value!r} must be a whole number of at least 1")


def _check_ratio(part: str, ratio: Any, embed_dim: int) -> None:
    if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"{part}_mlp_ratio={ratio!r} must be a number above 0")
    if embed_dim * ratio < 2:  # of which SwiGLU takes two thirds
        raise ValueError(f"{part}_mlp_ratio={ratio!r} of {part}_embed_dim={embed_dim} leaves no hidden unit")


def _check_width(part: str, embed_dim: Any, num_heads: Any, multiple: int) -> None:
    _check_whole(**{f"{part}_embed_dim": embed_dim, f"{part}_num_heads": num_heads})
    if embed_dim % (multiple * num_heads):
        factor = f"{multiple} * " if multiple > 1 else ""
        raise ValueError(
            f"{part}_embed_dim={embed_dim} is not a multiple of {factor}{part}_num_heads={num_heads}; "
            f"the next one is {-(-embed_dim // (multiple * num_heads)) * multiple * num_heads}"
        )


def _check_name(key: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}={value!r} is unknown; one of {', '.join(map(repr, known))}")
