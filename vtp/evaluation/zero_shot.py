"""Zero-shot classification: a class is what texts say of it (Radford et al. 2021, Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vtp.config import ConfigError

Labelled = Iterable[tuple[Tensor, Tensor]]  # (images [b 3 h w], labels [b])


@torch.no_grad()
def text_classifier(
    embed_text: Callable[[list[str]], Float[Tensor, "n d"]],
    classes: Sequence[str | Sequence[str]],
    templates: Sequence[str],
) -> Float[Tensor, "d classes"]:
    """Unit columns: a class's prompts are embedded, normalised, averaged and normalised again (the published protocol).

    Args:
        embed_text: sentences -> embeddings of any length.
        classes: each class's name, or several names that all go into the prompts.
        templates: prompts with one {} for the class's name.

    Raises:
        ConfigError: no template, or one without {}.
    """
    broken = [t for t in templates if t.count("{}") != 1]
    if broken or not templates:
        raise ConfigError(f"prompt templates need exactly one {{}} each; {broken[:1] or 'there are none'}")
    columns = []
    for name in classes:
        names = [name] if isinstance(name, str) else name
        prompts = F.normalize(embed_text([t.replace("{}", n) for t in templates for n in names]).float(), dim=-1)
        columns.append(F.normalize(prompts.mean(0), dim=0))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def rank_classes(
    embed_image: Callable[[Tensor], Float[Tensor, "b d"]], classifier: Float[Tensor, "d classes"], data: Labelled
) -> tuple[Int[Tensor, "n 5"] | Int[Tensor, "n classes"], Int[Tensor, " n"]]:
    """The five likeliest classes of every image (all, where there are fewer), best first, and its label."""
    ranks, labels = [], []
    for images, label in data:
        logits = embed_image(images).float() @ classifier
        ranks.append(logits.topk(min(5, logits.shape[1])).indices.cpu())
        labels.append(label)
    if not labels:
        raise ConfigError("the data has no image with that label")
    return torch.cat(ranks), torch.cat(labels)


def accuracies(ranks: Int[Tensor, "n k"], labels: Int[Tensor, " n"], classes: int) -> dict[str, float]:
    """Shares in 0..1: top1, top5 (where there are more than five classes), mean_top1 over classes, and chance."""
    hit = ranks == labels[:, None]
    seen = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels[hit[:, 0]], minlength=classes)
    top5 = {"top5": hit.any(1).float().mean().item()} if classes > 5 else {}
    return {
        "top1": hit[:, 0].float().mean().item(),
        **top5,
        "mean_top1": (right[seen > 0] / seen[seen > 0]).mean().item(),
        "chance": 1 / classes,
    }


def zero_shot(
    embed_image: Callable[[Tensor], Float[Tensor, "b d"]], classifier: Float[Tensor, "d classes"], data: Labelled
) -> dict[str, float]:
    """`accuracies` of images classified by their nearest text; the lengths of image embeddings do not matter."""
    return accuracies(*rank_classes(embed_image, classifier, data), classifier.shape[1])
