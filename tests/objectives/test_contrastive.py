"""clip and siglip against loops written from the papers, and on two ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from vtp.objectives import blocks
from vtp.objectives.clip import clip_loss
from vtp.objectives.siglip import siglip_loss


@pytest.fixture(params=[2**24, 1, 12], ids=["at once", "row by row", "two rows"])
def block(request, monkeypatch):
    monkeypatch.setattr(blocks, "LOGITS", request.param)
    return request.param


def pairs(seed, b=6, d=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(b, d, generator=g, dtype=torch.float64), dim=-1).to(dtype) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def slow_clip(image, text, scale):
    n, total = len(image), 0.0
    for i in range(n):
        row = [scale * image[i].dot(text[j]) for j in range(n)]
        column = [scale * text[i].dot(image[j]) for j in range(n)]
        total = total - (row[i] - torch.stack([z.exp() for z in row]).sum().log())
        total = total - (column[i] - torch.stack([z.exp() for z in column]).sum().log())
    return total / (2 * n)


def slow_siglip(image, text, scale, bias):
    n, total = len(image), 0.0
    for i in range(n):
        for j in range(n):
            z = 1 if i == j else -1
            total = total - (1 / (1 + (-z * (scale * image[i].dot(text[j]) + bias)).exp())).log()
    return total / n


SCALARS = {slow_clip: (10.0,), slow_siglip: (10.0, -10.0)}


def scalars(slow, dtype=torch.float64):
    return [torch.tensor(v, dtype=dtype, requires_grad=True) for v in SCALARS[slow]]


@pytest.mark.parametrize("fast, slow", [(clip_loss, slow_clip), (siglip_loss, slow_siglip)])
def test_value_and_gradients_equal_the_loop(fast, slow, block):
    inputs = [*pairs(0), *scalars(slow)]
    got, want = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


@pytest.mark.parametrize("fast, slow", [(clip_loss, slow_clip), (siglip_loss, slow_siglip)])
def test_order_of_pairs_and_a_common_rotation_change_nothing(fast, slow):
    (x, y), s = pairs(1), scalars(slow)
    order, turn = torch.randperm(6), torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(fast(x[order] @ turn, y[order] @ turn, *s), fast(x, y, *s))


def test_known_values():
    same = torch.ones(8, 1)
    torch.testing.assert_close(clip_loss(same, same, torch.tensor(100.0)), torch.tensor(math.log(8)))
    zero = torch.tensor(0.0)
    torch.testing.assert_close(siglip_loss(same, same, zero, zero), torch.tensor(8 * math.log(2)))


@pytest.mark.parametrize("fast, slow", [(clip_loss, slow_clip), (siglip_loss, slow_siglip)])
def test_float32_inside_autocast(fast, slow):
    (x, y), s = pairs(2, b=32, dtype=torch.float32), scalars(slow, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fast(x, y, *s)
        half = fast(x.bfloat16(), y.bfloat16(), *s)
    assert inside.dtype == half.dtype == torch.float32
    torch.testing.assert_close(inside, fast(x, y, *s), rtol=0, atol=0)


def test_a_scale_of_one_element_is_accepted():
    x, y = pairs(3)
    s = torch.tensor([10.0], dtype=torch.float64)
    torch.testing.assert_close(clip_loss(x, y, s), clip_loss(x, y, s[0]))


def share(rank, fast, image, text, scalars, block):
    """This rank's loss, and its gradients as DDP would average them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "LOGITS", block)
        return averaged(rank, fast, image, text, scalars)


def averaged(rank, fast, image, text, scalars):
    import torch.distributed as td

    inputs = [image.chunk(2)[rank].detach().requires_grad_(), text.chunk(2)[rank].detach().requires_grad_()]
    inputs += [s.detach().requires_grad_() for s in scalars]
    loss = fast(*inputs)
    grads = list(torch.autograd.grad(loss, inputs))
    for g in grads[2:]:
        td.all_reduce(g)
    return loss.detach(), [g / 2 for g in grads]


@pytest.mark.parametrize("fast, slow", [(clip_loss, slow_clip), (siglip_loss, slow_siglip)])
def test_mean_of_two_ranks_is_the_loss_of_one_process(two_ranks, fast, slow, block):
    inputs = [*pairs(4), *scalars(slow)]
    whole = fast(*inputs)
    image, text, *rest = torch.autograd.grad(whole, inputs)
    x, y, *scales = (x.detach() for x in inputs)
    (loss0, grads0), (loss1, grads1) = two_ranks(share, fast, x, y, scales, block)
    torch.testing.assert_close((loss0 + loss1) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([grads0[0], grads1[0]]), image)
    torch.testing.assert_close(torch.cat([grads0[1], grads1[1]]), text)
    for rank in (grads0, grads1):
        torch.testing.assert_close(rank[2:], rest)


@pytest.mark.parametrize("fast, slow", [(clip_loss, slow_clip), (siglip_loss, slow_siglip)])
def test_no_more_similarities_than_a_block_exist_at_once(fast, slow, monkeypatch):
    """Of 64 x 64 at most 8 x 64 are ever made, and none is kept for the backward pass."""
    monkeypatch.setattr(blocks, "LOGITS", 8 * 64)
    inputs, kept = [*pairs(5, b=64), *scalars(slow)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = fast(*inputs)
    assert max(kept) <= 64 * 5  # the features

    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    with Watch():
        loss.backward()
        fast(*inputs)
    assert max(made) <= 8 * 64
