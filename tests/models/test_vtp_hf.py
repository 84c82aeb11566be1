import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel

from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.models.dino_head import DINOHead
from vtp.models.ema import EMATeacher
from vtp.models.vtp_hf import VTPConfig, VTPModel, from_legacy_state

CASES = ("a_official_like", "b_rms_swiglu_qknorm_ls", "e_clip_pooled", "g_recon_only")
SMALL = ModelConfig(
    image_size=16,
    vision=ViTConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2, feature_bottleneck=8),
    text=TextConfig(context_length=8, vocab_size=50, embed_dim=24, num_heads=3, depth=2),
    decoder=DecoderConfig(embed_dim=48, num_heads=3, depth=2),
)


def small(**changes):
    config = VTPConfig.from_model_config(SMALL)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return VTPModel(config).eval()


def answers(model, given):
    """Everything the fixtures hold, from their inputs."""
    out = {}
    for key in [key for key in given if key.endswith("/image")]:
        name, image = key.removesuffix("/image"), given[key]
        for use_bottleneck in (True, False):
            for kind, value in model.get_last_layer_feature(image, use_bottleneck=use_bottleneck).items():
                out[f"{name}/last_layer/bottleneck_{use_bottleneck}/{kind}"] = value
        layers = model.get_intermediate_layers_feature(image, n=2, return_class_token=True)
        for i, (patches, cls) in enumerate(layers):
            out |= {f"{name}/intermediate_n2/{i}/patch": patches, f"{name}/intermediate_n2/{i}/cls": cls}
        (first,) = model.get_intermediate_layers_feature(image, n=[0], reshape=True, norm=False)
        out[f"{name}/intermediate_list0_reshape_nonorm/0"] = first
        ((patches, cls),) = model.get_intermediate_layers_feature(image, return_class_token=True, norm=False)
        out[f"{name}/x_prenorm"] = torch.cat([cls[:, None], patches], dim=1)
        out[f"{name}/latents"] = model.get_reconstruction_latents(image)
        out[f"{name}/decoded"] = model.get_latents_decoded_images(out[f"{name}/latents"])
        if f"{name}/mask" in given:
            masked = model.trunk(image, given[f"{name}/mask"])
            out |= {f"{name}/masked/cls_token": masked.cls, f"{name}/masked/patch_tokens": masked.patches}
        if model.config.train_clip:
            out[f"{name}/clip_image_norm"] = model.get_clip_image_feature(image)
            out[f"{name}/clip_image_raw"] = model.get_clip_image_feature(image, normalize=False)
            logits = model.get_clip_logits(image, given["text"])
            out |= {f"{name}/logits_image": logits[0], f"{name}/logits_text": logits[1]}
    if model.config.train_clip:
        out["clip_text_norm"] = model.get_clip_text_feature(given["text"])
        out["clip_text_raw"] = model.get_clip_text_feature(given["text"], normalize=False)
    return out


def assert_published(out, value, name=""):
    """Rotations in bf16 amplify the last bit of float32, which is another one on every processor: upstream itself, run
    on one without AVX-512, is up to 1.8e-2 and on average 1.2e-3 away from these values (and 0 from our model)."""
    error = (out - value).abs()
    assert error.max() < 3e-2 and error.mean() < 3e-3, name


