import torch

from vtp.flow.guidance import classifier_free
from vtp.flow.samplers import euler


def velocities():
    calls = []

    def conditional(x, t):
        return torch.ones_like(x)

    def unconditional(x, t):
        calls.append(t)
        return torch.full_like(x, 0.25)

    return conditional, unconditional, calls


def test_scale_one_and_zero_are_the_two_velocities():
    conditional, unconditional, calls = velocities()
    x = torch.zeros(2, 5, 1, 1)
    assert classifier_free(conditional, unconditional, 1.0)(x, 0.5).eq(1).all() and not calls
    assert classifier_free(conditional, unconditional, 0.0)(x, 0.5).eq(0.25).all()


def test_all_channels_are_guided_unless_asked():
    conditional, unconditional, _ = velocities()
    x = torch.zeros(2, 5, 1, 1)
    assert classifier_free(conditional, unconditional, 3.0)(x, 0.5).eq(0.25 + 3 * 0.75).all()
    published = classifier_free(conditional, unconditional, 3.0, channels=3)(x, 0.5)
    assert published[:, :3].eq(2.5).all() and published[:, 3:].eq(1).all()


def test_outside_the_interval_it_costs_nothing():
    conditional, unconditional, calls = velocities()
    guided = classifier_free(conditional, unconditional, 3.0, interval=(0.3, 0.7))
    end = euler(guided, torch.zeros(1, 1), [0.0, 0.25, 0.5, 0.75, 1.0])
    assert calls == [0.5]
    torch.testing.assert_close(end, torch.tensor([[0.75 + 0.25 * 2.5]]))
