"""Self-distillation of masked patch tokens (iBOT)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vtp.objectives.precision import full_precision


@full_precision
def ibot_loss(
    student: Float[Tensor, "m k"],
    teacher: Float[Tensor, "m k"],
    weights: Float[Tensor, " m"],
    n_images: int,
    student_temp: float,
) -> Float[Tensor, ""]:
    """Cross-entropy at the masked patches, averaged in each image first (Zhou et al. 2022, Eq. 2); nats.

        L = -1/n sum_m w_m sum_k p_mk log softmax(z_m / temp)_k

    Args:
        student: prototype logits z at the masked positions, from the masked views.
        teacher: prototype probabilities p at the same positions, from the whole views, without gradient.
        weights: w, one over the number of masked patches in the patch's own view; 0 marks a padding row.
        n_images: n, all views the masks were drawn for, the unmasked ones too (as DINOv2 counts them).
        student_temp: softmax temperature of the student.
    """
    log_q = (student / student_temp).log_softmax(-1)
    return -(weights * (teacher * log_q).sum(-1)).sum() / n_images
