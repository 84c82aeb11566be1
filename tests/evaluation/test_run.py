"""`vtp eval` as a user calls it: published folders and data in, results files out, and what bad input is told."""

import json

import pytest
from PIL import Image

from tests.tiny import save_tokenizer
from vtp.config import ConfigError
from vtp.data.sources import open_source
from vtp.evaluation.judge import save_judge, train_judge
from vtp.evaluation.run import EvalConfig, generation, probe, reconstruction, zero_shot

SMALL = EvalConfig(limit=40, batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    save_judge(train_judge(open_source("scenes"), ("shape",), size=16, images=64, epochs=1, width=4), folder)
    return folder


def with_out(path, **changes):
    return EvalConfig(**{**SMALL.__dict__, "out": path, **changes})


def test_zero_shot(tokenizer, tmp_path):
    result = zero_shot(tokenizer, "scenes:test", label="shape", cfg=with_out(tmp_path / "zero.json"))
    assert json.loads((tmp_path / "zero.json").read_text()) == result
    assert result["task"] == "zero-shot" and result["metrics"]["chance"] == 1 / 8
    protocol = result["protocol"]
    assert protocol["images"] == 40 and protocol["classes"] == 8 and protocol["templates"] == "88 of the data set"
    again = zero_shot(tokenizer, "scenes:test", label="shape", cfg=with_out(None, batch_size=7))
    assert again["data_sha256"] == result["data_sha256"]
    assert again["metrics"]["top1"] == pytest.approx(result["metrics"]["top1"], abs=0.05)


def test_zero_shot_names(tokenizer, tmp_path):
    """A class goes by the words of the file; the file speaks of classes that there are."""
    file = tmp_path / "names.json"
    same = zero_shot(tokenizer, "scenes:test", label="shape", cfg=SMALL)
    file.write_text(json.dumps({"circle": ["circle", "circle"]}))
    named = zero_shot(tokenizer, "scenes:test", label="shape", names=file, cfg=SMALL)
    assert named["protocol"]["names"] == "names.json" and named["metrics"] == same["metrics"]
    file.write_text(json.dumps({"cirle": "disc"}))
    with pytest.raises(ConfigError, match="no class 'cirle'"):
        zero_shot(tokenizer, "scenes:test", label="shape", names=file, cfg=SMALL)
    file.write_text("not json")
    with pytest.raises(ConfigError, match="not a JSON file"):
        zero_shot(tokenizer, "scenes:test", label="shape", names=file, cfg=SMALL)


def test_zero_shot_templates(tokenizer, tmp_path):
    def used(templates):
        return zero_shot(tokenizer, "scenes:test", label="shape", templates=templates, cfg=SMALL)["protocol"]

    (tmp_path / "lines.txt").write_text("a {}\n\nthe {}\n")
    (tmp_path / "list.json").write_text('["one {}"]')
    assert used(str(tmp_path / "lines.txt"))["templates"] == "2 of lines.txt"
    assert used(str(tmp_path / "list.json"))["templates"] == "1 of list.json"
    assert used(["a {}", "my {}", "your {}"])["templates"] == "3 given"
    assert used("openai")["templates"] == "80 of CLIP (openai)"
    with pytest.raises(ConfigError, match="templates=imagenet is no file; choose"):
        used("imagenet")
    for held in (b"\xff\xd8\xff", b"[1, "):
        (tmp_path / "other").write_bytes(held)
        with pytest.raises(ConfigError, match="other is neither text"):
            used(str(tmp_path / "other"))


def test_top_keeps_the_commonest_classes_and_natural_images_get_clips_templates(tokenizer, tmp_path):
    for name, count in {"cat": 3, "dog": 1, "owl": 2}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 16), (40 * i, 90, 0)).save(tmp_path / name / f"{i}.png")
    protocol = zero_shot(tokenizer, str(tmp_path), top=2, cfg=SMALL)["protocol"]
    assert protocol["classes"] == 2 and protocol["images"] == 5
    assert protocol["templates"] == "80 of CLIP (openai)"


