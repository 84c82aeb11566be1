"""What stands beside the weights of a published tokenizer: latent statistics, results, and a card made of them.

A figure belongs to one set of weights, named by its SHA-256. What is about other weights is refused where it was asked
for, and passed over where it merely lies there.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from vtp.config import ConfigError
from vtp.files import file_sha256
from vtp.models.card import MARK, model_card, naming_parts
from vtp.models.latent_stats import LATENT_STATS, ChannelStats, read_stats, write_stats

if TYPE_CHECKING:
    from vtp.models.vtp_hf import VTPConfig, VTPModel

log = logging.getLogger(__name__)
WEIGHTS, RESULTS, CARD = "model.safetensors", "eval", "README.md"


def open_tokenizer(folder: Path, **changed: Any) -> VTPModel:
    """The tokenizer of a published folder, in evaluation mode and float32, with all of its weights.

    Args:
        changed: keys of the configuration that are other here than in the file.

    Raises:
        ConfigError: no tokenizer there, or one that is not whole; see `check_tokenizer`.
    """
    from vtp.models.vtp_hf import VTPModel

    check_tokenizer(folder)
    with reading(folder):
        return VTPModel.from_pretrained(folder, **changed)


def check_tokenizer(folder: Path) -> VTPConfig:
    """The configuration of a published folder whose weights are those of its network, by the head of their file.

    Raises:
        ConfigError: no tokenizer there, a configuration that no network can be built from, a file that is cut short or
            no safetensors file, or a weight that is missing, unknown or of another shape.
    """
    from vtp.models.vtp_hf import VTPModel

    weights, config = tokenizer_weights(folder), read_config(folder)
    with reading(folder), torch.device("meta"), safe_open(weights, "pt") as file:
        expected = {name: list(tensor.shape) for name, tensor in VTPModel(config).state_dict().items()}
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    refuse_other_weights(weights, expected.keys() - found.keys(), found.keys() - expected.keys())
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConfigError(f"{weights}: '{name}' is {found[name]}, in the network of its config.json {shape}")
    return config


def read_config(folder: Path) -> VTPConfig:
    """The configuration of a published folder.

    Raises:
        ConfigError: config.json is no JSON, is not about a tokenizer, or says what no network can be built from.
    """
    from vtp.models.vtp_hf import VTPConfig

    with reading(folder):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "vtp")
        if kind != "vtp":
            raise ConfigError(f"{folder / 'config.json'} is about a {kind}, not about a vtp")
        config = VTPConfig.from_pretrained(folder)
        config.model_config()
    return config


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever the libraries that read a model folder make of broken files is one ConfigError that names the folder."""
    try:
        yield
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{folder} cannot be read: {reason[0]}") from error


def refuse_other_weights(where: Path, missing: Iterable[str], unknown: Iterable[str] = ()) -> None:
    """Raise ConfigError, naming the first, for weights that a network lacks or does not have."""
    for names, what in ((missing, "is missing"), (unknown, "is no part of the network of its config.json")):
        first, *others = sorted(names) or [""]
        if first:
            more = f" (and so with {len(others)} more)" if others else ""
            raise ConfigError(
                f"{where}: '{first}' {what}{more}; the folder must hold the weights and configuration of one model"
            )


def published_stats(folder: Path) -> ChannelStats | None:
    """The latent statistics of a published folder; None where it has none.

    Raises:
        ConfigError: no such tokenizer, or the statistics are of other weights than lie beside them.
    """
    sha256, file = _sha256(folder), folder / LATENT_STATS
    if not file.is_file():
        return None
    stats = read_stats(file)
    if stats.tokenizer_sha256 != sha256:
        raise ConfigError(f"{file} is of other weights than {folder / WEIGHTS}; make it anew with `vtp latents`")
    return stats


def add_evidence(folder: Path, stats: Path | None = None, results: Sequence[Path] = ()) -> None:
    """Put statistics and results into a published folder, where `write_card` finds them.

    Args:
        folder: a published tokenizer.
        stats: a folder of latents, or a file that `read_stats` reads. One that does not say whose latents they are is
            taken at its word.
        results: results files of `vtp eval`.

    Raises:
        ConfigError: no such tokenizer or file, a tokenizer that is not whole, or it is about other weights.
    """
    config, sha256 = check_tokenizer(folder), _sha256(folder)
    if stats is not None:
        found = read_stats(stats / "stats.json" if stats.is_dir() else stats)
        channels = config.model_config().vision.latent_dim
        if len(found.mean) != channels:
            raise ConfigError(f"{stats} is of {len(found.mean)} channels; the latents of {folder} have {channels}")
        if found.tokenizer_sha256 not in (None, sha256):
            raise ConfigError(
                f"{stats} is of another tokenizer's latents than {folder}'s; make them with `vtp latents`"
            )
        write_stats(folder, replace(found, tokenizer_sha256=sha256))
    for file in results:
        if not file.is_file() or _result(file, sha256) is None:
            raise ConfigError(f"{file} is no result about {folder}; `vtp eval TASK {folder} --out {file}` makes one")
        _copy(file, folder / RESULTS)