@pytest.mark.parametrize("case", CASES)
def test_published_outputs(shared, case):
    folder = shared / "fixtures/vtp" / case
    given = load_file(folder / "io.safetensors")
    model = VTPModel.from_pretrained(folder)
    with torch.no_grad():
        out = answers(model, given)
    inputs = ("/image", "/mask", "/text")
    expected = {name: value for name, value in given.items() if not f"/{name}".endswith(inputs)}
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        assert_published(out[name], value, name)
        if name.startswith("clip_text"):
            torch.testing.assert_close(out[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_published_outputs_with_exact_rotations(shared, case):
    folder = shared / "fixtures/vtp" / case
    model = VTPModel.from_pretrained(folder, rope_dtype="fp32")
    with torch.no_grad():
        out = answers(model, load_file(folder / "io.safetensors"))
    for name, value in load_file(folder / "io_fp32rope.safetensors").items():
        # Of the largest value: the files' own distance from float64 is up to 7e-6 of that (4e-5).
        torch.testing.assert_close(out[name], value, atol=1e-5 * max(1.0, float(value.abs().max())), rtol=0, msg=name)


def test_official_sizes(shared):
    for name, count in json.loads((shared / "fixtures/param_counts.json").read_text()).items():
        with torch.device("meta"):
            model = VTPModel(VTPConfig(**count["config"]))
        assert sum(p.numel() for p in model.parameters()) == count["total"], name
        assert len(model.state_dict()) == count["state_dict_keys"], name
        for part in ("trunk", "pixel_decoder", "text_transformer", "visual_proj"):
            assert sum(p.numel() for p in getattr(model, part).parameters()) == count[part], (name, part)


def headers(path):
    with safe_open(path, "pt") as file:
        return {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("case", CASES)
def test_saved_files_are_the_published_ones(shared, case, tmp_path):
    folder = shared / "fixtures/vtp" / case
    model = VTPModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert headers(tmp_path / "model.safetensors") == headers(folder / "model.safetensors")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    ours.pop("transformers_version"), theirs.pop("transformers_version")
    assert ours == theirs
    again, state = VTPModel.from_pretrained(tmp_path), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.trunk.rope_embed.periods.dtype == torch.bfloat16


def test_round_trip(tmp_path):
    model = small(rope_dtype="fp32")
    model.float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_dtype"] == "fp32"
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, VTPModel) and not again.training
    assert AutoConfig.from_pretrained(tmp_path).model_config() == model.config.model_config()
    image, text = torch.randn(2, 3, 16, 16), torch.randint(50, (2, 8))
    for ours, theirs in zip(model.get_clip_logits(image, text), again.get_clip_logits(image, text), strict=True):
        assert torch.equal(ours, theirs)
    half = VTPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.get_reconstruction_latents(image.bfloat16()).dtype == torch.bfloat16


def test_weights_missing_from_a_file_are_drawn_and_the_others_kept(tmp_path):
    model = small(train_reconstruction=False)
    model.save_pretrained(tmp_path)
    whole = VTPModel.from_pretrained(tmp_path, train_reconstruction=True)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    decoder = dict(whole.pixel_decoder.named_parameters())
    assert (decoder["norm.weight"] == 1).all() and not decoder["proj_in.bias"].any()
    assert abs(decoder["blocks.0.attn.qkv.weight"].std() - 0.02) < 1e-3
    assert torch.equal(whole.pixel_decoder.rope_embed.periods, small().pixel_decoder.rope_embed.periods)


def test_initial_weights():
    model = small(text_embed_dim=96, text_num_heads=4)
    weights = dict(model.named_parameters())
    expected = {
        "text_transformer.resblocks.0.attn.in_proj_weight": 96**-0.5,
        "text_transformer.resblocks.1.attn.out_proj.weight": 96**-0.5 * 4**-0.5,
        "text_transformer.resblocks.1.mlp.c_proj.weight": 96**-0.5 * 4**-0.5,
        "text_transformer.resblocks.0.mlp.c_fc.weight": 192**-0.5,
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": 96**-0.5,
        "pixel_decoder.proj_in.weight": 0.02,
        "pixel_decoder.blocks.0.mlp.w1.weight": 0.02,
    }
    for name, std in expected.items():
        assert abs(weights[name].std() / std - 1) < 0.1, name
    assert model.logit_scale.item() == pytest.approx(2.65926)
    assert small(init_logit_scale=0.0, init_logit_bias=-10.0, nonscalar_logit_scale=True).logit_bias.tolist() == [-10.0]
    assert all(torch.equal(a, b) for a, b in zip(small().parameters(), small().parameters(), strict=True))


@pytest.mark.parametrize("patch", [4, 8])
def test_decoding_undoes_the_reduction(patch):
    model = small(vision_patch_size=patch)
    image = torch.randn(2, 3, 16, 24)
    out = model(image, forward_type="rec")
    assert out["latents"].shape == (2, 8, 16 // patch, 24 // patch)
    assert out["reconstructed_image"].shape == image.shape and out["target_image"] is image


def test_decoded_pixels_are_shuffled_as_published():
    model = small()
    model.pixel_decoder.norm = nn.Identity()
    latents = torch.randn(1, 8, 2, 3)
    seen = []
    model.pixel_decoder.proj_out.register_forward_hook(lambda _, __, out: seen.append(out))
    image = model.get_latents_decoded_images(latents)
    torch.testing.assert_close(image, nn.functional.pixel_shuffle(seen[0].mT.unflatten(2, (2, 3)), 4))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("train_clip", "no", "true or false"),
        ("vision_use_qk_norm", 1, "true or false"),
        ("text_ls_init_value", "x", "a number or null"),
        ("init_logit_bias", True, "a number or null"),
    ],
)
def test_values_of_another_kind_are_named(key, value, wanted, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # which objects first here
    with pytest.raises(ValueError, match=f"{key}={value!r} must be {wanted}"):
        VTPModel(VTPConfig(**{key: value}))


@pytest.mark.parametrize("pool", ["argmax", "first"])
def test_text_cut_after_its_end_has_the_same_feature(pool, monkeypatch):
    model = small(text_pool_type=pool)
    text = torch.tensor([[40, 5, 6, 49, 0, 0, 0, 0], [40, 9, 49, 0, 0, 0, 0, 0]])
    whole = model.get_clip_text_feature(text)
    for length in (4, 6):
        torch.testing.assert_close(model.get_clip_text_feature(text[:, :length]), whole)
    torch.testing.assert_close(model.train().get_clip_text_feature(text[:, :4]), whole)
    with pytest.raises(ValueError, match=r"text of shape \[1, 9\], torch.int64: give token ids .*, 1 to 8 tokens"):
        model.get_clip_text_feature(torch.zeros(1, 9, dtype=torch.long))
    for wrong, said in (("a dog", "type str"), (["a dog"], "type list"), (torch.zeros(1, 4), "shape .*torch.float32")):
        monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # which objects first here
        with pytest.raises(ValueError, match="token ids from 3 to 50: the model has 0 to 49"):
            model.get_clip_text_feature(torch.tensor([[3, 50]]))
        with pytest.raises(ValueError, match=f"text of {said}: give token ids"):
            model.get_clip_text_feature(wrong)


def test_every_text_setting():
    text = torch.tensor([[40, 5, 49, 0]])
    assert small(text_pool_type="none").get_clip_text_feature(text).shape == (1, 4, 24)
    assert small(text_proj_bias=True).text_projection.bias.shape == (24,)
    assert small(text_proj_type="none").text_projection is None
    assert small(text_proj_type=None).text_projection.shape == (24, 24)
    plain, quick = small(), small(text_quick_gelu=True)
    assert not torch.allclose(plain.get_clip_text_feature(text), quick.get_clip_text_feature(text), atol=1e-4)
    assert small(text_ls_init_value=0.0).text_transformer.resblocks[0].ls_1.gamma.eq(0).all()
    assert "trunk.blocks.0.ls1.gamma" not in small(vision_init_values=0.0).state_dict()


def test_published_entry():
    model = small(init_logit_bias=-10.0)
    image, text = torch.randn(2, 3, 16, 16), torch.randint(50, (3, 8))
    out = model(image, text)
    assert out["image_features"].shape == (2, 24) and out["text_features"].shape == (3, 24)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out["logit_bias"]
    torch.testing.assert_close(model.get_clip_logits(image, text), (logits, logits.T))
    assert model(image, forward_type="feature")["patch_tokens"].shape == (2, 16, 8)
    with pytest.raises(ValueError, match="forward_type='ssl' is unknown"):
        model(image, forward_type="ssl")
    with pytest.raises(RuntimeError, match="train_clip=false"):
        small(train_clip=False).get_clip_image_feature(image)
    with pytest.raises(RuntimeError, match="built with train_clip=false and has no such part"):
        small(train_clip=False).get_clip_logits(image, text)
    with pytest.raises(RuntimeError, match="train_reconstruction=false"):
        small(train_reconstruction=False)(image, forward_type="rec")


def test_published_attributes():
    model, blind = small(text_pool_type="last"), small(train_reconstruction=False)
    assert (model.context_length, model.vocab_size, model.text_pool_type) == (8, 50, "last")
    assert model.visual_proj.weight.shape == (24, 32) and blind.pixel_decoder is None
    deaf = small(train_clip=False)
    assert deaf.visual_proj is None and not hasattr(deaf, "context_length")
    assert not any(
        name.startswith(("visual_proj", "pixel_decoder"))
        for name in small(train_clip=False, train_reconstruction=False).state_dict()
    )


def test_one_pass_serves_clip_and_latents():
    model = small()
    image = torch.randn(2, 3, 8, 16)
    tokens = model.trunk(image)
    torch.testing.assert_close(model.latents(tokens), model.get_reconstruction_latents(image))
    torch.testing.assert_close(model.clip_image(tokens), model.get_clip_image_feature(image))
    pooled = small(vision_clip_feat="pooled", vision_bottleneck_ae_only=False)
    tokens = pooled.trunk(image)
    expected = pooled.visual_proj(pooled.trunk.bottleneck(tokens.patches).mean(dim=1))
    torch.testing.assert_close(pooled.clip_image(tokens, normalize=False), expected)


def test_gradients_reach_everything_under_autocast():
    model = small(init_logit_bias=-1.0).train()
    image, text = torch.randn(2, 3, 8, 8), torch.randint(50, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model.get_clip_logits(image, text)
        decoded = model(image, forward_type="rec")["reconstructed_image"]
        (logits.float().square().sum() + decoded.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def gradients(model, image, text, precision, drop_path):
    """Of a loss in which trunk, decoder and text tower take part; stochastic depth draws from a fixed seed."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        tokens = model.trunk(image, drop_path=drop_path)
        decoded = model.get_latents_decoded_images(model.latents(tokens))
        similarity = model.clip_image(tokens) @ model.get_clip_text_feature(text).T
        (decoded.float().square().mean() + similarity.float().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if name != "logit_scale"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(precision, drop_path, reentrant):
    model = small().train()
    inputs = torch.randn(4, 3, 16, 16), torch.randint(50, (3, 8)), precision, drop_path
    expected = gradients(model, *inputs)
    calls = dict.fromkeys(("trunk", "pixel_decoder", "text_transformer"), 0)

    def count(part):
        def hook(*_):
            calls[part] += 1

        return hook

    for part in calls:
        blocks = getattr(model, part).resblocks if part == "text_transformer" else getattr(model, part).blocks
        for block in blocks:
            block.attn.register_forward_pre_hook(count(part))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    actual = gradients(model, *inputs)
    assert calls == dict.fromkeys(calls, 4)  # two blocks, each once more in the backward pass
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # the first pass of the reentrant kind asks for no gradient, so it takes the other kernels
        tolerance = {"fp32": 1e-5, "bf16": 5e-2}[precision] if reentrant else 1e-6
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name
    model.eval()
    gradients(model, *inputs)
    model.train().gradient_checkpointing_disable()
    gradients(model, *inputs)
    assert calls == dict.fromkeys(calls, 8) and not model.is_gradient_checkpointing


def test_every_second_block_may_be_recomputed():
    model = small()
    model._set_gradient_checkpointing(every_n_layers=2)
    assert [block.gradient_checkpointing for block in model.trunk.blocks] == [True, False]
    assert [block.gradient_checkpointing for block in model.text_transformer.resblocks] == [True, False]


def test_latents_are_the_same_twice_and_for_each_batch_size():
    model = small(rope_dtype="fp32")
    image = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        together = model.get_reconstruction_latents(image)
        alone = torch.cat([model.get_reconstruction_latents(one[None]) for one in image])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_training_class_weights(shared):
    """The published training class: names, self-distillation outputs of teacher and student, and the teacher's step."""
    folder = shared / "fixtures/train"
    config = VTPConfig.from_vtp_yaml(folder / "legacy_ae_only_config.yaml")
    state, io = (
        load_file(folder / "legacy_ae_only_model.safetensors"),
        load_file(folder / "legacy_ae_only_io.safetensors"),
    )
    model = VTPModel(config).eval()
    model.load_state_dict(from_legacy_state(state))
    head = DINOHead(64, 96, hidden_dim=80, bottleneck_dim=24).eval()
    student = nn.ModuleDict({"trunk": model.trunk, "proj": model.visual_proj, "dino_head": head})
    head.load_state_dict({k.removeprefix("dino_head."): v for k, v in state.items() if k.startswith("dino_head.")})
    teacher = EMATeacher(student)
    teacher.load_state_dict({k.removeprefix("teacher_"): v for k, v in state.items() if k.startswith("teacher_")})

    def close(name, value):
        assert_published(value, io[name], name)

    with torch.no_grad():
        out = model(io["image"], io["text"])
        for name in ("image_features", "text_features", "logit_scale"):
            close(f"clip/{name}", out[name])
        close("rec/reconstructed_image", model(io["image"], forward_type="rec")["reconstructed_image"])
        tokens = teacher["trunk"](io["global_crops"])
        swapped = torch.cat(tokens.cls.chunk(2)[::-1])  # upstream pairs a teacher's row with the other crop's student
        close("teacher/teacher_cls_tokens_after_head", teacher["dino_head"](swapped))
        masked = tokens.patches.flatten(0, 1)[io["mask_indices"]]
        close("teacher/masked_teacher_patch_tokens_after_head", teacher["dino_head"](masked))
        tokens = model.trunk(io["global_crops"], io["masks"])
        close("student/student_global_cls_tokens", tokens.cls)
        close("student/student_global_cls_tokens_after_head", head(tokens.cls))
        masked = tokens.patches.flatten(0, 1)[io["mask_indices"]]
        close("student/student_global_masked_patch_tokens_after_head", head(masked))
        close("student/student_local_cls_tokens_after_head", head(model.trunk(io["local_crops"]).cls))
    teacher.follow(student, momentum=0.9)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, io[f"ema/teacher_{name}"])


def test_configuration_files(tmp_path):
    assert VTPConfig().model_config() == ModelConfig()
    assert VTPConfig.from_model_config(SMALL).model_config() == SMALL
    assert "rope_dtype" not in VTPConfig().to_dict()
    (tmp_path / "bad.yaml").write_text("data: {image_size: 64}\ntraining: {train_clip: true}\n")
    with pytest.raises(ValueError, match="bad.yaml: 'train_reconstruction' is missing"):
        VTPConfig.from_vtp_yaml(tmp_path / "bad.yaml")
