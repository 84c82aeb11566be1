"""The whole pipeline, smaller still: every file that the page promises is there, and a second run only re-asks."""

import json
from dataclasses import replace
from functools import partial

import pytest

from vtp.data.loader import image_batches
from vtp.data.views import BatchConfig, ViewsConfig
from vtp.engine.loop import LoopConfig
from vtp.evaluation import run as evaluate
from vtp.generation.config import DiTSize
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.recipes import dit_recipe, pretrain_recipe
from vtp.report.page import write_report
from vtp.studies import quickstart


@pytest.fixture
def small(monkeypatch):
    """Fewer pictures everywhere; the sizes are the only thing that changes."""
    for name, value in {"LATENTS": 96, "SAMPLES": 16}.items():
        monkeypatch.setattr(quickstart, name, value)
    monkeypatch.setattr(quickstart, "train_judge", partial(quickstart.train_judge, images=256, epochs=1))
    batches = evaluate.labelled_batches
    monkeypatch.setattr(
        evaluate, "labelled_batches", lambda *args, **options: batches(*args[:6], **(options | {"limit": 100}))
    )
    monkeypatch.setattr(evaluate, "image_batches", lambda *args, **_: image_batches(*args[:4], limit=100))
    monkeypatch.setattr(evaluate, "SCENES_TRAIN", 200)

    def shrunk(name):
        cfg = pretrain_recipe(name)
        return replace(
            cfg,
            steps=3,
            workers=0,
            batch=BatchConfig(clip=8, ssl=4, rec=4),
            model=ModelConfig(
                image_size=16,
                vision=ViTConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2, feature_bottleneck=8),
                text=TextConfig(context_length=24, embed_dim=32, num_heads=2, depth=1),
                decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2),
            ),
            views=ViewsConfig(size=16, global_size=16, local_size=8, local_crops=2),
            distil=replace(cfg.distil, prototypes=16),
            loop=LoopConfig(log_every=1),
        )

    dit = replace(dit_recipe("dit_quickstart"), steps=3, batch_size=8)
    return {"vtp": shrunk("quickstart"), "ae": shrunk("quickstart_ae")}, replace(
        dit, model=DiTSize(hidden_size=32, depth=1, num_heads=2)
    )


def test_every_stage_leaves_its_files_and_the_page_shows_both(small, tmp_path):
    tokenizers, dit = small
    runs = quickstart.compare_tokenizers(tokenizers, dit, tmp_path)
    assert [run.name for run in runs] == ["vtp", "ae"]
    seen = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["images"] for run in runs]
    assert seen == [24, 24]  # equal images
    for run in runs:
        asked = {path.stem for path in (run / "eval").glob("*.json")}
        always = {"linear-shape", "linear-letter", "linear-latent-shape", "knn-shape", "reconstruction"}
        always |= {"generation", "generation_unguided"}
        assert asked == always | ({"zero-shot-shape", "zero-shot-colour"} if run.name == "vtp" else set())
        result = json.loads((run / "eval/generation.json").read_text())
        assert {"gfd_judge", "class_agreement"} <= set(result["metrics"])
        assert result["protocol"]["cfg_scale"] == quickstart.GUIDANCE
        assert (run / "samples/grid.png").is_file()
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "<html" in page and "vtp" in page and "ae" in page
    weights = (runs[0] / "tokenizer/model.safetensors").stat().st_mtime_ns
    step = (runs[0] / "metrics.jsonl").read_text()
    quickstart.compare_tokenizers(tokenizers, dit, tmp_path)
    assert (runs[0] / "metrics.jsonl").read_text() == step  # no step was taken again
    assert (runs[0] / "tokenizer/model.safetensors").stat().st_mtime_ns >= weights
