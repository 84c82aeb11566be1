"""Zero-shot classification on embeddings whose answer is known."""

import pytest
import torch
import torch.nn.functional as F

from vtp.config import ConfigError
from vtp.evaluation.zero_shot import accuracies, rank_classes, text_classifier, zero_shot

WORDS = {"cat": 0, "dog": 1, "owl": 2, "fox": 3, "ant": 4, "bee": 5, "cow": 6}


def embed_text(sentences):
    """One direction for each animal, another for each template, of unequal lengths."""
    rows = []
    for s in sentences:
        animal = next(i for word, i in WORDS.items() if word in s)
        rows.append((3 if "photo" in s else 1) * F.one_hot(torch.tensor(animal), 9) + F.one_hot(torch.tensor(8), 9))
    return torch.stack(rows).float()


def test_classifier_normalises_each_prompt_and_their_mean():
    templates = ("a photo of a {}", "my {}")
    got = text_classifier(embed_text, ["cat", "dog"], templates)
    for i, name in enumerate(("cat", "dog")):
        prompts = [embed_text([t.format(name)])[0] for t in templates]
        mean = sum(p / p.norm() for p in prompts) / 2
        torch.testing.assert_close(got[:, i], mean / mean.norm())


def test_ranks_and_accuracies_are_counted_over_images_not_batches():
    classifier = text_classifier(embed_text, list(WORDS), ["a {}"])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    seen_as = [0, 0, 1, 1, 1, 6]  # what each image looks like
    images = torch.stack([F.one_hot(torch.tensor(i), 9).float() for i in seen_as]).view(6, 9, 1, 1)
    data = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    metrics = zero_shot(lambda x: 5 * x.flatten(1), classifier, data)
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert metrics["mean_top1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert metrics["chance"] == pytest.approx(1 / 7)
    ranks, seen = rank_classes(lambda x: x.flatten(1), classifier, data)
    assert ranks.shape == (6, 5) and seen.tolist() == labels.tolist()
    assert ranks[:, 0].tolist() == seen_as
    assert metrics["top5"] == pytest.approx((ranks == labels[:, None]).any(1).float().mean().item())


def test_few_classes_have_no_top5():
    assert "top5" not in accuracies(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 0]), 2)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"]])
def test_templates_need_one_place_for_the_class(templates):
    with pytest.raises(ConfigError, match="exactly one"):
        text_classifier(embed_text, ["cat"], templates)


def test_no_images_is_an_error():
    with pytest.raises(ConfigError, match="no image"):
        zero_shot(lambda x: x, torch.zeros(3, 2), [])
