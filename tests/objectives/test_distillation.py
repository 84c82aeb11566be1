"""dino, ibot, koleo, Sinkhorn, centring and entropies against loops written from the papers, and on two ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from vtp.objectives.dino import dino_loss
from vtp.objectives.ibot import ibot_loss
from vtp.objectives.koleo import koleo_loss
from vtp.objectives.sinkhorn import centered_softmax, entropies, sinkhorn_knopp, update_center


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z):
    """Of a list of numbers, from the definition."""
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def slow_dino(student, teacher, temp):
    pairs = [(i, j) for i in range(len(teacher)) for j in range(len(student)) if i != j]
    total = 0.0
    for i, j in pairs:
        for p, z in zip(teacher[i], student[j], strict=True):
            q = (z / temp).exp() / (z / temp).exp().sum()
            for k in range(len(p)):
                total = total - p[k] * q[k].log()
    return total / (len(pairs) * student.shape[1])


def slow_ibot(student, teacher, images, n, temp):
    """images[m] is the view of masked patch m."""
    total = 0.0
    for view in range(n):
        rows = [m for m, i in enumerate(images) if i == view]
        for m in rows:
            q = (student[m] / temp).exp() / (student[m] / temp).exp().sum()
            total = total - (teacher[m] * q.log()).sum() / len(rows)
    return total / len(set(images))


@pytest.mark.parametrize("s, t", [(2, 2), (5, 2), (3, 1)])
def test_dino_equals_the_loop(s, t):
    student, teacher = normal(s, 3, 7).requires_grad_(), normal(t, 3, 7, seed=1).softmax(-1)
    got, want = dino_loss(student, teacher, 0.3), slow_dino(student, teacher, 0.3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_dino_is_ln_k_for_a_student_that_knows_nothing_and_never_pairs_a_crop_with_itself():
    teacher = normal(2, 4, 16).mul(9).softmax(-1)
    torch.testing.assert_close(dino_loss(torch.zeros(6, 4, 16), teacher.float(), 0.1), torch.tensor(math.log(16)))
    answers = torch.eye(4)[:2, None]  # crop 0 says class 0, crop 1 says class 1
    swapped = 50 * answers.flip(0)
    assert dino_loss(swapped, answers, 1.0) < 1e-6 < 10 < dino_loss(50 * answers, answers, 1.0)


def test_dino_needs_another_crop():
    with pytest.raises(ValueError, match="1 student crops"):
        dino_loss(torch.zeros(1, 2, 4), torch.ones(1, 2, 4) / 4, 0.1)


def test_ibot_equals_the_loop_and_ignores_padding():
    images = [0, 0, 0, 2, 2]  # view 1 is not masked at all
    student, teacher = normal(5, 7).requires_grad_(), normal(5, 7, seed=1).softmax(-1)
    weights = torch.tensor([1 / images.count(i) for i in images], dtype=torch.float64)
    got, want = ibot_loss(student, teacher, weights, 0.3), slow_ibot(student, teacher, images, 3, 0.3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    padded = [torch.cat([x, torch.zeros_like(x[:2])]) for x in (student, teacher, weights)]
    torch.testing.assert_close(ibot_loss(*padded, 0.3), got)


@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_cross_entropies_are_float32_inside_autocast(loss):
    student, teacher = normal(4, 6, 32).bfloat16(), normal(2, 6, 32).softmax(-1).float()
    call = {
        "dino": lambda z: dino_loss(z, teacher, 0.1),
        "ibot": lambda z: ibot_loss(z[0], teacher[0], torch.ones(6), 0.1),
    }[loss]
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(student)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, call(student.float()), rtol=0, atol=0)


def slow_koleo(x, eps):
    x = [v / v.norm() for v in x]
    total = 0.0
    for i in range(len(x)):
        distances = torch.stack([(x[i] - x[j]).norm() for j in range(len(x)) if j != i])
        total = total - (distances.min() + eps).log()
    return total / len(x)


def test_koleo_equals_the_loop_and_ignores_lengths():
    x = normal(9, 4).requires_grad_()
    got, want = koleo_loss(x), slow_koleo(x, 1e-8)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    torch.testing.assert_close(koleo_loss(x * torch.arange(1, 10)[:, None]), got)


def test_koleo_stays_finite_for_equal_rows_and_refuses_one():
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    with pytest.raises(ValueError, match="two images"):
        koleo_loss(torch.ones(1, 3))


def slow_sinkhorn(logits, temp, iterations):
    q = [[math.exp(float(z) / temp) for z in row] for row in logits]
    rows, columns = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(columns):
            total = sum(q[m][k] for m in range(rows))
            for m in range(rows):
                q[m][k] /= total * columns
        for m in range(rows):
            total = sum(q[m])
            q[m] = [v / (total * rows) for v in q[m]]
    return torch.tensor([[v * rows for v in row] for row in q], dtype=torch.float64)


def test_sinkhorn_equals_the_loop():
    logits = normal(8, 5)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.5), slow_sinkhorn(logits, 0.5, 3))


def test_sinkhorn_balances_rows_and_columns_and_ignores_offsets():
    logits = normal(12, 4) + 3 * normal(1, 4, seed=1)
    q = sinkhorn_knopp(logits, 0.5, iterations=200)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    offset = normal(1, 4, seed=2)  # a constant for a prototype is what balancing takes away
    torch.testing.assert_close(sinkhorn_knopp(logits + offset, 0.5), sinkhorn_knopp(logits, 0.5))


def test_sinkhorn_survives_what_exp_does_not():
    logits = normal(6, 4) * 10 + torch.tensor([0.0, 20.0, -20.0, 5.0])
    q = sinkhorn_knopp(logits.float(), 0.04)
    assert q.dtype == torch.float32 and q.isfinite().all()
    torch.testing.assert_close(q.double(), sinkhorn_knopp(logits, 0.04), atol=1e-3, rtol=1e-3)


def test_centring_and_its_update_equal_the_loop():
    logits, center = normal(6, 4), normal(4, seed=1)
    want = [softmax([(z - c) / 0.2 for z, c in zip(row.tolist(), center.tolist(), strict=True)]) for row in logits]
    torch.testing.assert_close(centered_softmax(logits, center, 0.2), torch.tensor(want, dtype=torch.float64))
    moved = [0.9 * c + 0.1 * sum(logits[:, k].tolist()) / 6 for k, c in enumerate(center.tolist())]
    before = center.clone()
    torch.testing.assert_close(update_center(center, logits, 0.9), torch.tensor(moved, dtype=torch.float64))
    torch.testing.assert_close(center, before)


def test_entropies_tell_collapse_from_health():
    k = 8
    one_answer = F.one_hot(torch.zeros(16, dtype=torch.long), k).float()
    no_answer = torch.full((16, k), 1 / k)
    healthy = F.one_hot(torch.arange(16) % k, k).float()
    full = math.log(k)
    for probs, mean, single in [(one_answer, 0, 0), (no_answer, full, full), (healthy, full, 0)]:
        torch.testing.assert_close(entropies(probs), (torch.tensor(float(mean)), torch.tensor(float(single))))
    probs = normal(5, 3).softmax(-1)
    single = -sum(p * math.log(p) for row in probs.tolist() for p in row) / 5
    torch.testing.assert_close(entropies(probs)[1], torch.tensor(single, dtype=torch.float64))


def on_rank(rank, logits, center):
    rows = logits.split([5, 3])[rank]  # unequal, as masked patches are
    probs = sinkhorn_knopp(rows, 0.5)
    return probs, update_center(center, rows, 0.9), entropies(rows.softmax(-1))


def test_two_ranks_equal_one_process(two_ranks):
    logits, center = normal(8, 4), normal(4, seed=1)
    (probs0, center0, entropies0), (probs1, center1, entropies1) = two_ranks(on_rank, logits, center)
    torch.testing.assert_close(torch.cat([probs0, probs1]), sinkhorn_knopp(logits, 0.5))
    torch.testing.assert_close(center0, update_center(center, logits, 0.9))
    torch.testing.assert_close(center0, center1, rtol=0, atol=0)
    torch.testing.assert_close(entropies0, entropies(logits.softmax(-1)))
    torch.testing.assert_close(entropies0, entropies1, rtol=0, atol=0)
