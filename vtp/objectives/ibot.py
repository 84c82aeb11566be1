"""Self-distillation of masked patch tokens (iBOT)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vtp import dist
from vtp.objectives.precision import full_precision


@full_precision
def ibot_loss(
    student: Float[Tensor, "m k"],
    teacher: Float[Tensor, "m k"],
    weights: Float[Tensor, " m"],
    student_temp: float,
) -> Float[Tensor, ""]:
    """Cross-entropy at the masked patches, averaged in each image first (Zhou et al. 2022, Eq. 2); nats.

        L = - sum_m w_m sum_k p_mk log softmax(z_m / temp)_k / sum_m w_m

    The sum of the weights is the number of masked views, so a student that knows nothing stands at ln K. DINOv2 divides
    by all views, the unmasked ones too, which halves the loss at its mask probability of 1/2. With several ranks the
    masked views are counted over all of them: the mean of the ranks' losses is the loss of one process.

    Args:
        student: prototype logits z at the masked positions, from the masked views.
        teacher: prototype probabilities p at the same positions, from the whole views, without gradient.
        weights: w, one over the number of masked patches in the patch's own view; 0 marks a padding row.
        student_temp: softmax temperature of the student.
    """
    log_q = (student / student_temp).log_softmax(-1)
    views = dist.sum_(weights.sum()) / dist.world_size()
    return -(weights * (teacher * log_q).sum(-1)).sum() / views
