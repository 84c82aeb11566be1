"""DINO and iBOT from embeddings and prototypes, the logits of a few rows at a time.

At 65,536 prototypes the logits of all tokens are gigabytes, and sinkhorn.py, dino.py and ibot.py hold several of their
size. Here they are made for a chunk of rows, used and dropped; the losses and gradients are the same. The teacher's
side is one formula, softmax(x . w / temp - offsets) over prototypes w, whose offsets balance or centre it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtp import dist
from vtp.objectives.dino import crop_pairs
from vtp.objectives.precision import full_precision
from vtp.objectives.sinkhorn import entropies_of_sums, logsumexp_over_ranks

LOGITS = 2**23  # at a time: 32 MB in float32


class Teacher(NamedTuple):
    """Probabilities of rows over prototypes, softmax(x . w / temp - offsets): made for the rows that are asked for."""

    embeddings: Float[Tensor, "n *crops d"]
    prototypes: Float[Tensor, "k d"]
    temp: float
    offsets: Float[Tensor, " k"]

    def probabilities(self, rows: slice) -> Float[Tensor, "c *crops k"]:
        """Of some rows."""
        return _logits(self.embeddings[rows] / self.temp, self.prototypes).sub_(self.offsets).softmax(-1)


@torch.no_grad()
def sinkhorn_offsets(
    embeddings: Float[Tensor, "n d"], prototypes: Float[Tensor, "k d"], temp: float, iterations: int = 3
) -> Float[Tensor, " k"]:
    """The offsets with which a `Teacher` gives what `sinkhorn_knopp` gives of all rows' logits.

        o_k = log sum_m exp(z_mk / temp);   repeat: o_k <- o_k + log sum_m softmax_k(z_m / temp - o)

    After each step the terms of a column sum to one, so that the largest is at least one over rows times prototypes:
    nothing can underflow. Ranks may hold different numbers of rows; they speak once an iteration.
    """
    x, w = embeddings / temp, rounded(prototypes)
    sums = x.new_full((len(w),), -torch.inf)
    for rows in _chunks(len(x), len(w)):
        sums = torch.logaddexp(sums, _logits(x[rows], w).logsumexp(0))
    offsets = logsumexp_over_ranks(sums)
    for _ in range(iterations - 1):
        sums = torch.zeros_like(offsets)
        for rows in _chunks(len(x), len(w)):
            sums += _logits(x[rows], w).sub_(offsets).softmax(-1).sum(0)
        offsets = offsets + dist.sum_(sums.double()).log().to(offsets.dtype)
    return offsets


@torch.no_grad()
@full_precision
def mean_logits(embeddings: Float[Tensor, "n d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Mean over the rows of all ranks: what a centre moves towards."""
    total, rows = dist.sum_(embeddings.sum(0)), dist.sum_(embeddings.new_full((), len(embeddings)))
    return prototypes @ (total / rows)


@torch.no_grad()
def teacher_entropies(teacher: Teacher) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`sinkhorn.entropies` of all its rows."""
    mean, single = torch.zeros_like(teacher.offsets), teacher.offsets.new_zeros(())
    for rows in _chunks(len(teacher.embeddings), len(mean)):
        p = teacher.probabilities(rows)
        mean += p.sum(0)
        single += torch.special.entr(p).sum()
    return entropies_of_sums(len(teacher.embeddings), mean, single)


def dino_loss(
    student: Float[Tensor, "s b d"], prototypes: Float[Tensor, "k d"], teacher: Teacher, student_temp: float
) -> Float[Tensor, ""]:
    """`dino.dino_loss` of embeddings of every crop of b images; the teacher's rows are its crops', one after another.

    Raises:
        ValueError: as there.
    """
    s, b, d = student.shape
    t = len(teacher.embeddings) // b
    pairs = crop_pairs(s, t)
    by_image = teacher._replace(embeddings=teacher.embeddings.unflatten(0, (t, b)).transpose(0, 1))  # [b, t, d]

    def targets(images: slice) -> Tensor:
        p = by_image.probabilities(images)  # [c, t, k]
        everyone = p.sum(1, keepdim=True)
        others = (everyone - p) / max(t - 1, 1)
        return torch.cat([others, (everyone / t).expand(-1, s - t, -1)], dim=1).flatten(0, 1)

    weights = student.new_full((b, s), t / (pairs * b))  # as many pairs as a crop is in
    weights[:, :t] -= 1 / (pairs * b)
    return _CrossEntropy.apply(student.transpose(0, 1) / student_temp, prototypes, weights, targets)


def ibot_loss(
    student: Float[Tensor, "m d"],
    prototypes: Float[Tensor, "k d"],
    teacher: Teacher,
    weights: Float[Tensor, " m"],
    student_temp: float,
) -> Float[Tensor, ""]:
    """`ibot.ibot_loss` of embeddings at the masked positions."""
    views = dist.sum_(weights.sum()) / dist.world_size()
    return _CrossEntropy.apply(student / student_temp, prototypes, weights / views, teacher.probabilities)


class _CrossEntropy(torch.autograd.Function):
    """sum_r weights_r H(targets_r, softmax(x_r . w)); its gradients are formed beside it, while a chunk is at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prototypes: Tensor, weights: Tensor, targets: Callable[[slice], Tensor]) -> Tensor:
        w = rounded(prototypes)
        loss, dx, dw = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(prototypes)
        for rows in _chunks(len(x), x.shape[1:-1].numel() * len(w)):
            part, weight = x[rows].flatten(0, -2), weights[rows].flatten()[:, None]
            p = targets(rows)
            log_q = _logits(part, w).log_softmax(-1)
            loss -= ((p * log_q).sum(-1, keepdim=True) * weight).sum()
            dz, part = log_q.exp_().sub_(p).to(w.dtype), (part * weight).to(w.dtype)
            dx[rows] = ((dz @ w).to(x.dtype) * weight).view_as(dx[rows])
            if w.dtype == dw.dtype:
                dw.addmm_(dz.T, part)
            else:
                dw += dz.T @ part
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None, None


def rounded(prototypes: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Prototypes as a product under autocast takes them: cast once, not for every chunk."""
    device = prototypes.device.type
    return prototypes.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else prototypes


def _logits(x: Tensor, w: Tensor) -> Tensor:
    """x . w as the head gives it: rounded to the prototypes' type, which autocast chose, then float32 again."""
    rows = x.flatten(0, -2)  # of more dimensions torch would make a batch of products, and as many copies of w
    return (rows.to(w.dtype) @ w.T).to(x.dtype).unflatten(0, x.shape[:-1])


def _chunks(n: int, width: int) -> Iterator[slice]:
    """Equal parts of n rows of `width` logits, as few as LOGITS allows."""
    size = -(-n // max(1, -(-n * width // LOGITS))) if n else 1
    return (slice(i, i + size) for i in range(0, n, size))
