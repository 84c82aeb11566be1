"""The judge: learns the embedded set, the same way every time, and survives the disk."""

import pytest
import torch

from vtp.config import ConfigError
from vtp.data.sources import open_source
from vtp.evaluation.judge import (
    answers,
    judge_accuracy,
    judge_extractor,
    labelled_pictures,
    load_judge,
    save_judge,
    train_judge,
)


@pytest.fixture(scope="module")
def judge():
    return train_judge(
        open_source("scenes"), ("shape", "colour"), size=16, images=512, epochs=6, batch_size=32, width=8
    )


def test_judge_learns_colours_in_a_second(judge):
    accuracy = judge_accuracy(judge, open_source("scenes:test"), 300)
    assert accuracy["colour"] > 0.6 and accuracy["shape"] > 1 / 8


def test_training_is_a_function_of_the_seed(judge):
    def weights(seed):
        small = train_judge(open_source("scenes"), ("shape",), size=16, images=64, epochs=1, width=4, seed=seed)
        return torch.cat([p.flatten() for p in small.parameters()])

    torch.manual_seed(5)
    first = weights(0)
    torch.manual_seed(6)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_saved_judge_is_the_same_judge(judge, tmp_path):
    save_judge(judge, tmp_path)
    pictures, _ = labelled_pictures(open_source("scenes:test"), ("shape",), 32, 8)
    for label, guess in answers(load_judge(tmp_path), pictures).items():
        assert torch.equal(guess, answers(judge, pictures)[label])
    extractor = judge_extractor(tmp_path)
    assert extractor.figure == "fd_judge" and "shape, colour at 16 px" in extractor.protocol
    assert extractor.features(pictures).shape == (8, 32)


def test_a_picture_without_a_label_teaches_nothing_about_it():
    _, targets = labelled_pictures(open_source("scenes"), ("letter", "shape"), 16, 50)
    assert ((targets[:, 0] >= 0) != (targets[:, 1] >= 0)).all()
    alone = train_judge(open_source("scenes"), ("letter", "shape"), size=16, images=8, epochs=1, batch_size=1, width=4)
    assert all(p.isfinite().all() for p in alone.parameters())


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no label 'breed'"):
        train_judge(open_source("scenes"), ("breed",))
    with pytest.raises(ConfigError, match="no judge in"):
        load_judge(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for other in ('{"hidden_size": 8}', "{", "[]"):
        (tmp_path / "config.json").write_text(other)
        with pytest.raises(ConfigError, match="holds no judge, or a damaged one"):
            load_judge(tmp_path)