def write_card(
    folder: Path, *, name: str | None = None, license: str | None = None, origin: Path | None = None
) -> Path:
    """Write README.md into a published folder, of what is known about its weights.

    Statistics and results about these very weights are taken along into the folder, from the run that it lies in
    (RUN/eval) and from `origin`. A README without the mark of a generated one is left as it is.

    Args:
        name: what the example in the card loads: a repository, or (None) the folder.
        license: its identifier on the Hub; None keeps the one in the card that is there.
        origin: a published folder which the weights may have come from.

    Returns:
        The file.

    Raises:
        ConfigError: no such tokenizer.
    """
    sha256, card, there = _sha256(folder), folder / CARD, ""
    for place in (folder,) if origin is None else (origin, folder):
        for file in (*place.parent.glob(f"{RESULTS}/*.json"), *place.glob(f"{RESULTS}/*.json")):
            if _result(file, sha256) is not None:
                _copy(file, folder / RESULTS)
        stats = place / LATENT_STATS
        if stats.is_file() and read_stats(stats).tokenizer_sha256 == sha256:
            _copy(stats, folder)
        there = (place / CARD).read_text(encoding="utf-8") if (place / CARD).is_file() else there
    if card.is_file() and MARK not in there:
        return card
    if license is None and (found := re.search(r"^license: (.+)$", there, re.MULTILINE)):
        license = found.group(1)
    results = [_result(file, sha256) for file in sorted(folder.glob(f"{RESULTS}/*.json"))]
    stats = folder / LATENT_STATS
    saved = json.loads(stats.read_text()) if stats.is_file() else {}
    if saved and saved.get("tokenizer_sha256") != sha256:
        log.warning("%s is of other weights than %s: left out of the card", stats, folder / WEIGHTS)
    text = model_card(
        folder.as_posix() if name is None else name,
        read_config(folder).to_dict(),  # the published default of a key that the file leaves out
        _parameters(folder / WEIGHTS),
        sha256,
        stats=saved if saved.get("tokenizer_sha256") == sha256 else None,
        results=[result for result in results if result is not None],
        license=license,
        title=naming_parts(folder)[-1] if name is None else None,
    )
    card.write_text(text, encoding="utf-8")
    return card


def upload(folder: Path, repo_id: str, *, private: bool | None = None, token: Any = None, **commit: Any) -> Any:
    """Send a published folder to a repository on the Hub, made where there is none.

    Args:
        private: of a new repository; None is the Hub's default.
        token: as huggingface_hub takes it; None is the one of `hf auth login`.
        commit: commit_message, commit_description, revision, create_pr, as huggingface_hub's upload_folder takes them.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        ConfigError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)
    except TypeError:  # an argument that upload_folder does not have
        raise
    except Exception as error:  # the errors of its HTTP library are not part of the Hub's interface
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"could not push to {repo_id}: {reason[0] if reason else type(error).__name__}; the Hub must be reachable "
            "(HF_HUB_OFFLINE unset) and `hf auth login` done for a token that may write there"
        ) from error


def tokenizer_weights(folder: Path) -> Path:
    """The weights of a published tokenizer.

    Raises:
        ConfigError: the folder is none.
    """
    weights = folder / WEIGHTS
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise ConfigError(f"no tokenizer in {folder}: {where_instead(folder, f'config.json and {WEIGHTS}')}")
    return weights


def where_instead(folder: Path, wanted: str) -> str:
    """The end of a message about a folder that is no tokenizer: the one inside a run or a pipeline, or what is wanted.

    Args:
        wanted: what the folder should hold.
    """
    inner = [folder / name for name in ("tokenizer", "vae") if (folder / name / "config.json").is_file()]
    return f"did you mean {inner[0]}?" if inner else f"it should hold {wanted}"


def _sha256(folder: Path) -> str:
    return file_sha256(tokenizer_weights(folder))


def _parameters(weights: Path) -> dict[str, int]:
    """Parameters by part, from the head of the file."""
    counts = {"trunk": 0, "pixel_decoder": 0, "text": 0}
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if not key.endswith("rope_embed.periods"):  # a buffer
                part = key.partition(".")[0]
                counts[part if part in counts else "text"] += math.prod(file.get_slice(key).get_shape())
    return {part: count for part, count in counts.items() if count > 0}


def _result(file: Path, sha256: str) -> dict[str, Any] | None:
    """A results file about these weights, or about pictures drawn on their latents; None for anything else."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        about = (result["model_sha256"], result["protocol"].get("tokenizer_sha256"))
        complete = {"task", "metrics", "seed"} <= result.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if complete and sha256 in about else None


def _copy(file: Path, folder: Path) -> None:
    if file.parent != folder:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
