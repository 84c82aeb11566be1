"""The whole pipeline, smaller still: every file that the page promises is there, and a second run takes no step."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from tests.tiny import tiny_run
from vtp.config import ConfigError
from vtp.data.views import BatchConfig
from vtp.engine.loop import LoopConfig
from vtp.generation.config import DiTSize
from vtp.recipes import dit_recipe, pretrain_recipe
from vtp.report.page import write_report
from vtp.studies import quickstart


@pytest.fixture
def small():
    """Fewer pictures everywhere; the sizes are the only thing that changes."""

    def shrunk(name):
        batch = BatchConfig(clip=8, ssl=4, rec=4)
        return tiny_run(pretrain_recipe(name), steps=3, batch=batch, loop=LoopConfig(log_every=1))

    size = DiTSize(hidden_size=32, depth=1, num_heads=2)
    ask = quickstart.Comparison(
        dit=replace(dit_recipe("dit_quickstart"), steps=3, batch_size=8, model=size),
        judge_images=256,
        judge_epochs=1,
        probe_images=200,
        test_images=100,
        latents=96,
        samples=16,
        sampling_steps=4,
    )
    return {"vtp": shrunk("quickstart"), "ae": shrunk("quickstart_ae")}, ask


def test_every_stage_leaves_its_files_and_the_page_shows_both(small, tmp_path):
    tokenizers, ask = small
    runs = quickstart.compare_tokenizers(tokenizers, ask, tmp_path)
    assert [run.name for run in runs] == ["vtp", "ae"]
    seen = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["images"] for run in runs]
    assert seen == [24, 24]  # equal images
    for run in runs:
        asked = {path.stem for path in (run / "eval").glob("*.json")}
        always = {"linear-shape", "linear-letter", "linear-latent-shape", "knn-shape", "reconstruction"}
        always |= {"generation", "generation_unguided"}
        assert asked == always | ({"zero-shot-shape", "zero-shot-colour"} if run.name == "vtp" else set())
        result = json.loads((run / "eval/generation.json").read_text())
        figures = {"gfd_judge", "class_agreement"}
        assert figures | {f"{of}.{name}" for of in ("real", "reconstructed") for name in figures} == set(
            result["metrics"]
        )
        assert result["protocol"]["cfg_scale"] == ask.guidance
        assert (run / "samples/grid.png").is_file()
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "<html" in page and "vtp" in page and "ae" in page


@pytest.mark.slow
def test_a_second_run_takes_no_step_again(small, tmp_path):
    tokenizers, ask = small
    runs = quickstart.compare_tokenizers(tokenizers, ask, tmp_path)
    step = (runs[0] / "metrics.jsonl").read_text()
    quickstart.compare_tokenizers(tokenizers, ask, tmp_path)
    assert (runs[0] / "metrics.jsonl").read_text() == step


def test_a_run_that_fails_is_named_with_its_reason_and_the_other_is_stopped(small, tmp_path):
    tokenizers, ask = small
    broken = replace(tokenizers["ae"], data="nowhere")
    with pytest.raises(ConfigError, match=r"ae stopped: ConfigError: .*nowhere.*log\.txt"):
        quickstart.compare_tokenizers({"vtp": replace(tokenizers["vtp"], steps=5_000), "ae": broken}, ask, tmp_path)
    assert not (tmp_path / "vtp/tokenizer").exists()
    assert not {"vtp", "ae"} & {child.name for child in multiprocessing.active_children()}
