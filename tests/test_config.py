"""Configuration: what merges, what is refused, and that each refusal is one line which names the mend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from vtp.config import ConfigError, differences, dump, load, merge
from vtp.schedules import WarmupCosine


@dataclass(frozen=True, kw_only=True)
class Vision:
    depth: int = 4
    base: float | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")


@dataclass(frozen=True, kw_only=True)
class Model:
    vision: Vision = Vision()
    patch: int = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 10
    data: str | None = None
    name: str = "run"
    fast: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    betas: tuple[float, float] = (0.9, 0.95)
    lr: WarmupCosine = WarmupCosine(peak=1e-3)
    model: Model = Model()


def test_nothing_changes_nothing():
    assert merge(Run()) == Run()


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("steps=7", {"steps": 7}),
        ("fast=false", {"fast": False}),
        ("precision=bf16", {"precision": "bf16"}),
        ("betas=[0.8,0.99]", {"betas": (0.8, 0.99)}),
        ("lr.peak=2e-4", {"lr": WarmupCosine(peak=2e-4)}),
        ("model.vision.depth=12", {"model": Model(vision=Vision(depth=12))}),
        ("model.vision={depth: 3, base: 100}", {"model": Model(vision=Vision(depth=3, base=100.0))}),
        ("data=null", {"data": None}),
        ("data=/x/{000..013}.tar", {"data": "/x/{000..013}.tar"}),
        ("data=pipe:cat a=b.tar", {"data": "pipe:cat a=b.tar"}),
        ("data=0001", {"data": "0001"}),
        ("data=note: this", {"data": "note: this"}),
        ("data=*.tar", {"data": "*.tar"}),
        ("data=~/set", {"data": "~/set"}),
        ("name=1e3", {"name": "1e3"}),
        ("name=true", {"name": "true"}),
    ],
)
def test_a_word_changes_one_field(word, changed):
    assert merge(Run(data="before"), [word]) == replace(Run(data="before"), **changed)


def test_file_over_default_and_words_over_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 20\nmodel:\n  patch: 8\nlr:\n  peak: 1e-2\n")
    assert merge(Run(), ["steps=30"], file) == Run(steps=30, model=Model(patch=8), lr=WarmupCosine(peak=1e-2))


def test_later_words_win():
    assert merge(Run(), ["steps=2", "steps=3"]).steps == 3


def test_saved_configuration_loads_as_itself(tmp_path):
    config = merge(Run(), ["betas=[0.5,0.6]", "model.vision.base=10", "name=on", "data='2024'"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml", Run()) == config
    assert list(load(tmp_path / "config.yaml", Run()).__dataclass_fields__) == list(Run.__dataclass_fields__)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepps=5", "unknown key 'stepps'; did you mean 'steps'?"),
        ("depth=5", "unknown key 'depth'; did you mean 'model.vision.depth'?"),
        ("model.vision.dept=5", "unknown key 'model.vision.dept'; did you mean 'model.vision.depth'?"),
        ("modle.patch=5", "unknown key 'modle.patch'; did you mean 'model.patch'?"),
        ("model.vision.dep=5", "unknown key 'model.vision.dep'; did you mean 'model.vision.depth'?"),
        ("zzz=5", "unknown key 'zzz'; the keys are steps, data, name, fast, precision, betas, lr, model"),
        ("model.zzz=5", "unknown key 'model.zzz'; the keys are model.vision, model.patch"),
        ("model.zzz.yyy.xxx=5", "unknown key 'model.zzz.yyy.xxx'; the keys are model.vision, model.patch"),
        ("steps=many", "steps=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("steps=1.5", "steps=1.5: .*Integer"),
        ("steps=null", "steps=null: a value of type int is missing"),
        ("precision=yes", "precision=yes: Invalid value 'yes', expected one of .*fp32.*bf16"),
        ("steps.x=3", "steps.x=3: .*Integer"),
        ("precision=fp8", "precision=fp8: .*fp32.*bf16"),
        ("fast=perhaps", "fast=perhaps: .*bool"),
        ("betas=[0.9]", r"betas=\[0.9\]: 2 values belong here, not 1"),
        ("betas=[a,b]", r"betas=\[a,b\]: a value could not be converted to Float"),
        ("betas=0.9", r"betas=0.9: a list belongs here, such as \[0.5, 1.0\]"),
        ("betas.0=0.9", "betas.0=0.9: "),
        ("model=3", "model=3: model is no value but a group of keys; give model.vision, model.patch"),
        (
            "model.vision=null",
            "model.vision is no value but a group of keys; give model.vision.depth, model.vision.base",
        ),
        ("model.vision.depth=0", "model.vision: depth must be at least 1, not 0"),
        ("lr.warmup=2", "lr: warmup is a share of the run"),
        ("data=[unclosed", r"data=\[unclosed: the value is not valid YAML"),
        ("data=*${", r"data=\*\${: the value is not valid YAML"),
        ("data=*\0", "the value is not valid YAML"),
        ("data=${nowhere}", "nowhere"),
        ("steps", "'steps' is not an override; write key=value"),
        ("train.steps=5", "unknown key 'train.steps'; did you mean 'steps'?"),
        ("--steps=5", "'--steps=5' is not an override"),
        ("=5", "'=5' is not an override"),
    ],
)
def test_a_bad_word_is_one_clear_line(word, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as error:
        merge(Run(), [word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 5", "unknown key 'stepps'; did you mean 'steps'"),
        ("model: 5", "model is no value but a group of keys; give model.vision, model.patch"),
        ("steps: many", "Value 'many' of type 'str'"),
        ("- 1\n- 2", "must hold key: value pairs"),
        ("steps: [1", "is not valid YAML"),
        ("steps: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        merge(Run(), file=file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at .*absent.yaml"):
        load(tmp_path / "absent.yaml", Run())


def test_differences_are_leaves_with_both_values():
    old = Run()
    new = Run(steps=11, model=Model(vision=Vision(depth=5)), betas=(0.9, 0.99))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "betas: (0.9, 0.95) -> (0.9, 0.99)",
        "model.vision.depth: 4 -> 5",
        "steps: 10 -> 11",
    ]
    assert differences(old, new, ignore=["steps", "betas"]) == ["model.vision.depth: 4 -> 5"]
    assert differences(old, new, ignore=["steps", "betas", "model"]) == []
