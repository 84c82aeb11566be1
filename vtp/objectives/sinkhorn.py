"""The teacher's side of self-distillation: logits to balanced probabilities, and whether they have collapsed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vtp import dist
from vtp.objectives.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn_knopp(logits: Float[Tensor, "m k"], temp: float, iterations: int = 3) -> Float[Tensor, "m k"]:
    """Probabilities that use all prototypes equally over the batch (Caron et al. 2020, Sec. 3.1; Cuturi 2013).

        Q = exp(z / temp);  repeat: Q <- Q / (column sums over all rows of all ranks),  Q <- Q / (row sums)

    Each row sums to one; each column nearly to rows / k. Works on logarithms, so that no temperature or logit
    overflows. Ranks may hold different numbers of rows.
    """
    log_q = logits / temp
    for _ in range(iterations):
        log_q -= logsumexp_over_ranks(log_q.logsumexp(0))
        log_q -= log_q.logsumexp(1, keepdim=True)
    return log_q.exp_()


def logsumexp_over_ranks(of_rows: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """log sum exp over the ranks of their own rows' log sum exp; float64 where only k numbers are at stake."""
    local = of_rows.double()
    largest = dist.gather(local.amax()[None]).amax()
    total = dist.sum_((local - largest).exp()).clamp_min(torch.finfo(torch.float64).tiny)  # e^-708: no column is lost
    return (total.log() + largest).to(of_rows.dtype)


@torch.no_grad()
@full_precision
def centered_softmax(logits: Float[Tensor, "m k"], center: Float[Tensor, " k"], temp: float) -> Float[Tensor, "m k"]:
    """softmax((z - c) / temp): centring and sharpening (Caron et al. 2021, Sec. 3.1)."""
    return ((logits - center) / temp).softmax(-1)


@torch.no_grad()
@full_precision
def update_center(center: Float[Tensor, " k"], logits: Float[Tensor, "m k"], momentum: float) -> Float[Tensor, " k"]:
    """The new centre c <- momentum c + (1 - momentum) mean z over the rows of all ranks (Caron et al. 2021, Eq. 4)."""
    total, rows = dist.sum_(logits.sum(0)), dist.sum_(logits.new_full((), len(logits)))
    return center.lerp(total / rows, 1 - momentum)


@torch.no_grad()
@full_precision
def entropies(probs: Float[Tensor, "m k"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(entropy of the mean prediction, mean entropy of single predictions) over the rows of all ranks, in nats.

    A teacher that gives every image the same sharp answer has both near 0; one that answers nothing has both near
    ln k; a healthy one has the first near ln k and the second well below it. Every rank must call this.
    """
    return entropies_of_sums(len(probs), probs.sum(0), torch.special.entr(probs).sum())


@torch.no_grad()
def entropies_of_sums(
    rows: int, probs: Float[Tensor, " k"], entropies: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`entropies` from the number of this rank's rows, the sum of their probabilities and that of their entropies."""
    everyone = dist.sum_(probs.new_full((), rows))
    mean = dist.sum_(probs) / everyone
    return torch.special.entr(mean).sum(), dist.sum_(entropies) / everyone
