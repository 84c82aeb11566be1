"""Cards and what they are made of: nothing invented, nothing about other weights, code that runs, one upload."""

import json
import os
import re
import stat
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.test_vtp_hf import small
from vtp.cli import main
from vtp.config import ConfigError
from vtp.evaluation.codecs import open_codec
from vtp.evaluation.results import write_result
from vtp.files import file_sha256
from vtp.models.diffusers_vae import AutoencoderVTP
from vtp.models.latent_stats import ChannelStats, write_stats
from vtp.models.published import add_evidence, open_tokenizer, published_stats, write_card
from vtp.models.vtp_hf import VTPConfig, VTPModel
from vtp.models.vtp_hf_processing import VTPImageProcessor

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def front_matter(card):
    _, head, _ = card.read_text().split("---\n", 2)
    return yaml.safe_load(head)


@pytest.fixture
def run(tmp_path):
    """A run folder: a tokenizer, two results about it and one about another, and statistics of its latents."""
    run = tmp_path / "run"
    small().save_pretrained(run / "tokenizer")
    weights = run / "tokenizer/model.safetensors"
    write_result(
        run / "eval/zero-shot.json",
        task="zero-shot",
        metrics={"top1": 0.71856, "chance": 0.125},
        protocol={"data": "/home/somebody/photos", "templates": "80 of CLIP (openai)", "size": 16},
        weights=weights,
        data_sha256="d" * 64,
        seed=3,
    )
    drawn = {"cfg_scale": 3.0, "tokenizer_sha256": file_sha256(weights), "classes": {"ring": 0, "star": 1}}
    write_result(
        run / "eval/generation.json",
        task="generation",
        metrics={"gfid": 12.3},
        protocol=drawn,
        weights=None,
        data_sha256="d" * 64,
    )
    (run / "other.safetensors").write_bytes(b"others")
    write_result(
        run / "eval/other.json",
        task="knn",
        metrics={"top1": 0.999},
        protocol={},
        weights=run / "other.safetensors",
        data_sha256="d" * 64,
    )
    stats = ChannelStats(
        mean=(0.5,) * 7 + (-0.25,),
        std=(1.0,) * 8,
        count=1234,
        size=16,
        data="/home/somebody/photos",
        tokenizer_sha256=file_sha256(weights),
    )
    (run / "latents").mkdir()
    write_stats(run / "latents", stats)
    (run / "latents/latent_stats.json").rename(run / "latents/stats.json")
    return run


def test_saving_writes_a_card_that_claims_nothing(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "tokenizer")
    card = tmp_path / "tokenizer/README.md"
    head = front_matter(card)
    assert head["library_name"] == "vtp" and head["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in head
    text = card.read_text()
    assert "Figures" not in text and "statistics" not in text
    trunk = sum(p.numel() for p in model.trunk.parameters())
    assert f"| encoder | 32 | 2 | 2 | {trunk:,} |" in text
    assert f"| all |  |  |  | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert file_sha256(tmp_path / "tokenizer/model.safetensors") in text


def test_a_card_of_a_tokenizer_without_text_or_decoder(tmp_path):
    small(train_clip=False, train_reconstruction=False).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "decoder" not in text and "text" not in text.split("##", 1)[1]
    (code,) = CODE.findall(text)
    assert "get_latents_decoded_images" not in code and "get_tokenizer" not in code


@pytest.mark.parametrize("clip", [True, False])
def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys, clip):
    monkeypatch.chdir(tmp_path)
    small(text_vocab_size=49_408, train_clip=clip).save_pretrained("my/tokenizer")
    (code,) = CODE.findall((tmp_path / "my/tokenizer/README.md").read_text())
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["latents"].shape == (1, 8, 4, 4) and "[1, 8, 4, 4]" in code
    with Image.open("reconstruction.png") as reconstruction:
        assert reconstruction.size == (16, 16)
    assert ("tensor([[" in capsys.readouterr().out) is clip


def test_figures_and_statistics_about_these_weights_only(run):
    add_evidence(run / "tokenizer", stats=run / "latents")
    text = write_card(run / "tokenizer", license="mit").read_text()
    assert front_matter(run / "tokenizer/README.md")["license"] == "mit"
    assert "| zero-shot | top1 0.7186<br>chance 0.1250 | data: photos, templates: 80 of CLIP (openai), " in text
    assert "size: 16, seed: 3 |" in text and "| generation | gfid 12.3000 | cfg_scale: 3.0, classes: ring, star" in text
    assert "0.9990" not in text and "somebody" not in text
    assert "over 1,234 images of 16 pixels of `photos` (mean -0.2500 to 0.5000; std 1.0000 to 1.0000)" in text
    assert {file.name for file in (run / "tokenizer/eval").glob("*")} == {"zero-shot.json", "generation.json"}
    assert published_stats(run / "tokenizer").count == 1234
    assert write_card(run / "tokenizer").read_text() == text  # the licence stays


