"""The results file holds what a figure needs to be believed."""

import hashlib
import json

import pytest
import torch

from vtp.config import ConfigError
from vtp.evaluation.results import Seen, write_result
from vtp.images import normalise


def test_result_file(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    out = tmp_path / "eval" / "knn.json"
    result = write_result(
        out, task="knn", metrics={"top1": 0.5}, protocol={"k": 20}, weights=weights, data_sha256="d", seed=3
    )
    assert json.loads(out.read_text()) == result
    assert result["model_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert set(result) == {
        *("task", "metrics", "protocol", "model_sha256", "data_sha256", "seed", "command", "versions"),
    }
    assert {"python", "torch", "vtp"} <= set(result["versions"])
    assert [p.name for p in out.parent.iterdir()] == ["knn.json"]


def test_a_figure_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="psnr is nan"):
        write_result(
            tmp_path / "r.json", task="t", metrics={"psnr": float("nan")}, protocol={}, weights=None, data_sha256=""
        )
    assert not (tmp_path / "r.json").exists()


def test_what_was_seen_has_one_hash_whatever_the_batches():
    images, labels = normalise(torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)), torch.arange(6)

    def digest(size, images=images, labels=labels):
        seen = Seen()
        for _ in seen.passing(zip(images.split(size), labels.split(size), strict=True)):
            pass
        assert seen.count == 6
        return seen.sha256

    assert digest(6) == digest(4) == digest(1)
    assert digest(6) != digest(6, labels=labels.flip(0))
    assert digest(6) != digest(6, images=images.flip(0))
