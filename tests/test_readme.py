"""The README's Python runs as it stands, on a tokenizer of the smallest size."""

import re
from pathlib import Path

from PIL import Image

from tests.tiny import save_tokenizer
from vtp.recipes import dit_recipe, pretrain_recipe
from vtp.studies.quickstart import Comparison

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_ten_lines(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (folder,) = re.findall(r'from_pretrained\("(.+?)"\)', code)
    (photo,) = re.findall(r'Image.open\("(.+?)"\)', code)
    monkeypatch.chdir(tmp_path)
    save_tokenizer(Path(folder), width=16, channels=4)
    Image.new("RGB", (40, 30), "red").save(photo)
    exec(compile(code, "README.md", "exec"), {})
    with Image.open("reconstruction.png") as reconstruction:
        assert reconstruction.size == (16, 16)
    assert re.match(r"tensor\(\[\[-?\d\.\d+, +-?\d\.\d+\]\]\)", capsys.readouterr().out)


def test_the_runs_that_the_figures_are_of_are_the_recipes():
    for name, title in (("quickstart", "embedded `scenes`"), ("cpu", "shop photographs")):
        cfg = pretrain_recipe(name)
        (row,) = [line for line in README.splitlines() if line.startswith("|") and title in line]
        assert f"{cfg.views.size} px, {cfg.steps:,} steps, {cfg.steps * cfg.active_batch.pairs:,} images each" in row
    assert f"guidance {Comparison(dit=dit_recipe('dit_quickstart')).guidance:g}" in README
