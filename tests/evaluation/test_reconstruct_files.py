import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from tests.tiny import save_tokenizer
from vtp.cli import main
from vtp.config import ConfigError
from vtp.evaluation.reconstruct_files import (
    Picture,
    error_map,
    find_files,
    in_a_row,
    output_names,
    reconstruct_files,
    same_size,
    starts,
    tile_for,
    tiled,
)
from vtp.evaluation.run import EvalConfig
from vtp.images import normalise, to_uint8
from vtp.models.vtp_hf import VTPModel

CFG = EvalConfig(device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))  # patch 8, image size 16


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, *size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels := picture(*size, seed=seed)).save(path)
    return pixels


def read(path):
    return np.asarray(Image.open(path))


def through(tokenizer, pixels):
    """What the model makes of pixels whose sides are multiples of the patch."""
    model = VTPModel.from_pretrained(tokenizer).eval()
    with torch.no_grad():
        images = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        return to_uint8(model.get_latents_decoded_images(model.get_reconstruction_latents(images)))[0].permute(1, 2, 0)


def same(a, b):
    """Equal but for a level here and there: batches of other sizes round otherwise."""
    return a.shape == b.shape and np.abs(a.astype(int) - np.asarray(b, int)).max() <= 1


def test_padding_repeats_the_edge_and_is_cut_off_again(tokenizer, tmp_path):
    pixels = save(tmp_path / "a.png", 21, 13)
    result = reconstruct_files(tokenizer, [tmp_path / "a.png"], tmp_path / "out", cfg=CFG)
    (row,) = result["pictures"]
    assert row["size"] == [21, 13] and row["done"] == "padded to 24 x 16"
    padded = np.pad(pixels, ((0, 3), (0, 3), (0, 0)), mode="edge")
    back = read(tmp_path / "out/a.png")
    assert same(back, through(tokenizer, padded)[:13, :21])
    mse = np.square(pixels.astype(float) - back).mean()
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.05)  # of bytes here, of floats there
    strip = read(tmp_path / "out/strips/a.png")
    assert np.array_equal(strip, in_a_row([pixels, back, error_map(pixels, back)]))
    assert json.loads((tmp_path / "out/reconstruct.json").read_text()) == result
    assert result["metrics"]["psnr"] == row["psnr"] and result["protocol"]["fit"] == "pad"


def test_cropping_keeps_the_middle(tokenizer, tmp_path):
    pixels = save(tmp_path / "a.png", 21, 13)
    save(tmp_path / "b.png", 40, 7)  # no whole patch
    result = reconstruct_files(tokenizer, [tmp_path], tmp_path / "out", fit="crop", cfg=CFG)
    (row,) = result["pictures"]
    assert row["size"] == [16, 8] and row["done"] == "cropped to 16 x 8"
    assert row["ssim"] is None  # its window has 11 pixels
    assert same(read(tmp_path / "out/a.png"), through(tokenizer, pixels[2:10, 2:18]))
    assert [s["reason"] for s in result["skipped"]] == ["too small to crop: 40 x 7, the patch is 8 x 8"]


def test_pictures_of_a_size_together_are_the_pictures_alone(tokenizer, tmp_path):
    sizes = [(16, 16), (24, 8), (16, 16), (11, 30), (24, 8), (16, 16)]
    for i, size in enumerate(sizes):
        save(tmp_path / f"in/{i}.png", *size, seed=i)
    together = reconstruct_files(tokenizer, [tmp_path / "in"], tmp_path / "out", cfg=CFG)
    assert [row["name"] for row in together["pictures"]] == list("012345")
    for i in range(6):
        one = reconstruct_files(tokenizer, [tmp_path / f"in/{i}.png"], tmp_path / "one", cfg=CFG)
        assert one["pictures"][0]["psnr"] == pytest.approx(together["pictures"][i]["psnr"], abs=0.01)
        assert same(read(tmp_path / f"one/{i}.png"), read(tmp_path / f"out/{i}.png"))


def test_groups_have_one_size_and_keep_the_budget():
    sizes = [(4, 4), (8, 2), (4, 4), (4, 4), (30, 30), (4, 4)]
    pictures = [Picture(None, str(i), picture(*size), "") for i, size in enumerate(sizes)]
    groups = list(same_size(iter(pictures), budget=48))
    assert sorted(p.name for g in groups for p in g) == list("012345")
    assert all(len({p.pixels.shape for p in g}) == 1 for g in groups)
    assert all(sum(p.pixels[..., 0].size for p in g) <= 48 for g in groups if len(g) > 1)
    assert max(map(len, groups)) == 2


