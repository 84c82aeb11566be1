"""`vtp convert`: the folder holds the checkpoint's network, and every mistake is named."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from tests.models.test_vtp_hf import assert_published
from vtp.cli import main
from vtp.config import ConfigError
from vtp.models.legacy import convert
from vtp.models.vtp_hf import VTPConfig, VTPModel, from_legacy_state, legacy_name


@pytest.fixture
def config(shared):
    return shared / "fixtures/train/legacy_ae_only_config.yaml"


@pytest.fixture
def source(shared):
    return shared / "fixtures/train/legacy_ae_only_model.safetensors"


@pytest.fixture
def state(source):
    return load_file(source)


def test_student(source, config, shared, tmp_path, capsys):
    main(["convert", str(source), "--config", str(config), "--out", str(tmp_path / "out")])
    assert re.match(r"published .*out: student, [\d,]+ parameters", capsys.readouterr().out)
    model = VTPModel.from_pretrained(tmp_path / "out")
    given = load_file(shared / "fixtures/train/legacy_ae_only_io.safetensors")
    with torch.no_grad():
        out = model(given["image"], given["text"])
        decoded = model(given["image"], forward_type="rec")["reconstructed_image"]
    assert_published(out["image_features"], given["clip/image_features"])
    torch.testing.assert_close(out["text_features"], given["clip/text_features"], atol=1e-5, rtol=1e-5)
    assert_published(decoded, given["rec/reconstructed_image"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"height": 64, "width": 64}


def test_teacher(state, config, tmp_path):
    state = {name: t + 1 if name.startswith("teacher_") and "periods" not in name else t for name, t in state.items()}
    wrapped = {f"module._orig_mod.{name.replace('blocks.0.', 'blocks.0._orig_mod.')}": t for name, t in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "run.pt")
    main(["convert", str(tmp_path / "run.pt"), "--config", str(config), "--out", str(tmp_path), "--weights", "teacher"])
    for name, value in VTPModel.from_pretrained(tmp_path).state_dict().items():
        averaged = name.startswith(("trunk.", "visual_proj."))
        assert legacy_name(name, "teacher").startswith("teacher_") == averaged
        assert torch.equal(value, state[legacy_name(name, "teacher")]), name


def test_names_there_and_back(state, config):
    for weights in ("student", "teacher"):
        converted = from_legacy_state(state, weights)
        assert converted.keys() == VTPModel(VTPConfig.from_vtp_yaml(config)).state_dict().keys()
        assert all(torch.equal(value, state[legacy_name(name, weights)]) for name, value in converted.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["proj.weight"][0].fill_(float("nan")), "'proj.weight' holds NaN or infinities; take an earlier"),
        (lambda s: s.pop("proj.weight"), r"'proj.weight' is missing, which the network of .*\.yaml has"),
        (lambda s: s.update(extra=torch.ones(1)), "'extra' is no part of the network of"),
        (
            lambda s: s.update({"ln_final.bias": torch.ones(3)}),
            r"'ln_final.bias' is \[3\], in the network of .* \[48\]",
        ),
        (lambda s: s["trunk.rope_embed.periods"].mul_(2), "'trunk.rope_embed.periods' is not what the published"),
        (lambda s: s.update(args={"lr": 0.1}), "'args' is a dict, not a tensor; save the state_dict alone"),
    ],
)
def test_checkpoints_of_another_network(state, config, tmp_path, change, message):
    change(state)
    torch.save(state, tmp_path / "run.pth")
    with pytest.raises(ConfigError, match=f"run.pth: {message}"):
        convert(tmp_path / "run.pth", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoint(state, config, source, tmp_path, capsys):
    def wrong(*words):
        with pytest.raises(SystemExit) as end:
            main(["convert", *map(str, words), "--out", str(tmp_path / "out")])
        assert end.value.code == 2 and not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    torch.save({"model": state, "cfg": config}, tmp_path / "code.pt")  # a path is an object of a class, not a tensor
    said = wrong(tmp_path / "code.pt", "--config", config)
    assert "code.pt cannot be read as tensors" in said and "\x1b" not in said
    (tmp_path / "torn.safetensors").write_bytes(source.read_bytes()[:100])
    assert "torn.safetensors cannot be read" in wrong(tmp_path / "torn.safetensors", "--config", config)
    assert "no checkpoint file at" in wrong(tmp_path / "none.pt", "--config", config)
    assert "a checkpoint ends in .safetensors" in wrong(config, "--config", config)
    torch.save([1], tmp_path / "list.pt")
    assert "list.pt holds no state_dict" in wrong(tmp_path / "list.pt", "--config", config)
    save_file({k: v for k, v in state.items() if not k.startswith("teacher_")}, tmp_path / "student.safetensors")
    assert "there is no teacher in it" in wrong(
        tmp_path / "student.safetensors", "--config", config, "--weights", "teacher"
    )
    assert "no configuration file at" in wrong(source, "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_output_at_or_below_a_file_is_one_line(config, source, tmp_path, capsys, out):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as end:
        main(["convert", str(source), "--config", str(config), "--out", str(tmp_path / out)])
    assert end.value.code == 2 and f"vtp: {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    ffn_layer: swiglu\n    norm_type",
            "    norm_type",
            "'ffn_layer' is missing in data, training or vtp_model",
        ),
        ("norm_type: rmsnorm", "norm_type: groupnorm", "vision_norm_layer='groupnorm' is unknown"),
        ("embed_cls: false", "embed_cls: true", "text_embed_cls=true is not supported"),
        ("norm_kwargs: null", "norm_kwargs: {eps: 1}", r"vtp_model.text_encoder.norm_kwargs={'eps': 1} is unknown"),
        ("  pixel_decoder:", "  pixel_decoder:\n    upscale_factor: 8", "vtp_model.pixel_decoder.upscale_factor=8"),
        ("data:", "data: [", "while parsing"),
    ],
)
def test_configurations_of_another_network(source, config, tmp_path, old, new, message):
    text = config.read_text()
    assert old in text
    (tmp_path / "run.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"run.yaml: {message}"):
        convert(source, tmp_path / "run.yaml", tmp_path / "out")


def test_a_tokenizer_is_not_overwritten(source, config, tmp_path):
    convert(source, config, tmp_path)
    with pytest.raises(ConfigError, match="already holds a tokenizer"):
        convert(source, config, tmp_path)


def test_the_published_upscale_factor_is_the_patch_size(source, config, tmp_path):
    text = config.read_text().replace("  pixel_decoder:", "  pixel_decoder:\n    upscale_factor: 16")
    (tmp_path / "run.yaml").write_text(text)
    assert convert(source, tmp_path / "run.yaml", tmp_path / "out").pixel_decoder.patch_size == 16