@pytest.mark.parametrize("features, width", [("cls", 32), ("patches", 32), ("latent", 8)])
def test_probes(tokenizer, features, width):
    for method in ("linear", "knn"):
        result = probe(
            method, tokenizer, "scenes", "scenes:test", label="colour", features=features, train_limit=60, cfg=SMALL
        )
        assert result["protocol"]["features"].startswith(features)
        assert f"{width} numbers" in result["protocol"]["features"]
        assert result["protocol"]["train_images"] == 60 and result["protocol"]["images"] == 40


def test_probe_equals_in_bf16_but_for_rounding(tokenizer):
    kwargs = {"label": "colour", "train_limit": 60}
    full = probe("knn", tokenizer, "scenes", "scenes:test", **kwargs, cfg=SMALL)
    half = probe("knn", tokenizer, "scenes", "scenes:test", **kwargs, cfg=with_out(None, precision="bf16"))
    assert half["protocol"]["precision"] == "bf16"
    assert half["metrics"]["top1"] == pytest.approx(full["metrics"]["top1"], abs=0.15)


def test_reconstruction(tokenizer, judge):
    result = reconstruction(tokenizer, "scenes:test", extractor=f"judge:{judge}", cfg=SMALL)
    assert set(result["metrics"]) == {"psnr", "ssim", "rfd_judge"}
    assert result["protocol"]["extractor"].startswith("judge ") and result["protocol"]["images"] == 40