def test_saving_again_takes_along_what_is_known_of_the_same_weights(run, tmp_path, caplog):
    add_evidence(run / "tokenizer", stats=run / "latents")
    write_card(run / "tokenizer", license="mit")
    model = VTPModel.from_pretrained(run / "tokenizer")
    model.save_pretrained(tmp_path / "copy")
    copied, original = ((folder / "README.md").read_text() for folder in (tmp_path / "copy", run / "tokenizer"))
    assert copied.partition("## Latent")[2] == original.partition("## Latent")[2] != ""
    assert published_stats(tmp_path / "copy") == published_stats(run / "tokenizer")
    assert front_matter(tmp_path / "copy/README.md")["license"] == "mit"

    with torch.no_grad():
        model.trunk.cls_token.add_(1)
    model.save_pretrained(tmp_path / "changed")
    text = (tmp_path / "changed/README.md").read_text()
    assert "Figures" not in text and "Latent statistics" not in text
    assert not (tmp_path / "changed/latent_stats.json").exists() and not (tmp_path / "changed/eval").exists()
    model.save_pretrained(run / "tokenizer")  # over the weights that the figures are about
    text = (run / "tokenizer/README.md").read_text()
    assert "Figures" not in text and "Latent statistics" not in text
    assert "is of other weights than" in caplog.text
    with pytest.raises(ConfigError, match="is of other weights than"):
        published_stats(run / "tokenizer")


def test_a_card_is_called_after_the_run_or_the_repository(run):
    assert "\n# run\n" in write_card(run / "tokenizer").read_text()
    assert "\n# tokenizer\n" in write_card(run / "tokenizer", name="me/tokenizer").read_text()


def test_a_path_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="no folder /nope/tokenizer: it should hold config.json and model.saf"):
        VTPModel.from_pretrained("/nope/tokenizer")


def test_a_folder_without_configuration_or_with_another_models_is_no_tokenizer(tmp_path):
    small().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"vtp"', '"clip"'))
    for load in (VTPModel.from_pretrained, VTPConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"{file} is of a model of type 'clip', not 'vtp'"):
            load(tmp_path)
    file.unlink()
    for load in (VTPModel.from_pretrained, VTPConfig.from_pretrained):
        with pytest.raises(FileNotFoundError, match=f"no config.json in {tmp_path}: a tokenizer's folder holds it and"):
            load(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"no config.json in {tmp_path.parent}/{tmp_path.name}"):
            load(tmp_path.parent, subfolder=tmp_path.name)
    assert VTPModel.from_pretrained(tmp_path, config=small().config).config.vision_depth


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_weights_have_the_permissions_of_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        small().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and "model.safetensors" in modes


