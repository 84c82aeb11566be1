"""`vtp eval`: open a published tokenizer and data, ask one question, write one results file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vtp.config import ConfigError, within
from vtp.data.passes import class_names, image_batches, labelled_batches
from vtp.data.samples import CLASS_TEMPLATES, Source, in_vain
from vtp.data.sources import open_source
from vtp.engine.optim import Asked, inference, pick_device, pick_precision
from vtp.evaluation import generation as generated
from vtp.evaluation import probes
from vtp.evaluation import reconstruction as reconstructed
from vtp.evaluation import zero_shot as zero
from vtp.evaluation.judge import answers, judge_extractor, load_judge
from vtp.evaluation.results import Seen, write_result
from vtp.files import file_sha256, path_of
from vtp.images import center_crop, to_uint8
from vtp.metrics.extractors import Extractor, load_extractor
from vtp.models.published import open_tokenizer, tokenizer_weights

FEATURES = {
    "cls": "class token after the final norm",
    "patches": "mean of the patch tokens after the final norm",
    "both": "class token and mean of the patch tokens after the final norm, as DINO probes them",
    "latent": "mean of the latent map (bottleneck)",
}
METHODS = {
    "linear": "logistic regression, L2 chosen on a tenth of the training images, L-BFGS",
    "knn": "20 nearest by cosine, weighted, temperature 0.07",
}
SCENES_TRAIN = 10_000  # the embedded training set has no end in practice; a probe on it sees this many images


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What all evaluations share."""

    annotations: str | None = None  # a jsonl beside the data: captions and labels by key
    size: int | None = None  # side of the images in pixels; None is the tokenizer's own
    limit: int | None = None  # test images at most; None is all
    batch_size: int = 64
    device: str = "auto"
    precision: Asked = "fp32"
    seed: int = 0
    out: Path | None = None  # results JSON

    def __post_init__(self) -> None:
        within(self, "batch_size limit size", 1)
        within(self, "seed", 0)