def test_broken_files_are_skipped_and_counted(tokenizer, tmp_path, capsys):
    save(tmp_path / "in/good.png", 16, 16)
    (tmp_path / "in/empty.jpg").write_bytes(b"")
    (tmp_path / "in/half.png").write_bytes((tmp_path / "in/good.png").read_bytes()[:300])
    (tmp_path / "in/page.webp").write_text("<html>")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "in/notes.txt").write_text("no picture, and not called one")
    reasons = ["empty file", "corrupt image", "unreadable", "not an image"]
    main(["reconstruct", str(tokenizer), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 pictures, 4 skipped" in shown
    result = json.loads((tmp_path / "out/reconstruct.json").read_text())
    assert [s["reason"].partition(":")[0] for s in result["skipped"]] == reasons
    assert result["protocol"]["skipped"] == 4
    (tmp_path / "in/good.png").unlink()
    with pytest.raises(ConfigError, match="none of 4 files could be read: 1 empty file, 1 corrupt image, 1 unr"):
        reconstruct_files(tokenizer, [tmp_path / "in"], tmp_path / "out", cfg=CFG)


def test_a_speck_is_told_its_size(tokenizer, tmp_path):
    save(tmp_path / "speck.png", 3, 2)
    with pytest.raises(ConfigError, match="1 too few pixels; .*speck.png: too few pixels.*3 x 2"):
        reconstruct_files(tokenizer, [tmp_path / "speck.png"], tmp_path / "out", cfg=CFG)


def test_names_never_collide(tokenizer, tmp_path):
    files = [tmp_path / name for name in ("a/x.png", "a/x.bmp", "b/X.png", "x-2.png", "strips.png")]
    for i, file in enumerate(files):
        save(file, 16, 16, seed=i)
    assert list(output_names(files).values()) == ["x", "x-2", "X-3", "x-2-2", "strips"]
    result = reconstruct_files(tokenizer, files, tmp_path / "out", cfg=CFG)
    written = {row["file"]: row["name"] for row in result["pictures"]}
    assert len({name.lower() for name in written.values()}) == 5
    for i, file in enumerate(files):
        assert np.array_equal(read(tmp_path / f"out/strips/{written[str(file)]}.png")[:, :16], picture(16, 16, seed=i))


def test_outputs_are_no_inputs_and_overwrite_none(tokenizer, tmp_path):
    save(tmp_path / "a.png", 16, 16)
    save(tmp_path / ".thumbs/a.png", 16, 16)
    for _ in range(2):
        result = reconstruct_files(tokenizer, [tmp_path], tmp_path / "out", cfg=CFG)
        assert len(result["pictures"]) == 1
    assert find_files([tmp_path, tmp_path / "a.png"], tmp_path / "out") == [tmp_path / "a.png"]
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ConfigError, match="would be overwritten"):
        reconstruct_files(tokenizer, [tmp_path / "a.png"], tmp_path, cfg=CFG)
    assert (tmp_path / "a.png").read_bytes() == before
    with pytest.raises(ConfigError, match=f"no picture .* that is not in --out {tmp_path}; choose another --out"):
        reconstruct_files(tokenizer, [tmp_path], tmp_path, cfg=CFG)


@pytest.mark.parametrize("place", ["img.png", "strips/img.png"])
def test_no_input_is_overwritten_by_that_of_another(tokenizer, tmp_path, place):
    save(tmp_path / "in/img.jpg", 16, 16)
    save(tmp_path / "out" / place, 16, 16)
    with pytest.raises(ConfigError, match=f"{tmp_path}/out/{place} would be overwritten by a reconstruction"):
        reconstruct_files(tokenizer, [tmp_path / "in/img.jpg", tmp_path / "out" / place], tmp_path / "out", cfg=CFG)


@pytest.mark.parametrize("size", [(40, 64), (8, 104), (24, 24)])
@pytest.mark.parametrize("tile", [16, 24, 48])
def test_tiles_that_change_nothing_change_nothing(size, tile):
    image = torch.randn(1, 3, *size)
    seen = []

    def function(x):
        seen.append(x.shape)
        return x

    torch.testing.assert_close(tiled(function, image, tile, 8, budget=3 * tile**2), image)
    assert all(h % 8 == 0 and w % 8 == 0 and max(h, w) <= tile and b * h * w <= 3 * tile**2 for b, _, h, w in seen)


def test_the_step_between_tiles_is_spread_over_their_overlap():
    levels = iter(range(100))
    result = tiled(lambda x: torch.full_like(x, next(levels)), torch.zeros(1, 3, 32, 128), 32, 8, budget=1)
    assert result[0, 0, 0, 0] == 0 and result[0, 0, 0, -1] == next(levels) - 1
    assert result.diff(dim=-1).min() >= 0 and result.diff(dim=-1).max() < 0.2  # a step of 1 over 8 pixels
    assert result.diff(dim=-2).abs().max() < 1e-6


@pytest.mark.parametrize(("side", "tile", "overlap"), [(8, 8, 8), (104, 24, 8), (100, 30, 10), (31, 30, 10)])
def test_tiles_cover_a_side(side, tile, overlap):
    at = starts(side, tile, overlap)
    assert at[0] == 0 and at[-1] == side - tile
    assert all(0 < b - a <= tile - overlap for a, b in zip(at, at[1:], strict=False))


def test_only_large_pictures_are_tiled_unasked(tokenizer, tmp_path):
    assert tile_for((1024, 1024), 8, None, 16) is None
    assert tile_for((1025, 100), 8, None, 16) == 16
    assert tile_for((256 * 2 + 1, 100), 2, None, 16) == 16  # too many patches for the rotary positions
    assert tile_for((1100, 100), 8, None, 2048) is None and tile_for((2049, 100), 8, None, 2048) == 2048
    assert tile_for((100, 40), 8, 104, 16) is None
    assert tile_for((100, 105), 8, 104, 16) == 104
    save(tmp_path / "long.png", 1030, 16)
    (row,) = reconstruct_files(tokenizer, [tmp_path / "long.png"], tmp_path / "out", cfg=CFG)["pictures"]
    assert row["done"] == "padded to 1032 x 16, in tiles of 16"
    assert read(tmp_path / "out/long.png").shape == (16, 1030, 3)


def test_a_line_tells_of_pictures_and_tiles(tokenizer, tmp_path, monkeypatch):
    told = []
    update = Progress.update

    def spy(bar, task, **changes):
        update(bar, task, **changes)
        told.append((bar.tasks[0].completed, bar.tasks[0].total, bar.tasks[0].fields["status"]))

    monkeypatch.setattr(Progress, "update", spy)
    save(tmp_path / "in/a.png", 40, 40)
    save(tmp_path / "in/b.png", 16, 16)
    (tmp_path / "in/c.png").write_bytes(b"")
    reconstruct_files(tokenizer, [tmp_path / "in"], tmp_path / "out", tile=16, cfg=CFG)
    assert (0, 3, "4 of 16 tiles") in told and (0, 3, "12 of 16 tiles") in told
    assert [done for done, _, status in told if not status][-1] == 3


def test_error_map():
    before, after = np.full((2, 3, 3), 100, np.uint8), np.full((2, 3, 3), 100, np.uint8)
    after[0, 1] = (103, 94, 100)  # mean absolute error 3
    after[1, 2] = 255
    grey = np.zeros((2, 3), int)
    grey[0, 1], grey[1, 2] = 15, 255
    assert np.array_equal(error_map(before, after), np.repeat(grey[..., None], 3, -1))


def test_bad_input_is_one_clear_error(tokenizer, tmp_path):
    save(tmp_path / "a.png", 16, 16)
    (tmp_path / "empty").mkdir()
    cases = {
        "no file or folder": {"inputs": [tmp_path / "b.png"]},
        "no picture": {"inputs": [tmp_path / "empty"]},
        "tile=20: choose a multiple of the patch of 8 pixels, at least 16": {
            "inputs": [tmp_path / "a.png"],
            "tile": 20,
        },
        "tile=8: choose": {"inputs": [tmp_path / "a.png"], "tile": 8},
        "no tokenizer in": {"inputs": [tmp_path / "a.png"], "tokenizer": tmp_path},
    }
    for message, arguments in cases.items():
        with pytest.raises(ConfigError, match=message):
            reconstruct_files(**{"tokenizer": tokenizer, "out": tmp_path / "out", "cfg": CFG, **arguments})
