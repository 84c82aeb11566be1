"""DINO and iBOT in chunks against the plain functions of all logits: values and gradients, and on two ranks."""

import pytest
import torch
import torch.nn.functional as F

from vtp.objectives import prototypes
from vtp.objectives.dino import dino_loss
from vtp.objectives.ibot import ibot_loss
from vtp.objectives.prototypes import Teacher, mean_logits, sinkhorn_offsets, teacher_entropies
from vtp.objectives.sinkhorn import centered_softmax, entropies, sinkhorn_knopp, update_center

K, TEMP, TEACHER_TEMP = 40, 0.1, 0.05


def units(*shape, seed=0):
    """Vectors of length one."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


@pytest.fixture(params=[1, 3 * K, 7 * K, 2**24], ids=["row by row", "3 rows", "7 rows", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(prototypes, "LOGITS", request.param)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_offsets_give_what_sinkhorn_gives(chunk, iterations):
    x, w = units(11, 6), units(K, 6, seed=1) * torch.linspace(0.5, 30, K, dtype=torch.float64)[:, None]
    want = sinkhorn_knopp(x @ w.T, TEACHER_TEMP, iterations)
    teacher = Teacher(x, w, TEACHER_TEMP, sinkhorn_offsets(x, w, TEACHER_TEMP, iterations))
    torch.testing.assert_close(teacher.probabilities(slice(None)), want)
    torch.testing.assert_close(teacher.probabilities(slice(2, 5)), want[2:5])
    torch.testing.assert_close(teacher_entropies(teacher), entropies(want))
    x, w = x.float(), w.float()
    single = Teacher(x, w, TEACHER_TEMP, sinkhorn_offsets(x, w, TEACHER_TEMP, iterations))
    assert single.probabilities(slice(None)).isfinite().all()  # logits of 600 are none of float32's


def test_a_centre_is_an_offset_and_moves_by_the_mean(chunk):
    x, w, center = units(11, 6), units(K, 6, seed=1), units(K, seed=2)
    teacher = Teacher(x, w, TEACHER_TEMP, center / TEACHER_TEMP)
    torch.testing.assert_close(teacher.probabilities(slice(None)), centered_softmax(x @ w.T, center, TEACHER_TEMP))
    torch.testing.assert_close(update_center(center, mean_logits(x, w)[None], 0.9), update_center(center, x @ w.T, 0.9))


def close(got, want, inputs):
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * want, inputs))


@pytest.mark.parametrize("s, t", [(2, 2), (5, 2), (3, 1)])
def test_dino_equals_the_plain_loss(chunk, s, t):
    x, w = units(s, 7, 6).requires_grad_(), units(K, 6, seed=1).requires_grad_()
    teacher = Teacher(units(t * 7, 6, seed=2), units(K, 6, seed=3), TEACHER_TEMP, units(K, seed=4))
    probs = teacher.probabilities(slice(None)).unflatten(0, (t, 7))
    close(prototypes.dino_loss(x, w, teacher, TEMP), dino_loss(x @ w.T, probs, TEMP), [x, w])


def test_ibot_equals_the_plain_loss(chunk):
    x, w = units(11, 6).requires_grad_(), units(K, 6, seed=1).requires_grad_()
    teacher = Teacher(units(11, 6, seed=2), units(K, 6, seed=3), TEACHER_TEMP, units(K, seed=4))
    weights = torch.arange(11, dtype=torch.float64) / 10  # the first is padding
    want = ibot_loss(x @ w.T, teacher.probabilities(slice(None)), weights, TEMP)
    close(prototypes.ibot_loss(x, w, teacher, weights, TEMP), want, [x, w])


def test_float32_is_as_near_to_float64_as_the_plain_loss(chunk):
    x, w = units(11, 6), units(K, 6, seed=1)
    y, v, weights = units(11, 6, seed=2), units(K, 6, seed=3), torch.ones(11, dtype=torch.float64)

    def losses(x, w, y, v, weights):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        teacher = Teacher(y, v, TEACHER_TEMP, sinkhorn_offsets(y, v, TEACHER_TEMP))
        loss = prototypes.ibot_loss(x, w, teacher, weights, TEMP)
        return loss.detach(), *torch.autograd.grad(loss, [x, w])

    exact = losses(x, w, y, v, weights)
    for got, want in zip(losses(*(a.float() for a in (x, w, y, v, weights))), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_under_autocast_products_are_bfloat16_and_all_else_is_float32(chunk):
    x, w = units(64, 6).float(), units(K, 6, seed=1).float()
    y, v, weights = units(64, 6, seed=2).float(), units(K, 6, seed=3).float(), torch.ones(64)
    grads = []
    for enabled in (False, True):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            teacher = Teacher(y, v, TEACHER_TEMP, sinkhorn_offsets(y, v, TEACHER_TEMP))
            loss = prototypes.ibot_loss(a, b, teacher, weights, TEMP)
            mean = mean_logits(y, v)
        loss.backward()
        assert all(z.dtype == torch.float32 for z in (loss, teacher.offsets, mean, a.grad, b.grad))
        grads.append([loss.detach(), mean, a.grad, b.grad])
    full, half = grads
    assert not torch.equal(full[0], half[0]) and torch.equal(full[1], half[1])
    for f, h in zip(full, half, strict=True):
        assert (f - h).norm() < 0.03 * f.norm()


def on_rank(rank, x, w, y, v, weights, split):
    rows = slice(0, split) if rank == 0 else slice(split, None)
    x, w = x[rows].clone().requires_grad_(), w.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototypes, "LOGITS", 3 * K)
        teacher = Teacher(y[rows], v, TEACHER_TEMP, sinkhorn_offsets(y[rows], v, TEACHER_TEMP))
        loss = prototypes.ibot_loss(x, w, teacher, weights[rows], TEMP)
        loss.backward()
        probs = teacher.probabilities(slice(None))
        return loss.detach(), probs, teacher_entropies(teacher), mean_logits(y[rows], v), x.grad, w.grad


@pytest.mark.parametrize("split", [5, 16])  # unequal, as masked patches are: one chunk a rank more, or none at all
def test_two_ranks_with_unequal_rows_equal_one_process(two_ranks, split):
    x, w = units(16, 6).requires_grad_(), units(K, 6, seed=1).requires_grad_()
    y, v, weights = units(16, 6, seed=2), units(K, 6, seed=3), torch.linspace(0, 1, 16, dtype=torch.float64)
    probs = sinkhorn_knopp(y @ v.T, TEACHER_TEMP)
    loss = ibot_loss(x @ w.T, probs, weights, TEMP)
    loss.backward()
    ranks = two_ranks(on_rank, x.detach(), w.detach(), y, v, weights, split)
    (loss0, probs0, entropies0, mean0, x0, w0), (loss1, probs1, entropies1, mean1, x1, w1) = ranks
    torch.testing.assert_close((loss0 + loss1) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([probs0, probs1]), probs)
    torch.testing.assert_close(torch.cat([x0, x1]) / 2, x.grad)
    torch.testing.assert_close((w0 + w1) / 2, w.grad)
    torch.testing.assert_close(entropies0, entropies(probs))
    torch.testing.assert_close(mean0, (y @ v.T).mean(0))
    assert torch.equal(mean0, mean1) and entropies0 == entropies1
