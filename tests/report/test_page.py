import json
import re
import shutil

import pytest
from PIL import Image

from vtp.config import ConfigError
from vtp.report.page import write_report

HOSTILE = "<script>alert(1)</script>\" onload='x' &amp;"
SECTIONS = ("key-figures", "loss-curves", "teacher", "reconstructions", "patch-features", "zero-shot", "retrieval")


def test_two_runs_make_one_complete_page_that_needs_nothing_else(make_run):
    runs = [make_run("vtp"), make_run("ae", understands=False)]
    page = write_report(runs)
    assert page == runs[0].parent / "report.html"
    html = page.read_text()
    for name in (*SECTIONS, "generation", "files"):
        assert f'<h2 id="{name}">' in html, name
    assert 'id="left-out"' not in html
    for reference in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert reference.startswith(("data:image/", "#")), reference
    assert "<script" not in html and "@import" not in html and "url(http" not in html
    assert len(html) < 5_000_000
    assert html.index(">vtp</span>") < html.index(">ae</span>")


def test_a_page_is_a_function_of_its_runs(make_run):
    run = make_run("vtp")
    assert write_report([run]).read_bytes() == write_report([run], run / "again.html").read_bytes()


def test_text_from_files_is_escaped(make_run, tmp_path):
    run = make_run("vtp")
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 99)).save(images / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"{i} {HOSTILE}", "kind": f"{i % 2} {HOSTILE}"})
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "environment.json").write_text(json.dumps({"command": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    result = json.loads((run / "eval" / "linear-letter.json").read_text())
    result |= {"task": HOSTILE, "protocol": {HOSTILE: HOSTILE}, "metrics": {HOSTILE: 1.0}}
    (run / "eval" / f"{HOSTILE.replace('/', '')}.json").write_text(json.dumps(result))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 2000, "images": 9e5, HOSTILE: 1.0}))
    html = write_report([run], data=str(images)).read_text()
    assert "<script" not in html and " onload='" not in html.replace("\\", "")
    assert html.count("&lt;script&gt;") > 20


def test_samples_stand_under_how_they_were_guided_the_least_first(make_run):
    runs = [make_run("vtp"), make_run("ae")]
    for run in runs:
        for name, scale in (("samples_unguided", 1.0), ("samples_less", 2.5), ("samples", 10)):
            if name != "samples":
                shutil.copytree(run / "samples", run / name)
            protocol = json.loads((run / name / "samples.json").read_text())
            (run / name / "samples.json").write_text(json.dumps(protocol | {"cfg_scale": scale}))
    html = write_report(runs).read_text()
    places = [html.index(f"<h3>Samples, {how}</h3>") for how in ("no guidance", "guidance 2.5", "guidance 10")]
    assert places == sorted(places)
    assert html.count("<h3>Samples, ") == 3


def test_pieces_that_are_missing_are_left_out_and_said(make_run):
    run = make_run("vtp")
    (run / "tokenizer").unlink()
    for file in (*(run / "eval").iterdir(), run / "environment.json", run / "samples" / "samples.json"):
        file.unlink()
    (run / "config.yaml").write_text("a: [broken")
    html = write_report([run]).read_text()
    for said in ("no tokenizer/", "no result in eval/", "environment.json is missing", "config.yaml cannot be read"):
        assert said in html
    assert "samples/ cannot be shown" in html
    assert '<h2 id="loss-curves">' in html
    assert '<h2 id="reconstructions">' not in html


def test_broken_lines_and_weights_do_not_stop_the_page(make_run):
    run = make_run("vtp")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1300, "clip": 1.0\nnonsense\n{"clip": 3}\n{"step": 1301, "clip": NaN, "l1": 0.3}\n')
    (run / "tokenizer").unlink()
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "config.json").write_text("{}")
    (run / "tokenizer" / "model.safetensors").write_bytes(b"no weights")
    html = write_report([run]).read_text()
    assert "vtp/metrics.jsonl: 3 broken lines skipped" in html
    assert "Pictures were left out" in html


def test_a_run_without_a_decoder_or_text_tower_shows_what_it_can(make_run):
    html = write_report([make_run("ae", understands=False)]).read_text()
    assert '<h2 id="patch-features">' in html
    for absent in ("zero-shot", "retrieval", "teacher"):
        assert f'<h2 id="{absent}">' not in html
    assert 'class="answer"' not in html


def test_training_images_are_never_called_held_out(make_run, tmp_path):
    run = make_run("vtp")
    images = tmp_path / "mine"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 32), (80 * i, 0, 99)).save(images / f"{i}.png")
    (run / "config.yaml").write_text(f"data: {images}\n")
    for file in (run / "eval").iterdir():
        file.unlink()
    html = write_report([run]).read_text()
    assert f"on training images (no held-out data is known: give data) of <code>{images}</code>" in html
    assert "on held-out images of <code>" not in html


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([])
    with pytest.raises(ConfigError, match="no run folder at"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="is no run folder: it holds none of config.yaml"):
        write_report([tmp_path])
