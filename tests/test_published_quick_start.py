"""The quick start that the published models print runs as it stands: only the folder is another."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vtp.models.vtp_hf import VTPConfig, VTPModel


def published_code(shared):
    """The Python of the model page, which was kept without its indentation."""
    page = (shared / "reference/sources/001_fdaa0183e9e35d39.txt").read_text()
    (flat,) = re.findall(r"^import torch\n.*^print\('Cls token shape:'.*?$", page, re.DOTALL | re.MULTILINE)
    lines, inside = [], False
    for line in flat.splitlines():
        inside = inside and not line.startswith(("# ---", "recon_image", "text_probs", "for "))
        lines.append("    " * inside + line)
        inside = inside or line.endswith(":")
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")  # it autocasts for a GPU
def test_word_for_word(shared, tmp_path, monkeypatch, capsys):
    code = published_code(shared)
    (folder,) = re.findall(r'from_pretrained\("(.+?)"\)', code)
    official = shared / "fixtures/vtp/a_official_like"  # small; CLIP's own vocabulary and context, four blocks
    config = VTPConfig.from_pretrained(official, text_vocab_size=49408, text_context_length=77, vision_depth=4)
    torch.manual_seed(0)
    model = VTPModel(config)
    model.save_pretrained(tmp_path / "local")
    for name in ("figures", "output"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (320, 200), "orange").save(tmp_path / "figures/dog.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace(folder, "local"), "quick start", "exec"), names)

    assert names["latents"].shape == (1, 16, 16, 16) and names["recon"].shape == (1, 3, 256, 256)
    with Image.open("output/reconstructed.png") as picture:
        assert picture.size == (256, 256)
    assert names["image_features"].shape == (1, 48) and names["text_features"].shape == (4, 48)
    torch.testing.assert_close(names["text_probs"].sum(-1), torch.ones(1))
    assert names["cls_token"].shape == (1, 64) and names["patch_tokens"].shape == (1, 256, 64)
    assert [(p.shape, c.shape) for p, c in names["intermediate"]] == [((1, 256, 64), (1, 64))] * 4
    printed = capsys.readouterr().out
    for part, module in (("Vision Encoder", "trunk"), ("Pixel Decoder", "pixel_decoder")):
        count = sum(p.numel() for p in getattr(model, module).parameters()) / 1e6
        assert f"{part}: {count:.1f}M" in printed
    assert re.search(r"Label probs: \['0\.\d{4}', '0\.\d{4}', '0\.\d{4}', '0\.\d{4}'\]", printed)
    assert printed.count("Cls token shape: torch.Size([1, 64])") == 4


def test_import_is_light():
    """`import vtp` brings neither torch nor anything else that takes time."""
    program = "import sys, vtp\nassert not {'torch', 'omegaconf', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
