"""What frozen features know: logistic regression on them, and their nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vtp.config import ConfigError
from vtp.evaluation.zero_shot import accuracies

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strongest first: each fit starts where the one before ended


class Features(NamedTuple):
    """Frozen features of a set, and its labels."""

    x: Float[Tensor, "n d"]
    y: Int[Tensor, " n"]


@torch.no_grad()
def extract(embed: Callable[[Tensor], Float[Tensor, "b d"]], data: Iterable[tuple[Tensor, Tensor]]) -> Features:
    """Features of all images, float32, on the device where they were made."""
    pairs = [(embed(images).float(), labels) for images, labels in data]
    if not pairs:
        raise ConfigError("the data has no image with that label")
    x = torch.cat([x for x, _ in pairs])
    return Features(x, torch.cat([y for _, y in pairs]).to(x.device))


def linear_probe(train: Features, test: Features, classes: int, seed: int = 0) -> dict[str, float]:
    """Multinomial logistic regression on standardised features, L2-penalised, fitted to the end by L-BFGS.

        min_W,b  mean CE(W x + b, y) + penalty / 2 |W|^2

    The penalty is the one of `PENALTIES` that does best on a tenth of the training images, held out at random; then all
    training images are fitted with it. Test images choose nothing.

    Returns:
        `accuracies` on the test images; `held_out_accuracy` and `penalty` of the choice.

    Raises:
        ConfigError: fewer than ten training images.
    """
    n = len(train.x)
    if n < 10:
        raise ConfigError(f"a linear probe needs at least ten training images, not {n}")
    mean, std = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    x, x_test = (train.x - mean) / std, (test.x - mean) / std
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, kept = order[: n // 10], order[n // 10 :]
    weights = x.new_zeros(x.shape[1] + 1, classes)
    best, penalty = -1.0, PENALTIES[0]
    for candidate in PENALTIES:
        weights = _fit(x[kept], train.y[kept], candidate, weights)
        accuracy = (_logits(x[held], weights).argmax(1) == train.y[held]).float().mean().item()
        if accuracy > best:  # of equals the stronger penalty
            best, penalty = accuracy, candidate
    weights = _fit(x, train.y, penalty, torch.zeros_like(weights))
    ranks = _logits(x_test, weights).topk(min(5, classes)).indices
    return {**accuracies(ranks, test.y, classes), "held_out_accuracy": best, "penalty": penalty}


def _fit(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n"], penalty: float, start: Float[Tensor, "d1 classes"]
) -> Float[Tensor, "d1 classes"]:
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(x, weights), y) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _logits(x: Float[Tensor, "n d"], weights: Float[Tensor, "d1 classes"]) -> Float[Tensor, "n classes"]:
    return x @ weights[:-1] + weights[-1]


def knn(train: Features, test: Features, classes: int, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """Weighted nearest neighbours among training images (Wu et al. 2018, Sec. 3.4; k and temperature as in DINO).

    The k most similar ones by cosine vote for their classes with exp(similarity / temperature).

    Raises:
        ConfigError: fewer training images than k.
    """
    if len(train.x) < k:
        raise ConfigError(f"k-NN with k={k} needs at least as many training images, not {len(train.x)}")
    bank = F.normalize(train.x, dim=-1)
    ranks = []
    for queries in F.normalize(test.x, dim=-1).split(1024):
        similarity, nearest = (queries @ bank.T).topk(k)
        votes = queries.new_zeros(len(queries), classes)
        votes.scatter_add_(1, train.y[nearest], (similarity / temperature).exp())
        ranks.append(votes.topk(min(5, classes)).indices)
    return accuracies(torch.cat(ranks), test.y, classes)
