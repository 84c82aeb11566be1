"""The product behind linear layers, whichever kernel makes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from vtp.models import linear as linear_module
from vtp.models.layers import Linear
from vtp.models.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 256), (7, 256), (2, 3, 4, 64)])
def test_linear_is_the_product_with_and_without_gradients(dtype, shape):
    torch.manual_seed(0)
    layer = Linear(shape[-1], 24).to(dtype)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape).to(dtype)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def on_amd(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear_module, "_mkl_on_amd", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 256), (7, 256), (256,)])
def test_linear_on_amd_has_the_product_its_gradients_and_its_flops(on_amd, shape, bias):
    torch.manual_seed(0)
    layer = Linear(256, 24, bias=bias)
    x = torch.randn(256, *shape[:-1]).movedim(0, -1).requires_grad_()  # as a slice or a transposition lies in memory
    double, exact = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        assert y.grad_fn.name() == "_LinearAMDBackward"
        weights = torch.randn(24).expand_as(y)  # so is the gradient an expanded one
        (y * weights).sum().backward()
    with FlopCounterMode(display=False) as expected:
        (double(exact) * weights.double()).sum().backward()
    torch.testing.assert_close(y.double(), double(exact), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip((x, *layer.parameters()), (exact, *double.parameters()), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-6, atol=1e-5)
    assert counter.get_total_flops() == expected.get_total_flops()


@pytest.mark.parametrize(
    "bias",
    [torch.randn(24, 2)[:, 0], torch.ones(1).expand(24), torch.ones(1), torch.tensor(2.0)],
    ids=lambda b: str(b.shape),
)
def test_linear_on_amd_takes_any_bias(on_amd, bias):
    x, weight = torch.randn(5, 256), torch.randn(24, 256)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-4)


def test_linear_with_a_frozen_weight_does_not_hold_its_input(on_amd):
    x, weight = torch.randn(5, 256, requires_grad=True), torch.randn(24, 256)
    hidden = x * 1
    y = linear(hidden, weight, None)
    hidden.add_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


def test_linear_of_no_rows_or_no_outputs(on_amd):
    for grad_is_on in (True, False):
        with torch.set_grad_enabled(grad_is_on):
            assert linear(torch.randn(5, 256), torch.randn(0, 256), None).shape == (5, 0)
            assert linear(torch.randn(2, 0, 256), torch.randn(3, 256), torch.randn(3)).shape == (2, 0, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # jvp's own
def test_linear_on_amd_differentiates_as_torchs(on_amd, monkeypatch):
    layer, x, t = Linear(256, 24), torch.randn(6, 256), torch.randn(6, 256)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return functional_call(layer, weights, (x,)).square().mean()

    def penalty():
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [layer.weight, y])

    def moved(w):
        return functional_call(layer, {**weights, "weight": w}, (x,))

    def results():
        samples = vmap(grad(loss), (None, 0))(weights, x)
        y = x.clone().requires_grad_()
        rows = torch.autograd.grad(layer(y).sum(0), y, torch.eye(24), is_grads_batched=True)
        along = [*jvp(layer, (x,), (t,)), *jvp(moved, (weights["weight"],), (torch.ones(24, 256),))]
        with forward_ad.dual_level():
            moving = layer(forward_ad.make_dual(x, t))
            along.append(forward_ad.unpack_dual(moving).tangent)
        return [*penalty(), *samples.values(), *rows, *along, torch.func.hessian(loss, 1)(weights, x[0])]

    mine = results()
    monkeypatch.setattr(linear_module, "_mkl_on_amd", lambda: False)
    for a, b in zip(mine, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_on_amd_is_off_where_onednn_is(on_amd):
    layer, x = Linear(256, 24), torch.randn(5, 256)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert layer(x).grad_fn.name() == "AddmmBackward0"


def test_linear_on_amd_leaves_autocast_and_frozen_parts_as_they_are(on_amd):
    layer, x = Linear(256, 24), torch.randn(5, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
