"""Every key and value of the published configuration: names, shapes, files, and the numbers of a plain reference."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vtp.models.vtp_hf import DEFAULTS, VTPConfig, VTPModel

BASE = {
    "image_size": 16,
    "vision_patch_size": 4,
    "vision_embed_dim": 32,
    "vision_depth": 2,
    "vision_num_heads": 2,
    "vision_feature_bottleneck": 8,
    "text_context_length": 8,
    "text_vocab_size": 50,
    "text_embed_dim": 24,
    "text_num_heads": 3,
    "text_depth": 2,
    "decoder_embed_dim": 48,
    "decoder_num_heads": 3,
    "decoder_depth": 2,
}
FFN = ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")
NORMS = ("layernorm", "layernormbf16", "rmsnorm")
VALUES = {
    "image_size": (48,),
    "train_clip": (False,),
    "train_reconstruction": (False,),
    "vision_patch_size": (2, 8, 16),
    "vision_embed_dim": (64,),
    "vision_depth": (1, 3),
    "vision_num_heads": (1, 4),
    "vision_mlp_ratio": (4, 2, 2.7),
    "vision_ffn_layer": FFN,
    "vision_norm_layer": NORMS,
    "vision_init_values": (None, 0, 0.0, 1e-5, 1),
    "vision_use_qk_norm": (True,),
    "vision_feature_bottleneck": (None, 32, 1, 40),
    "vision_bottleneck_ae_only": (False,),
    "vision_clip_feat": ("cls", "pooled"),
    "text_context_length": (9,),
    "text_vocab_size": (61,),
    "text_embed_dim": (36,),
    "text_num_heads": (1, 4),
    "text_depth": (1,),
    "text_mlp_ratio": (2, 2.6),
    "text_ls_init_value": (None, 0.0, 0.1),
    "text_embed_cls": (False,),
    "text_pad_id": (3,),
    "text_no_causal_mask": (True,),
    "text_pool_type": ("first", "last", "argmax", "none"),
    "text_proj_type": ("linear", "none", "mlp", None),
    "text_proj_bias": (True,),
    "text_output_tokens": (True,),
    "text_quick_gelu": (True,),
    "decoder_embed_dim": (96,),
    "decoder_num_heads": (1, 4),
    "decoder_depth": (1,),
    "decoder_ffn_layer": FFN,
    "decoder_norm_layer": NORMS,
    "decoder_init_values": (None, 0, 0.1),
    "decoder_use_qk_norm": (True,),
    "init_logit_scale": (0.0, 0, 1.5),
    "init_logit_bias": (0.0, -10.0),
    "nonscalar_logit_scale": (True,),
}
SINGLE = [{key: value} for key, values in VALUES.items() for value in values]
COMBINED = [
    {"vision_feature_bottleneck": None, "vision_bottleneck_ae_only": False, "vision_clip_feat": "pooled"},
    {"vision_bottleneck_ae_only": False, "vision_clip_feat": "pooled", "vision_patch_size": 8},
    {"text_pool_type": "last", "text_no_causal_mask": True, "text_quick_gelu": True, "text_ls_init_value": 0.2},
    {"text_proj_type": "none", "text_proj_bias": True, "text_pool_type": "none"},
    {"nonscalar_logit_scale": True, "init_logit_bias": -10.0, "init_logit_scale": 0.0},
    {"train_clip": False, "train_reconstruction": False, "init_logit_bias": -10.0},
    {
        "vision_use_qk_norm": True,
        "vision_init_values": 0.1,
        "vision_norm_layer": "layernorm",
        "vision_ffn_layer": "mlp",
    },
    {"decoder_norm_layer": "rmsnorm", "decoder_use_qk_norm": True, "decoder_init_values": 1.0, "vision_num_heads": 4},
]


def test_every_key_has_its_values():
    assert set(VALUES) == set(DEFAULTS) - {"rope_dtype"}


def build(changes, **ours):
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(**BASE, **ours) if not changes else VTPConfig(**{**BASE, **changes}, **ours)).eval()
    with torch.no_grad():  # norms that are not 1, biases and a mask token that are not 0
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def swiglu_width(dim, ratio, layer):
    align = int(layer[6:] or 8)
    width = int(int(dim * ratio) * 2 / 3)
    return width + -width % align


def block_shapes(prefix, dim, head_dim, ratio, ffn, norm, scale, qk_norm):
    shapes = {f"{prefix}.{name}.weight": (dim,) for name in ("norm1", "norm2")}
    if norm != "rmsnorm":
        shapes |= {f"{prefix}.{name}.bias": (dim,) for name in ("norm1", "norm2")}
    linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    if ffn == "mlp":
        linears |= {"mlp.fc1": (int(dim * ratio), dim), "mlp.fc2": (dim, int(dim * ratio))}
    else:
        hidden = swiglu_width(dim, ratio, ffn)
        linears |= {"mlp.w1": (hidden, dim), "mlp.w2": (hidden, dim), "mlp.w3": (dim, hidden)}
    for name, shape in linears.items():
        shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    if qk_norm:
        shapes |= {f"{prefix}.attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    if scale:
        shapes |= {f"{prefix}.{name}.gamma": (dim,) for name in ("ls1", "ls2")}
    return shapes


def tower_shapes(part, prefix, c, ratio):
    """Blocks, positions and final norm of the trunk or the decoder; c is the configuration without the part's name."""
    dim, head_dim = c["embed_dim"], c["embed_dim"] // c["num_heads"]
    shapes = {f"{prefix}.rope_embed.periods": (head_dim // 4,), f"{prefix}.norm.weight": (dim,)}
    if c["norm_layer"] != "rmsnorm":
        shapes[f"{prefix}.norm.bias"] = (dim,)
    for i in range(c["depth"]):
        layers = (c["ffn_layer"], c["norm_layer"], c["init_values"], c["use_qk_norm"])
        shapes |= block_shapes(f"{prefix}.blocks.{i}", dim, head_dim, ratio, *layers)
    return shapes


def of(config, part):
    return {key.removeprefix(f"{part}_"): value for key, value in config.items() if key.startswith(f"{part}_")}


def published_shapes(c):
    vision, text, decoder = (of(c, part) for part in ("vision", "text", "decoder"))
    dim, p, width = vision["embed_dim"], vision["patch_size"], text["embed_dim"]
    latent = dim if vision["feature_bottleneck"] is None else vision["feature_bottleneck"]
    shapes = tower_shapes("vision", "trunk", vision, vision["mlp_ratio"])
    shapes |= {"trunk.cls_token": (1, 1, dim), "trunk.mask_token": (1, dim)}
    shapes |= {"trunk.patch_embed.proj.weight": (dim, 3, p, p), "trunk.patch_embed.proj.bias": (dim,)}
    if latent != dim:
        shapes["trunk.feature_bottleneck.weight"] = (latent, dim)
    if c["train_reconstruction"]:
        wide = decoder["embed_dim"]
        shapes |= tower_shapes("decoder", "pixel_decoder", decoder, 4.0)
        shapes |= {"pixel_decoder.proj_in.weight": (wide, latent, 1, 1), "pixel_decoder.proj_in.bias": (wide,)}
        shapes |= {
            "pixel_decoder.proj_out.weight": (3 * p * p, wide, 1, 1),
            "pixel_decoder.proj_out.bias": (3 * p * p,),
        }
    if not c["train_clip"]:
        return shapes
    shapes["visual_proj.weight"] = (width, dim if vision["bottleneck_ae_only"] else latent)
    shapes |= {"token_embedding.weight": (text["vocab_size"], width)}
    shapes |= {"positional_embedding": (text["context_length"], width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,)}
    if text["proj_type"] != "none" and text["proj_bias"]:
        shapes |= {"text_projection.weight": (width, width), "text_projection.bias": (width,)}
    elif text["proj_type"] != "none":
        shapes["text_projection"] = (width, width)
    scalar = (1,) if c["nonscalar_logit_scale"] else ()
    shapes["logit_scale"] = scalar
    if c["init_logit_bias"] is not None:
        shapes["logit_bias"] = scalar
    hidden = int(width * text["mlp_ratio"])
    for i in range(text["depth"]):
        block = f"text_transformer.resblocks.{i}"
        shapes |= {f"{block}.{ln}.{kind}": (width,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        linears = {"attn.out_proj": (width, width), "mlp.c_fc": (hidden, width), "mlp.c_proj": (width, hidden)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        if text["ls_init_value"] is not None:
            shapes |= {f"{block}.{ls}.gamma": (width,) for ls in ("ls_1", "ls_2")}
    return shapes


class Reference:
    """The published network in float64, written out: state dict and configuration in, numbers out."""

    def __init__(self, model):
        self.state = {name: value.double() for name, value in model.state_dict().items()}
        self.config = {key: getattr(model.config, key) for key in DEFAULTS}

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state.get(f"{name}.bias"))

    def norm(self, x, name, kind):
        weight = self.state[f"{name}.weight"]
        if kind == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        eps = {"layernorm": 1e-6, "layernormbf16": 1e-5}[kind]
        return F.layer_norm(x, x.shape[-1:], weight, self.state[f"{name}.bias"], eps)

    def rotate(self, x, grid):
        """The last rows * columns tokens, by angles 2 pi c / period of both coordinates."""
        width = x.shape[-1]
        rows, columns = ((torch.arange(n, dtype=torch.double) + 0.5) / n * 2 - 1 for n in grid)
        coords = torch.stack([rows[:, None].expand(grid), columns[None].expand(grid)], -1).flatten(0, 1)  # [n, 2]
        periods = 100 ** (torch.arange(width // 4, dtype=torch.double) / (width // 4))
        angles = (2 * torch.pi * coords[:, :, None] / periods).flatten(1).repeat(1, 2)
        prefix, x = x.split([x.shape[-2] - len(coords), len(coords)], dim=-2)
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return torch.cat([prefix, x * angles.cos() + half * angles.sin()], dim=-2)

    def attend(self, q, k, v, mask=0.0):
        return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v

    def block(self, x, name, c, grid):
        heads = c["num_heads"]
        y = self.linear(self.norm(x, f"{name}.norm1", c["norm_layer"]), f"{name}.attn.qkv")
        q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if c["use_qk_norm"]:
            q, k = self.norm(q, f"{name}.attn.q_norm", "rmsnorm"), self.norm(k, f"{name}.attn.k_norm", "rmsnorm")
        y = self.attend(self.rotate(q, grid), self.rotate(k, grid), v).transpose(1, 2).flatten(2)
        x = x + self.linear(y, f"{name}.attn.proj") * self.state.get(f"{name}.ls1.gamma", 1)
        y = self.norm(x, f"{name}.norm2", c["norm_layer"])
        if c["ffn_layer"] == "mlp":
            y = self.linear(F.gelu(self.linear(y, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        else:
            gate = F.silu(self.linear(y, f"{name}.mlp.w1"))
            y = self.linear(gate * self.linear(y, f"{name}.mlp.w2"), f"{name}.mlp.w3")
        return x + y * self.state.get(f"{name}.ls2.gamma", 1)

    def tower(self, x, name, c, grid):
        for i in range(c["depth"]):
            x = self.block(x, f"{name}.blocks.{i}", c, grid)
        return self.norm(x, f"{name}.norm", c["norm_layer"])

    def bottleneck(self, x):
        has = "trunk.feature_bottleneck.weight" in self.state
        return self.linear(x, "trunk.feature_bottleneck") if has else x

    def trunk(self, image):
        c, weight = of(self.config, "vision"), self.state["trunk.patch_embed.proj.weight"]
        x = F.conv2d(image.double(), weight, self.state["trunk.patch_embed.proj.bias"], stride=c["patch_size"])
        grid = tuple(x.shape[2:])
        x = torch.cat([self.state["trunk.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
        return self.tower(x, "trunk", c, grid), grid

    def latents(self, image):
        x, grid = self.trunk(image)
        return self.bottleneck(x[:, 1:]).mT.unflatten(2, grid)

    def decode(self, latents):
        grid, p = tuple(latents.shape[2:]), self.config["vision_patch_size"]
        x = self.linear(latents.flatten(2).mT, "pixel_decoder.proj_in")
        x = self.tower(x, "pixel_decoder", of(self.config, "decoder"), grid)
        return F.pixel_shuffle(self.linear(x, "pixel_decoder.proj_out").mT.unflatten(2, grid), p)

    def clip_image(self, image):
        x, _ = self.trunk(image)
        x = x[:, 0] if self.config["vision_clip_feat"] == "cls" else x[:, 1:].mean(1)
        x = x if self.config["vision_bottleneck_ae_only"] else self.bottleneck(x)
        return F.normalize(self.linear(x, "visual_proj"), dim=-1)

    def clip_text(self, text):
        c = of(self.config, "text")
        length = text.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=torch.double).triu(1)
        mask = torch.zeros(()) if c["no_causal_mask"] else mask
        x = self.state["token_embedding.weight"][text] + self.state["positional_embedding"][:length]
        for i in range(c["depth"]):
            name = f"text_transformer.resblocks.{i}"
            y = self.norm(x, f"{name}.ln_1", "layernormbf16")
            y = F.linear(y, self.state[f"{name}.attn.in_proj_weight"], self.state[f"{name}.attn.in_proj_bias"])
            q, k, v = (part.unflatten(-1, (c["num_heads"], -1)).transpose(1, 2) for part in y.chunk(3, dim=-1))
            y = self.linear(self.attend(q, k, v, mask).transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
            x = x + y * self.state.get(f"{name}.ls_1.gamma", 1)
            y = self.linear(self.norm(x, f"{name}.ln_2", "layernormbf16"), f"{name}.mlp.c_fc")
            y = y * (1.702 * y).sigmoid() if c["quick_gelu"] else F.gelu(y)
            x = x + self.linear(y, f"{name}.mlp.c_proj") * self.state.get(f"{name}.ls_2.gamma", 1)
        x = self.norm(x, "ln_final", "layernormbf16")
        at = {"first": 0, "last": length - 1, "argmax": text.argmax(1), "none": slice(None)}[c["pool_type"]]
        x = x[torch.arange(len(x)), at] if c["pool_type"] != "none" else x
        if "text_projection" in self.state:
            x = x @ self.state["text_projection"]
        elif "text_projection.weight" in self.state:
            x = self.linear(x, "text_projection")
        return F.normalize(x, dim=-1)


@pytest.mark.parametrize("changes", [{}, *SINGLE, *COMBINED], ids=lambda changes: ",".join(map(str, changes.items())))
def test_names_shapes_files_and_numbers(changes, tmp_path):
    model = build(changes, rope_dtype="fp32")
    config = {key: getattr(model.config, key) for key in DEFAULTS}
    assert {key: config[key] for key in changes} == changes
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_shapes(config)

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in DEFAULTS} == config
    loaded, info = VTPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
        assert value.dtype == (torch.bfloat16 if name.endswith("periods") else torch.float32), name

    reference = Reference(model)
    image, text = torch.randn(2, 3, 16, 32), torch.randint(1, 50, (3, config["text_context_length"]))
    exact = {"atol": 1e-5, "rtol": 1e-4}

    def close(actual, expected):
        torch.testing.assert_close(actual.double(), expected, **exact)

    with torch.no_grad():
        tokens, _ = reference.trunk(image)
        features = loaded.get_last_layer_feature(image)
        close(features["cls_token"], tokens[:, 0])
        close(features["patch_tokens"], tokens[:, 1:])
        latents = loaded.get_reconstruction_latents(image)
        close(latents, reference.latents(image))
        if config["train_reconstruction"]:
            decoded = loaded.get_latents_decoded_images(latents)
            assert decoded.shape == image.shape
            close(decoded, reference.decode(reference.latents(image)))
        if config["train_clip"]:
            images, texts = reference.clip_image(image), reference.clip_text(text)
            close(loaded.get_clip_image_feature(image), images)
            close(loaded.get_clip_text_feature(text), texts)
            close(loaded.get_clip_text_feature(text[:, :1]), reference.clip_text(text[:, :1]))
            if config["text_pool_type"] != "none":
                logits, transposed = loaded.get_clip_logits(image, text)
                expected = reference.state["logit_scale"].exp() * images @ texts.T + reference.state.get(
                    "logit_bias", 0
                )
                close(logits, expected)
                assert torch.equal(transposed, logits.T)


@pytest.mark.parametrize("value", [0.0, 0, 1.5, None])
def test_first_logit_scale(value):
    """0.0 is a value like others, not "none given"."""
    model = VTPModel(VTPConfig(**BASE, init_logit_scale=value))
    assert model.logit_scale.item() == pytest.approx(2.65926003 if value is None else value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_embed_cls", True),
        ("vision_clip_feat", "mean"),
        ("vision_ffn_layer", "swiglu16"),
        ("vision_norm_layer", "batchnorm"),
        ("decoder_ffn_layer", "geglu"),
        ("decoder_norm_layer", "none"),
        ("text_pool_type", "mean"),
        ("text_proj_type", "conv"),
        ("vision_embed_dim", 36),
        ("decoder_num_heads", 5),
        ("text_num_heads", 5),
        *(
            (f"{part}_{size}", 0)
            for part in ("vision", "text", "decoder")
            for size in ("embed_dim", "num_heads", "depth")
        ),
        ("vision_patch_size", 0),
        *(("vision_feature_bottleneck", value) for value in (0, -4)),
        *((f"{part}_mlp_ratio", value) for part in ("vision", "text") for value in (-1, 0.04)),
        *((f"text_{size}", 0) for size in ("context_length", "vocab_size")),
        ("image_size", 0),
    ],
)
def test_values_that_no_network_can_be_built_from(key, value):
    with pytest.raises(ValueError, match=key):
        VTPModel(VTPConfig(**{**BASE, key: value}))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("ViTConfig", "patch_size", "16"),
        ("ViTConfig", "depth", 12.5),
        ("TextConfig", "mlp_ratio", "4"),
        ("ModelConfig", "image_size", [256, 256]),
    ],
)
def test_values_of_another_type(part, key, value):
    """In a process of its own: where tests run, values are checked against their annotations already."""
    program = f"from vtp.models.config import {part}; {part}({key}={value!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.search(rf"ValueError: \w*{key}={re.escape(repr(value))} must be a", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("n", [[-1], [0, -2], [2], 3, 0, -1, []])
def test_layers_that_are_not_there(n):
    with pytest.raises(ValueError, match=r"not among 0 \.\.\. 1"):
        build({}).get_intermediate_layers_feature(torch.randn(1, 3, 8, 8), n=n)


def test_layers_come_in_the_order_of_the_blocks():
    model, image = build({}), torch.randn(1, 3, 8, 8)
    for ours, theirs in zip(
        model.get_intermediate_layers_feature(image, n=[1, 0]),
        model.get_intermediate_layers_feature(image, n=2),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [8, 5])
def test_a_loaded_text_tower_is_causal(length, tmp_path):
    """The mask is in no file: after a load, no token may see a later one."""
    build({"text_pool_type": "none"}).save_pretrained(tmp_path)
    model = VTPModel.from_pretrained(tmp_path)
    text = torch.randint(50, (2, length))
    other = text.clone()
    other[:, 3:] = (other[:, 3:] + 7) % 50
    ours, theirs = model.get_clip_text_feature(text), model.get_clip_text_feature(other)
    torch.testing.assert_close(ours[:, :3], theirs[:, :3])
    assert not torch.allclose(ours[:, 3:], theirs[:, 3:], atol=1e-3)


def test_dtypes_under_autocast():
    """As published: features of the residual stream are float32, what comes out of a linear layer is bfloat16."""
    model, image, text = build({}), torch.randn(1, 3, 8, 8), torch.randint(50, (2, 8))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.get_reconstruction_latents(image)
        assert latents.dtype == torch.bfloat16
        assert model.get_latents_decoded_images(latents).dtype == torch.bfloat16
        assert {x.dtype for x in model.get_last_layer_feature(image).values()} == {torch.float32}
        for normalize in (True, False):
            assert model.get_clip_image_feature(image, normalize).dtype == torch.bfloat16
            assert model.get_clip_text_feature(text, normalize).dtype == torch.bfloat16


def test_one_yaml_builds_twice(shared):
    path = shared / "fixtures/train/legacy_ae_only_config.yaml"
    first, second = VTPConfig.from_vtp_yaml(path), VTPConfig.from_vtp_yaml(path)
    assert first.to_dict() == second.to_dict()
    assert first.vision_feature_bottleneck == 16 and first.text_num_heads == 3 and first.text_depth == 2
    for _ in range(2):
        assert VTPModel(first).state_dict().keys() == VTPModel(second).state_dict().keys()


def test_yaml_keys_that_may_be_left_out_or_given(shared, tmp_path):
    text = (shared / "fixtures/train/legacy_ae_only_config.yaml").read_text()
    optional = ("init_values: null", "ls_init_value: null", "init_logit_scale: null", "init_logit_bias: null")
    bare = text
    for line in (*optional, "nonscalar_logit_scale: false"):
        assert f"{line}\n" in bare
        bare = bare.replace(f"{line}\n", "\n")
    (tmp_path / "bare.yaml").write_text(bare)
    config = VTPConfig.from_vtp_yaml(tmp_path / "bare.yaml")
    assert (config.vision_init_values, config.text_ls_init_value, config.init_logit_bias) == (None, None, None)
    assert not config.nonscalar_logit_scale and not config.vision_use_qk_norm and config.decoder_init_values is None
    given = bare.replace(
        "ffn_layer: swiglu\n    norm_layer", "layerscale_init: 0.3\n    ffn_layer: mlp\n    norm_layer"
    )
    given = given.replace("clip_feat: cls", "clip_feat: pooled\n    use_qk_norm: true")
    (tmp_path / "given.yaml").write_text(given.replace("training:", "training:\n  init_logit_bias: -10"))
    config = VTPConfig.from_vtp_yaml(tmp_path / "given.yaml")
    assert (config.decoder_init_values, config.decoder_ffn_layer, config.vision_ffn_layer) == (0.3, "mlp", "swiglu")
    assert config.vision_use_qk_norm and config.vision_clip_feat == "pooled" and config.init_logit_bias == -10


def test_mask_token_does_not_reach_an_unmasked_image():
    """Published code adds 0 * mask_token, through which a NaN would pass; here only in training, for its gradient."""
    model, image = build({}), torch.randn(1, 3, 8, 8)
    expected = model.get_reconstruction_latents(image)
    model.trunk.mask_token.data.fill_(torch.nan)
    assert torch.equal(model.get_reconstruction_latents(image), expected)
