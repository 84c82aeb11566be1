import torch

from vtp.flow.path import cosine_loss, interpolate, mse_loss, target_velocity


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, 3, 2, generator=generator, dtype=torch.float64).unbind()


def test_path_goes_from_noise_to_data():
    noise, data = pair()
    torch.testing.assert_close(interpolate(noise, data, torch.zeros(5, dtype=torch.float64)), noise)
    torch.testing.assert_close(interpolate(noise, data, torch.ones(5, dtype=torch.float64)), data)


def test_velocity_is_the_derivative_and_leads_to_both_ends():
    noise, data = pair()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, v = interpolate(noise, data, t), target_velocity(noise, data)
    derivative = (interpolate(noise, data, t + 0.1) - x) / 0.1  # exact: x_t is linear in t
    torch.testing.assert_close(v, derivative)
    t = t[:, None, None, None]
    torch.testing.assert_close(x + (1 - t) * v, data)
    torch.testing.assert_close(x - t * v, noise)


def test_losses_against_a_slow_loop():
    pred, target = pair()
    for row in range(5):
        squares, cosines = [], []
        for i in range(3):
            for j in range(2):
                a, b = pred[row, :, i, j], target[row, :, i, j]
                squares += [float((x - y) ** 2) for x, y in zip(a, b, strict=True)]
                cosines += [1 - float(a @ b / (a.norm() * b.norm()))]
        assert abs(float(mse_loss(pred, target)[row]) - sum(squares) / len(squares)) < 1e-6
        assert abs(float(cosine_loss(pred, target)[row]) - sum(cosines) / len(cosines)) < 1e-6


def test_losses_are_zero_at_the_target_and_cosine_ignores_length():
    pred, _ = pair()
    assert mse_loss(pred, pred).abs().max() == 0
    assert cosine_loss(3 * pred, pred).abs().max() < 1e-6
    assert (cosine_loss(-pred, pred) - 2).abs().max() < 1e-6
