"""Guidance turns velocities into a velocity, so that no sampler knows of it."""

from torch import Tensor

from vtp.flow.samplers import Velocity


def classifier_free(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Classifier-free guidance ``u + scale (c - u)`` (Ho and Salimans 2022, Eq. 6), within an interval of times.

    Outside ``interval`` (inclusive; Kynkäänniemi et al. 2024), and everywhere when ``scale`` is 1, the conditional
    velocity is returned and the unconditional one is never evaluated. All channels are guided; the published
    LightningDiT code guides the first 3 only, whatever their number: ``channels=3`` reproduces its samples.
    """
    if scale == 1:
        return conditional

    def velocity(x: Tensor, t: float) -> Tensor:
        c = conditional(x, t)
        if not interval[0] <= t <= interval[1]:
            return c
        guided = c.clone()
        u, part = unconditional(x, t), slice(None, channels)
        guided[:, part] = u[:, part] + scale * (c[:, part] - u[:, part])
        return guided

    return velocity