def test_generation(tokenizer, judge, tmp_path):
    source = open_source("scenes:test")
    for i, shard in enumerate(source.shards[:20]):
        Image.fromarray(next(source.read(shard, 16)).image).save(tmp_path / f"{i:06d}.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "grid.png")  # a contact sheet is no sample
    samples = {"num": 20, "seed": 4, "cfg_scale": 2.0, "classes": {"star": 3, "circle": 0}, "dit": str(tmp_path)}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    result = generation(
        tmp_path, "scenes:test", extractor=f"judge:{judge}", judge=judge, label="shape", cfg=with_out(None)
    )
    assert set(result["metrics"]) == {"gfd_judge", "class_agreement"}
    among = {"images": tmp_path, "reference": "scenes:test", "extractor": f"judge:{judge}"}
    floor = generation(**among, judge=judge, label="shape", real="scenes", tokenizer=tokenizer, cfg=with_out(None))
    more = {f"{of}.{name}" for of in ("real", "reconstructed") for name in result["metrics"]}
    assert set(floor["metrics"]) == set(result["metrics"]) | more
    assert result["metrics"].items() <= floor["metrics"].items()
    assert floor["metrics"]["real.gfd_judge"] < floor["metrics"]["reconstructed.gfd_judge"]  # it is untrained
    with pytest.raises(ConfigError, match="both scenes:test"):
        generation(**among, real="scenes:test", cfg=SMALL)
    assert result["protocol"]["cfg_scale"] == 2.0 and result["protocol"]["num"] == 20 and result["seed"] == 4
    Image.new("RGB", (8, 8)).save(tmp_path / "000020.png")
    (tmp_path / "samples.json").write_text(json.dumps(samples | {"num": 21}))
    with pytest.raises(ConfigError, match="several sizes.*16 x 16, 8 x 8"):
        generation(tmp_path, "scenes:test", extractor=f"judge:{judge}", cfg=SMALL)


def test_bad_input_is_one_clear_error(tokenizer, judge, tmp_path):
    cases = {
        "no tokenizer in": lambda: zero_shot(tmp_path, "scenes:test", label="shape", cfg=SMALL),
        "size=20 is not a multiple": lambda: reconstruction(tokenizer, "scenes:test", cfg=with_out(None, size=20)),
        "no label 'breed'": lambda: zero_shot(tokenizer, "scenes:test", label="breed", cfg=SMALL),
        "both scenes:test": lambda: probe("linear", tokenizer, "scenes:test", "scenes:test", label="shape", cfg=SMALL),
        "choose cls, patches, both, latent": lambda: probe(
            "knn", tokenizer, "scenes", "scenes:test", label="shape", features="deep", train_limit=30, cfg=SMALL
        ),
        "no data at": lambda: reconstruction(tokenizer, str(tmp_path / "gone.tar"), cfg=SMALL),
        "no pictures in": lambda: generation(tmp_path, "scenes:test", extractor=f"judge:{judge}", cfg=SMALL),
        "choose inception": lambda: reconstruction(tokenizer, "scenes:test", extractor="vgg", cfg=SMALL),
    }
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_tokenizer_without_the_part_is_refused(tmp_path):
    blind = save_tokenizer(tmp_path / "ae", train_clip=False)
    with pytest.raises(ConfigError, match="train_clip=true"):
        zero_shot(blind, "scenes:test", label="shape", cfg=SMALL)
    mute = save_tokenizer(tmp_path / "clip", train_reconstruction=False)
    with pytest.raises(ConfigError, match="train_reconstruction=true"):
        reconstruction(mute, "scenes:test", cfg=SMALL)


def test_the_class_asked_for_must_be_known_to_the_judge(judge, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "000000.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "000001.png")
    (tmp_path / "samples.json").write_text(json.dumps({"classes": {"teapot": 0}}))
    with pytest.raises(ConfigError, match="no class 'teapot'"):
        generation(tmp_path, "scenes:test", extractor=f"judge:{judge}", judge=judge, label="shape", cfg=SMALL)
    (tmp_path / "samples.json").unlink()
    with pytest.raises(ConfigError, match="samples.json"):
        generation(tmp_path, "scenes:test", extractor=f"judge:{judge}", judge=judge, label="shape", cfg=SMALL)


def test_what_was_left_out_is_in_the_protocol(tokenizer, tmp_path):
    for i in range(6):
        folder = tmp_path / "set" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "set" / "a" / "broken.png").write_bytes(b"not a picture")
    result = reconstruction(tokenizer, str(tmp_path / "set"), cfg=SMALL)
    assert result["protocol"]["images"] == 6
    assert result["protocol"]["left_out"] == "1 not an image"
    assert "left_out" not in reconstruction(tokenizer, "scenes:test", cfg=SMALL)["protocol"]


@pytest.mark.parametrize("name", ["batch_size", "limit", "size"])
def test_sizes_that_hold_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=0 must be at least 1"):
        EvalConfig(**{name: 0})


def test_the_same_data_by_another_name_is_found_out(tokenizer, tmp_path):
    folder = tmp_path / "set"
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(folder / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(ConfigError, match="every picture of .* as well"):
        probe("knn", tokenizer, str(folder), f"{folder}/", cfg=SMALL)
    other = tmp_path / "other"
    for name in "ab":
        (other / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (0, 99, ord(name))).save(other / name / "new.png")
        Image.new("RGB", (20, 20), (10 * "ab".index(name), 0, 0)).save(other / name / "old.png")
    result = probe("knn", tokenizer, str(folder), str(other), cfg=SMALL)
    assert result["protocol"]["in_training_as_well"] == 2


def test_a_run_folder_names_the_tokenizer_in_it(tokenizer, tmp_path):
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    with pytest.raises(ConfigError, match=f"did you mean {tmp_path / 'tokenizer'}?"):
        reconstruction(tmp_path, "scenes:test", cfg=SMALL)


def test_samples_of_an_interrupted_call_are_not_taken_for_all(judge, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "000000.png")
    (tmp_path / "samples.json").write_text(json.dumps({"num": 2}))
    with pytest.raises(ConfigError, match="holds 1 of the 2 pictures"):
        generation(tmp_path, "scenes:test", extractor=f"judge:{judge}", cfg=SMALL)


def test_at_least_one_class(tokenizer):
    with pytest.raises(ConfigError, match="top must be at least 1"):
        zero_shot(tokenizer, "scenes:test", label="shape", top=0, cfg=SMALL)
