"""Self-distillation of class tokens over crops (DINO)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vtp.objectives.precision import full_precision


@full_precision
def dino_loss(
    student: Float[Tensor, "s b k"], teacher: Float[Tensor, "t b k"], student_temp: float
) -> Float[Tensor, ""]:
    """Cross-entropy over all pairs of a teacher crop and another student crop (Caron et al. 2021, Eq. 3); nats.

        L = -1/(P b) sum_{i < t} sum_{j < s, j != i} sum_b sum_k  p_ibk log softmax(z_jb / temp)_k,   P = t s - t

    Args:
        student: prototype logits z of every crop of b images, the t global crops first and in the teacher's order.
        teacher: prototype probabilities p of the global crops, without gradient.
        student_temp: softmax temperature of the student.

    Raises:
        ValueError: fewer than two student crops, or fewer than the teacher's.
    """
    s, t, images = len(student), len(teacher), student.shape[1]
    pairs = crop_pairs(s, t)
    log_q_global, log_q_local = (student / student_temp).log_softmax(-1).split([t, s - t])
    everyone = teacher.sum(0)  # [b, k]; a sum over pairs is a product of sums, so no [t, s, b, k] is made
    cross = ((everyone - teacher) * log_q_global).sum() + (everyone * log_q_local.sum(0)).sum()
    return -cross / (pairs * images)


def crop_pairs(s: int, t: int) -> int:
    """How many pairs of a teacher crop and another student crop there are; ValueError for crops that make none."""
    if s < max(2, t):
        raise ValueError(f"dino_loss: {s} student crops for {t} teacher crops; needs two or more, the teacher's first")
    return t * s - t