def test_without_a_hub_one_line_says_so_of_a_processor(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("offline mode is enabled.\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ConfigError, match="could not push to me/x: offline mode is enabled.; the Hub must be"):
        VTPImageProcessor(16).push_to_hub("me/x")


def test_a_card_that_somebody_wrote_is_left_alone(run):
    card = run / "tokenizer/README.md"
    card.write_text("# Mine\n")
    write_card(run / "tokenizer")
    VTPModel.from_pretrained(run / "tokenizer").save_pretrained(run / "tokenizer")
    assert card.read_text() == "# Mine\n"


def test_published_statistics_are_bound_to_the_weights(run, tmp_path):
    torch.save({"mean": torch.zeros(1, 8, 1, 1), "std": torch.ones(1, 8, 1, 1)}, tmp_path / "latents_stats.pt")
    main(["publish", str(run / "tokenizer"), "--stats", str(tmp_path / "latents_stats.pt"), "--license", "mit"])
    stats = published_stats(run / "tokenizer")
    assert stats.std == (1.0,) * 8 and stats.count is None
    text = (run / "tokenizer/README.md").read_text()
    assert "each channel (mean 0.0000 to 0.0000; std 1.0000 to 1.0000)" in text


def broken(folder, how):
    """A copy of a tokenizer, spoilt: by a function of its weights, by keys of its configuration, or by bytes."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if callable(how):
        state = load_file(weights)
        how(state)
        save_file(state, weights, metadata={"format": "pt"})
    elif isinstance(how, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | how))
    else:
        (config if how == b"{oops" else weights).write_bytes(how or weights.read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda state: state.pop("trunk.norm.weight"), "'trunk.norm.weight' is missing"),
        (lambda state: state.update(foo=torch.zeros(1)), "'foo' is no part of the network"),
        (lambda state: state.update({"trunk.norm.weight": torch.zeros(7)}), r"is \[7\], in the network .* \[32\]"),
        (b"", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read"),
        (b"{oops", "cannot be read|no tokenizer in"),
        ({"text_embed_cls": True}, "text_embed_cls=true is not supported"),
        ({"vision_num_heads": 5}, "vision_num_heads=5"),
        ({"vision_patch_size": 0}, "vision_patch_size=0 must be a whole number"),
        ({"model_type": "clip"}, "about a clip|no VTP"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused_by_all_who_open_one(tmp_path, capfd, how, message):
    small().save_pretrained(tmp_path / "good")
    folder = broken(tmp_path / "good", how)
    for use in (open_tokenizer, add_evidence, lambda place: open_codec(place, "cpu"), AutoencoderVTP.from_vtp):
        with pytest.raises(ConfigError, match=message):
            use(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith(f"vtp: {tmp_path}") and said.count("\n") == 1


def test_the_tokenizer_inside_a_run_or_a_pipeline_is_named(run):
    with pytest.raises(ConfigError, match="did you mean .*run/tokenizer"):
        open_tokenizer(run)
    (run / "tokenizer").rename(run / "vae")
    for use in (open_tokenizer, open_codec):
        with pytest.raises(ConfigError, match="did you mean .*run/vae"):
            use(run)


def test_evidence_about_others_is_refused(run, tmp_path):
    folder = run / "tokenizer"
    with pytest.raises(ConfigError, match="other.json is no result about"):
        add_evidence(folder, results=[run / "eval/other.json"])
    with pytest.raises(ConfigError, match="none.json is no result about"):
        add_evidence(folder, results=[run / "eval/none.json"])
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "four.pt")
    with pytest.raises(ConfigError, match="is of 4 channels; the latents of .* have 8"):
        add_evidence(folder, stats=tmp_path / "four.pt")
    saved = json.loads((run / "latents/stats.json").read_text())
    (run / "latents/stats.json").write_text(json.dumps(saved | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="of another tokenizer"):
        add_evidence(folder, stats=run / "latents")
    with pytest.raises(ConfigError, match="no tokenizer in"):
        write_card(tmp_path)


class Hub:
    """huggingface_hub.HfApi, as far as an upload sees it."""

    sent = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        files = {f.relative_to(folder_path).as_posix(): f.read_bytes() for f in folder_path.rglob("*") if f.is_file()}
        Hub.sent = SimpleNamespace(repo_id=repo_id, files=files, token=self.token, message=commit_message)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


def test_pushing_sends_weights_statistics_results_and_a_card_that_loads_them(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    add_evidence(run / "tokenizer", stats=run / "latents")
    write_card(run / "tokenizer", license="mit")
    model = VTPModel.from_pretrained(run / "tokenizer")
    assert model.push_to_hub("me/vtp-tiny", token="t", commit_message="first").commit_url == "hub/me/vtp-tiny/commit/1"
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "latent_stats.json"}
    assert Hub.sent.files.keys() == files | {"eval/zero-shot.json", "eval/generation.json"}
    assert (Hub.sent.repo_id, Hub.sent.token, Hub.sent.message) == ("me/vtp-tiny", "t", "first")
    card = Hub.sent.files["README.md"].decode()
    assert 'VTPModel.from_pretrained("me/vtp-tiny")' in card and "license: mit" in card and "top1 0.7186" in card
    assert Hub.sent.files["model.safetensors"] == (run / "tokenizer/model.safetensors").read_bytes()


def test_pushing_while_saving_and_from_the_command_line(run, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    small().save_pretrained(run / "vtp-tiny", push_to_hub=True)
    assert Hub.sent.repo_id == "me/vtp-tiny" and {"README.md", "model.safetensors"} <= Hub.sent.files.keys()
    main(["publish", str(run / "tokenizer"), "--push", "me/other"])
    assert 'from_pretrained("me/other")' in Hub.sent.files["README.md"].decode()
    assert "sent to hub/me/other/commit/1" in capsys.readouterr().out


def test_without_a_hub_one_line_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="could not push to me/vtp: .*HF_HUB_OFFLINE"):
        VTPModel.from_pretrained(run / "tokenizer").push_to_hub("me/vtp")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["publish", str(run / "tokenizer"), "--push", "me/vtp"])
    assert re.fullmatch(r"vtp: could not push to me/vtp: [^\n]+\n", capsys.readouterr().err)
