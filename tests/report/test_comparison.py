import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_codecs import save_autoencoder
from tests.tiny import save_tokenizer
from vtp.cli import main
from vtp.config import ConfigError
from vtp.evaluation.codecs import Codec, Make
from vtp.evaluation.compare import PASSES, common_size, rates
from vtp.evaluation.run import EvalConfig, reconstruction
from vtp.models.vtp_hf import VTPConfig, VTPModel
from vtp.report.comparison import grid, rows, short_names, write_comparison

CFG = EvalConfig(limit=20, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(root / "vtp")
    shutil.copytree(root / "vtp", root / "twin")
    return root


def test_each_tokenizer_is_measured_as_alone_and_on_the_same_pictures(tokenizers, tmp_path):
    folders = [tokenizers / "vtp", tokenizers / "twin"]
    results = write_comparison(folders, "scenes:test", tmp_path, cfg=CFG)
    alone = reconstruction(folders[0], "scenes:test", cfg=CFG)
    for result in results:
        assert {k: result["metrics"][k] for k in ("psnr", "ssim")} == pytest.approx(alone["metrics"])
        assert result["data_sha256"] == alone["data_sha256"] and result["model_sha256"] == alone["model_sha256"]
        assert result["metrics"]["encode_images_per_second"] > 0
        assert result["protocol"]["rates"] == "medians of 5 passes over 8 images, tokenizers in turn"
        assert result["protocol"]["images"] == 20 and result["protocol"]["size"] == 16
        about = result["tokenizer"]
        assert about["latent"] == [8, 2, 2] and about["compression"] == 3 * 16 * 16 / (8 * 2 * 2)
    assert json.loads((tmp_path / "compare.json").read_text()) == results
    equal = [row for row in rows(results) if row.metric in ("psnr", "ssim")]
    assert [row.best for row in equal] == [None, None]  # twins: none is better
    picture = np.asarray(Image.open(tmp_path / "compare.png"))
    half = (picture.shape[1] - 6 - 198) // 2  # left and right of the originals' column both twins drew the same
    assert np.array_equal(picture[46:, 204 : 204 + half], picture[46:, 204 + half : 204 + 2 * half])
    html = (tmp_path / "compare.html").read_text()
    assert "20 images of scenes:test" in html and "<script" not in html
    assert html.count("data:image/png") == 6 * (1 + 2 * 2) and "jpeg" not in html


def test_diffusers_beside_vtp(tokenizers, tmp_path, capsys):
    save_autoencoder(tmp_path / "kl")
    folders = [str(tokenizers / "vtp"), str(tmp_path / "kl")]
    main(["compare", *folders, "--data", "scenes:test", "--limit", "9", "--device", "cpu", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "8 x 2 x 2" in shown and "4 x 8 x 8" in shown and "AutoencoderKL" in shown
    ours, theirs = json.loads((tmp_path / "compare.json").read_text())
    assert ours["data_sha256"] == theirs["data_sha256"]
    assert theirs["tokenizer"]["compression"] == 3.0 and theirs["metrics"].keys() == ours["metrics"].keys()


def test_the_distance_is_of_the_extractor_asked_for(tokenizers, tmp_path):
    from vtp.data.sources import open_source
    from vtp.evaluation.judge import save_judge, train_judge

    save_judge(train_judge(open_source("scenes"), ("shape",), size=16, images=64, epochs=1, width=4), tmp_path / "j")
    (result,) = write_comparison(
        [tokenizers / "vtp"], "scenes:test", tmp_path, extractor=f"judge:{tmp_path / 'j'}", cfg=CFG
    )
    assert result["metrics"]["rfd_judge"] > 0 and result["protocol"]["extractor"].startswith("judge ")
    (row,) = (row for row in rows([result]) if row.metric == "rfd_judge")
    assert row.better == -1 and row.best is None


def test_best_is_the_better_way():
    about = {"latent": [4, 2, 2], "compression": 3.0, "parameters": {"encoder": 1, "decoder": 1}, "kind": "VTP"}
    metrics = ({"psnr": 20.0, "rfid": 3.0, "encode_images_per_second": 9.0},)
    metrics += ({"psnr": 21.0, "rfid": 4.0, "encode_images_per_second": 8.0},)
    best = {row.metric: row.best for row in rows([{"metrics": m, "tokenizer": about} for m in metrics])}
    assert (best["psnr"], best["rfid"], best["encode_images_per_second"], best["latent"]) == (1, 0, 0, None)


@pytest.mark.parametrize(("rates", "best"), [((10.0, 9.5), None), ((9.5, 10.0), None), ((9.0, 10.0, 7.0), 1)])
def test_rates_within_a_tenth_are_even(rates, best):
    about = {"latent": [4, 2, 2], "compression": 3.0, "parameters": {"encoder": 1, "decoder": 1}, "kind": "VTP"}
    found = rows([{"metrics": {"decode_images_per_second": rate}, "tokenizer": about} for rate in rates])
    assert found[0].best == best


def test_rates_are_medians_of_passes_in_turn(monkeypatch):
    """On a clock of the test's own: what a pass costs, and that one slow pass and the first round count for nothing."""
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def codec(name, seconds):
        def encode(images):
            order.append(name)
            first, slow = order.count(name) == 1, order.count(name) == 4
            clock[0] += 100.0 if first or slow else seconds
            return images

        def decode(latents):
            clock[0] += 2 * seconds
            return latents

        make, cpu = Make("VTP", Path("x"), 8, 4), torch.device("cpu")
        return Codec(make=make, encode=encode, decode=decode, parameters={}, device=cpu, precision="fp32")

    a, b = rates([codec("a", 0.5), codec("b", 0.25)], torch.zeros(4, 3, 8, 8))
    assert order == ["a", "b"] * (1 + PASSES)
    assert a == {"encode_images_per_second": 8.0, "decode_images_per_second": 4.0}
    assert b == {"encode_images_per_second": 16.0, "decode_images_per_second": 8.0}


def test_names_tell_tokenizers_apart():
    assert short_names([Path("/r/a/tokenizer")]) == ["a"]
    assert short_names([Path("/r/a/tokenizer"), Path("/r/b/tokenizer"), Path("/r/vae")]) == ["a", "b", "vae"]
    assert short_names([Path("/r/a/tokenizer"), Path("/s/a/tokenizer")]) == ["r/a", "s/a"]
    assert short_names([Path("/r/a"), Path("/r/a/tokenizer")]) == ["a", "tokenizer"]


def test_the_grid_shows_what_it_is_given():
    originals = np.full((2, 32, 32, 3), 10, np.uint8)
    made = np.full((2, 32, 32, 3), 30, np.uint8)
    sheet = np.asarray(grid(originals, {"a name that is far too long for two tiles " * 3: (made, [1.0, 2.0])}))
    side, top = 192, 46
    for row in range(2):
        y = top + row * (side + 26) + side // 2
        assert [int(sheet[y, 6 + column * (side + 6) + side // 2, 0]) for column in range(3)] == [10, 30, 100]


def test_bad_input_is_one_clear_error(tokenizers, tmp_path):
    vtp = tokenizers / "vtp"
    torch.manual_seed(0)
    tiny = {"vision_embed_dim": 32, "vision_depth": 1, "vision_num_heads": 2, "train_clip": False}
    tiny |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    VTPModel(VTPConfig(image_size=48, vision_patch_size=12, **tiny)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="named twice"):
        write_comparison([vtp, vtp], "scenes:test", tmp_path, cfg=CFG)
    with pytest.raises(ConfigError, match="made for 16, 48 pixels; say --size"):
        common_size([vtp, tmp_path / "other"], None)
    with pytest.raises(ConfigError, match="size=16 is not a multiple of the patch of .*other, 12 pixels"):
        common_size([vtp, tmp_path / "other"], 16)
    assert common_size([vtp, tmp_path / "other"], 24) == 24
    with pytest.raises(ConfigError, match="no data at"):
        write_comparison([vtp], str(tmp_path / "gone.tar"), tmp_path, cfg=CFG)