class Opened:
    """A published tokenizer on a device, as callables from images to what is judged."""

    def __init__(self, folder: Path, cfg: EvalConfig) -> None:
        self.weights = tokenizer_weights(folder)
        self.device = pick_device(cfg.device)
        self.precision = pick_precision(cfg.precision, self.device)
        model: Any = open_tokenizer(folder)
        self.model = model.to(self.device)
        self.size = self.model.config.image_size if cfg.size is None else cfg.size
        patch = self.model.config.vision_patch_size
        if self.size % patch:
            raise ConfigError(f"size={self.size} is not a multiple of the tokenizer's patch size {patch}")
        self.protocol = {"size": self.size, "precision": self.precision}

    def needs(self, key: str, task: str) -> None:
        """Refuse a tokenizer that was trained without what the task asks for."""
        if not getattr(self.model.config, key):
            raise ConfigError(f"{task} needs a tokenizer with {key}=true; this one was trained without")

    def run(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function` of images, for evaluation on the device."""
        return inference(function, self.device, self.precision)

    def features(self, name: str) -> Callable[[Tensor], Tensor]:
        """Images -> frozen features [b d], as `FEATURES` says."""
        if name not in FEATURES:
            raise ConfigError(f"features={name}: choose {', '.join(FEATURES)}")
        trunk = self.model.trunk

        def pooled(images: Tensor) -> Tensor:
            tokens = trunk(images)
            if name == "cls":
                return tokens.cls
            if name == "both":
                return torch.cat([tokens.cls, tokens.patches.mean(1)], dim=1)
            return (tokens.patches if name == "patches" else trunk.bottleneck(tokens.patches)).mean(1)

        return self.run(pooled)

    def there_and_back(self) -> Callable[[Tensor], Tensor]:
        """Images -> the same after encoding and decoding."""
        self.needs("train_reconstruction", "reconstruction")
        model = self.model
        return self.run(lambda x: model.get_latents_decoded_images(model.get_reconstruction_latents(x).float()))

    def text(self) -> Callable[[list[str]], Float[Tensor, "n d"]]:
        """Sentences -> embeddings, cut to the longest of them."""
        from vtp.tokenizers import get_tokenizer

        tokenizer = get_tokenizer("ViT-B-32", context_length=self.model.config.text_context_length)
        embed = self.run(self.model.get_clip_text_feature)

        def call(sentences: list[str]) -> Tensor:
            tokens = tokenizer(sentences)
            return embed(tokens[:, : int((tokens != 0).sum(1).max())])

        return call


def zero_shot(
    tokenizer: Path,
    data: str,
    *,
    label: str = "class",
    templates: str | Sequence[str] | None = None,
    names: Path | None = None,
    top: int | None = None,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Classify the images of `data` by text; images are squashed to the tokenizer's size, as published.

    Args:
        tokenizer: a published folder.
        label: which of the data's labels.
        templates: "openai" (the 80 of CLIP), "data" (those of the data set), a file (a line each, or a JSON list), or
            the templates themselves. None is the data set's own where it brings some, else openai.
        names: a JSON file {class: word or [words]}: what captions call the classes that go by another name in the data.
        top: only the commonest classes, and only their images.

    Returns:
        The results object; metrics top1, top5, mean_top1, chance.

    Raises:
        ConfigError: no such data, label or template file; a tokenizer without a text tower.
    """
    opened, source = Opened(tokenizer, cfg), open_source(data, cfg.annotations)
    opened.needs("train_clip", "zero-shot")
    classes = class_names(source, label, top)
    prompts, origin = _templates(source, label, templates)
    classifier = zero.text_classifier(opened.text(), _renamed(classes, names, source.classes[label]), prompts)
    seen = Seen()
    source.report.clear()
    batches = labelled_batches(source, label, opened.size, cfg.batch_size, top, limit=cfg.limit)
    metrics = zero.zero_shot(opened.run(opened.model.get_clip_image_feature), classifier, seen.passing(batches))
    protocol = {"label": label, "classes": len(classes), "images": seen.count, "templates": f"{len(prompts)} {origin}"}
    if names is not None:
        protocol["names"] = names.name
    protocol |= _left_out(source)
    return _written("zero-shot", metrics, {"data": data, **protocol, "resize": "squash"}, opened, seen.sha256, cfg)


def probe(
    method: Literal["linear", "knn"],
    tokenizer: Path,
    train_data: str,
    data: str,
    *,
    label: str = "class",
    features: str = "cls",
    top: int | None = None,
    train_limit: int | None = None,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Classify by frozen features: fitted on `train_data`, asked on `data`; see `probes.linear_probe` and `probes.knn`.

    Args:
        features: "cls", "patches", "both" or "latent", see `FEATURES`.
        train_limit: training images at most; None is all, of the embedded set 10,000.

    Returns:
        The results object; metrics top1, top5, mean_top1, chance, and of a linear probe held_out_accuracy, penalty.

    Raises:
        ConfigError: the same data for both, or classes that differ between them.
    """
    if train_data == data:
        raise ConfigError(f"{method}: training and test data are both {data}; ask a probe what it has not seen")
    opened = Opened(tokenizer, cfg)
    train, test = (open_source(d, cfg.annotations) for d in (train_data, data))
    names = class_names(train, label, top)
    if names != class_names(test, label, top):
        raise ConfigError(f"{method}: '{label}' has other classes in {train_data} than in {data}; annotate both alike")
    if train_limit is None and train.name == "scenes":
        train_limit = SCENES_TRAIN
    embed, seen_train, seen = opened.features(features), Seen(), Seen()

    def extracted(source: Source, by: Seen, limit: int | None) -> probes.Features:
        source.report.clear()
        batches = labelled_batches(source, label, opened.size, cfg.batch_size, top, limit=limit)
        return probes.extract(embed, by.passing(batches))

    known, asked = extracted(train, seen_train, train_limit), extracted(test, seen, cfg.limit)
    shared = len(seen.each & seen_train.each)
    if shared == len(seen.each):  # the same data by another name
        raise ConfigError(f"{method}: every picture of {data} is in {train_data} as well; ask what it has not seen")
    if method == "linear":
        metrics = probes.linear_probe(known, asked, len(names), cfg.seed)
    else:
        metrics = probes.knn(known, asked, len(names))
    protocol = {
        "train_data": train_data,
        "data": data,
        "label": label,
        "features": f"{features}: {FEATURES[features]}, {known.x.shape[1]} numbers",
        "method": METHODS[method],
        "classes": len(names),
        "train_images": seen_train.count,
        "images": seen.count,
        "resize": "squash",
        **({"in_training_as_well": shared} if shared else {}),
        "train_data_sha256": seen_train.sha256,
        **{f"train_{key}": value for key, value in _left_out(train).items()},
        **_left_out(test),
    }
    return _written(method, metrics, protocol, opened, seen.sha256, cfg)


def reconstruction(
    tokenizer: Path,
    data: str,
    *,
    extractor: str | None = None,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Encode and decode the images of `data`, centre-cropped as published.

    Args:
        extractor: "inception[:FILE]" for rfid, "squeezenet:FILE", "judge:FOLDER", or None for pixels only.

    Returns:
        The results object; metrics psnr, ssim and the r-distance that the extractor names.

    Raises:
        ConfigError: a tokenizer without a decoder, or an extractor that cannot be had.
    """
    opened, source = Opened(tokenizer, cfg), open_source(data, cfg.annotations)
    network = None if extractor is None else open_extractor(extractor, opened.device)
    seen = Seen()
    source.report.clear()
    batches = image_batches(source, opened.size, cfg.batch_size, center_crop, cfg.limit)
    metrics = reconstructed.reconstruction(opened.there_and_back(), seen.passing(batches), network)
    protocol = {"data": data, "images": seen.count, "resize": "centre crop"} | _left_out(source)
    return _written("reconstruction", metrics, protocol | _named(network), opened, seen.sha256, cfg)


def generation(
    images: Path,
    reference: str,
    *,
    extractor: str,
    judge: Path | None = None,
    label: str | None = None,
    real: str | None = None,
    tokenizer: Path | None = None,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Measure a folder of pictures against the pictures of `reference`, centre-cropped to their size.

    A Frechet distance depends on how many pictures it is taken of, and samples cannot be better than the decoder that
    draws them. So with `real` the same is measured of other real pictures, as many as there are samples ("real."), and
    of these encoded and decoded ("reconstructed."): what is left between those and the samples, generation adds.

    Args:
        images: a folder of pictures of one size; with a samples.json, as `vtp sample` writes it, its protocol is kept.
        extractor: as in `reconstruction`; the metric is g + its figure (gfid, gfd_judge, ...).
        judge: a judge's folder: also measure class_agreement, for samples that asked for classes of `label`.
        label: compare with those pictures of the reference only that carry this label.
        real: other data than the reference.
        tokenizer: where the samples' tokenizer is now, if not where samples.json says.

    Raises:
        ConfigError: no pictures, several sizes, classes that the judge does not know, or fewer real pictures.
    """
    files = sorted(f for f in images.glob("*.png") if f.name != "grid.png")
    if not files:
        raise ConfigError(f"no pictures in {images}: it should hold 000000.png, ... as `vtp sample` writes them")
    if real == reference:
        raise ConfigError(f"real and reference are both {real}; a floor is measured on other pictures")
    device = pick_device(cfg.device)
    network = open_extractor(extractor, device)
    samples = json.loads(path.read_text()) if (path := images / "samples.json").is_file() else {}
    if samples.get("num", len(files)) != len(files):
        raise ConfigError(f"{images} holds {len(files)} of the {samples['num']} pictures; run `vtp sample` to its end")
    with Image.open(files[0]) as first:
        size = first.height
    known: tuple[str, ...] = ()
    answer, asked = None, torch.zeros(len(files), dtype=torch.long)
    if judge is not None:
        known, answer = _referee(judge, label, device)
        asked = _asked(samples, known, len(files))
    source, seen = open_source(reference, cfg.annotations), Seen()
    shown = (to_uint8(x) for x, _ in seen.passing(_labelled(source, label, size, cfg.batch_size, cfg.limit)))
    target = generated.reference_moments(shown, network)

    metrics = generated.measure(_pictures(files, asked, cfg.batch_size), target, network, answer)
    protocol = {"samples": str(images), "num": len(files), "reference": reference, "reference_images": seen.count}
    protocol |= _left_out(source) | _named(network) | {k: v for k, v in samples.items() if k != "num"}
    if label is not None:
        protocol["label"] = label
    if judge is not None:
        protocol["judge_sha256"] = file_sha256(judge / "model.safetensors")
    if real is not None:
        others = open_source(real, cfg.annotations)
        if judge is not None and class_names(others, str(label)) != known:
            raise ConfigError(f"'{label}' has other classes in {real} than the judge knows: {', '.join(known)}")
        views: dict[str, Callable[[Tensor], Tensor]] = {"real": lambda images: images}
        if tokenizer is not None or "tokenizer" in samples:
            opened = Opened(tokenizer or Path(samples["tokenizer"]), replace(cfg, size=size))
            views["reconstructed"] = opened.there_and_back()
        for name, view in views.items():
            passed = Seen()
            batches = passed.passing(_labelled(others, label, size, cfg.batch_size, len(files)))
            floor = generated.measure(((to_uint8(view(x)), y) for x, y in batches), target, network, answer)
            if passed.count < len(files):
                raise ConfigError(f"{real} has {passed.count} such pictures, fewer than {len(files)} samples")
            metrics |= {f"{name}.{metric}": value for metric, value in floor.items()}
        protocol["real"] = real
    weights = Path(samples["dit"]) / "model.safetensors" if "dit" in samples else None
    return write_result(
        cfg.out,
        task="generation",
        metrics=metrics,
        protocol=protocol,
        weights=weights if weights is not None and weights.is_file() else None,
        data_sha256=seen.sha256,
        seed=samples.get("seed", cfg.seed),
    )


def open_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """A feature network by name: "judge:FOLDER", or one that `metrics.extractors.load_extractor` knows."""
    kind, _, path = name.partition(":")
    if kind == "judge" and not path:
        raise ConfigError("extractor judge: say which, as in judge:FOLDER")
    return judge_extractor(path_of(path), device) if kind == "judge" else load_extractor(name, device)


def _templates(source: Source, label: str, asked: str | Sequence[str] | None) -> tuple[list[str], str]:
    """Prompt templates, and where they come from."""
    own = source.templates.get(label, ())
    if asked is None:
        asked = "data" if own and own != CLASS_TEMPLATES else "openai"
    if not isinstance(asked, str):
        return list(asked), "given"
    if asked == "data" and own:
        return list(own), "of the data set"
    if asked == "openai":
        return _openai_templates(), "of CLIP (openai)"
    path = path_of(asked)
    if not path.is_file():
        raise ConfigError(f"templates={asked} is no file; choose openai, data or a file of templates, one a line")
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except ValueError as error:
        raise ConfigError(f"{path} is neither text, a template a line, nor a JSON list of templates: {error}") from None
    return [line.strip() for line in lines if line.strip()], f"of {path.name}"


def _openai_templates() -> list[str]:
    """The 80 templates, from open_clip's list; the file alone, since importing the package takes seconds."""
    package = find_spec("open_clip")
    assert package is not None and package.origin is not None  # a dependency of ours
    spec = spec_from_file_location("open_clip_templates", Path(package.origin).with_name("zero_shot_metadata.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return [template("{}") for template in module.OPENAI_IMAGENET_TEMPLATES]


def _renamed(classes: Sequence[str], names: Path | None, known: Sequence[str]) -> list[str | list[str]]:
    """The words of each class: those of the file where it has some, else its name."""
    if names is None:
        return list(classes)
    try:
        words = json.loads(names.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"names={names} is not a JSON file: {error}") from None
    unknown = [name for name in words if name not in known] if isinstance(words, dict) else [str(names)]
    if unknown:
        raise ConfigError(
            f'names={names}: there is no class {unknown[0]!r}; write {{"{classes[0]}": ["word", ...], ...}}'
        )
    return [words.get(name, name) for name in classes]


def _left_out(source: Source) -> dict[str, str]:
    """What of the data could not be used, for the protocol; nothing where all of it was."""
    broken = [f"{count} {reason}" for reason, count in sorted(in_vain(source.report).items())]
    return {"left_out": ", ".join(broken)} if broken else {}


def _named(network: Extractor | None) -> dict[str, str]:
    return {} if network is None else {"extractor": network.protocol}


def _labelled(
    source: Source, label: str | None, size: int, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, classes) of those that carry the label; of all, with class 0, where there is no label."""
    if label is not None:
        yield from labelled_batches(source, label, size, batch_size, None, center_crop, limit)
        return
    for images, _ in image_batches(source, size, batch_size, center_crop, limit):
        yield images, torch.zeros(len(images), dtype=torch.long)


def _pictures(
    files: Sequence[Path], asked: Int[Tensor, " n"], batch_size: int
) -> Iterator[tuple[UInt8[Tensor, "b 3 h w"], Int[Tensor, " b"]]]:
    for first in range(0, len(files), batch_size):
        arrays = [_pixels(file) for file in files[first : first + batch_size]]
        sizes = {f"{a.shape[1]} x {a.shape[0]}" for a in arrays}
        if len(sizes) > 1:
            raise ConfigError(f"pictures of several sizes in {files[first].parent}: {', '.join(sorted(sizes))}")
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), asked[first : first + batch_size]


def _pixels(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _referee(
    judge: Path, label: str | None, device: torch.device
) -> tuple[tuple[str, ...], Callable[[Tensor], Int[Tensor, " b"]]]:
    """The classes that a judge knows of a label, and what it says of pictures."""
    referee = load_judge(judge, device)
    if label is None or label not in referee.classes:
        raise ConfigError(f"class agreement needs a label that the judge knows: {', '.join(referee.classes)}")
    return tuple(referee.classes[label]), lambda x: answers(referee, x)[label]


def _asked(samples: dict[str, Any], known: Sequence[str], n: int) -> Int[Tensor, " n"]:
    """The class each sample was asked to show: picture i shows class i modulo the classes in samples.json."""
    if "classes" not in samples:
        raise ConfigError("class agreement needs samples of classes (a samples.json with classes)")
    names = list(samples["classes"])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"the judge knows no class '{unknown[0]}'; it knows {', '.join(known)}")
    return torch.tensor([known.index(names[i % len(names)]) for i in range(n)])


def _written(
    task: str, metrics: dict[str, float], protocol: dict[str, Any], opened: Opened, data_sha256: str, cfg: EvalConfig
) -> dict[str, Any]:
    protocol = {**protocol, **opened.protocol}
    return write_result(
        cfg.out,
        task=task,
        metrics=metrics,
        protocol=protocol,
        weights=opened.weights,
        data_sha256=data_sha256,
        seed=cfg.seed,
    )
