import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vtp.models.config import ViTConfig
from vtp.models.layers import Block, RMSNorm, attention, pack, residual, scale_init, swiglu_hidden, unpack
from vtp.models.rope import RopeEmbed
from vtp.models.vit import ViT


def test_rmsnorm_is_published(shared):
    golden = load_file(shared / "fixtures/misc/rmsnorm.safetensors")
    norm = RMSNorm(8)
    norm.weight.data.copy_(golden["w"])
    torch.testing.assert_close(norm(golden["x"]), golden["y"], atol=1e-6, rtol=1e-6)
    mixed = norm(golden["x"].bfloat16())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, golden["y_bf16"], atol=1e-6, rtol=1e-6)


def test_rmsnorm_gradient():
    norm = RMSNorm(6).double()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 2, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    weights = norm.weight.detach().clone().requires_grad_()
    expected = torch.autograd.grad(F.rms_norm(x, (6,), weights, 1e-5).square().sum(), [x, weights])
    actual = torch.autograd.grad(norm(x).square().sum(), [x, norm.weight])
    torch.testing.assert_close(actual, expected)


def test_swiglu_hidden_widths(shared):
    for name, hidden in json.loads((shared / "fixtures/misc/swiglu_hidden.json").read_text()).items():
        dim, align = name.split("/align")
        assert swiglu_hidden(int(dim), 4.0, int(align)) == hidden


@pytest.mark.parametrize("causal", [False, True])
def test_training_kernel_equals_the_published_one(causal):
    inputs = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    fast = attention(*inputs, causal=causal)
    fused = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
    assert torch.equal(attention(*(x.detach() for x in inputs), causal=causal), fused)
    torch.testing.assert_close(fast, fused)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (fast, fused)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_stochastic_depth_is_published(shared, drop):
    golden = load_file(shared / "fixtures/train/block_drop.safetensors")
    block = Block(32, 2, mlp_ratio=2.0, ffn_layer="mlp", norm_layer="layernorm", init_values=1.0, qk_norm=False)
    block.load_state_dict({name[2:]: value for name, value in golden.items() if name.startswith("w/")})
    xs, unrotated = (golden["x1"], golden["x2"]), (torch.ones(1, 16), torch.zeros(1, 16))
    ropes = [tuple(table.expand(x.shape[1], -1) for table in unrotated) for x in xs]
    groups = tuple(x.shape[:2] for x in xs)
    torch.manual_seed(123)  # attention of both batches, then the feed-forward of both
    for x, name in zip(unpack(block(pack(xs), ropes, groups, drop), groups), ("y1", "y2"), strict=True):
        torch.testing.assert_close(x, golden[f"drop{drop}/{name}"], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    x, groups = torch.ones(10 * 2 + 4 * 3, 1), ((10, 2), (4, 3))
    out = unpack(residual(x, groups, lambda x, groups: 2 * x, 0.25), groups)  # 7 of 10 and 3 of 4 are kept
    for group, dropped in zip(out, (3, 1), strict=True):
        assert torch.equal(group.eq(1).all(1), group.eq(1).any(1))  # whole sequences
        assert group[:, 0].eq(1).sum() == dropped
        torch.testing.assert_close(group.mean(), torch.tensor(3.0))
    assert residual(x[:1], ((1, 1),), lambda x, _: x, 0.99).item() == 2  # at least one row is kept


def test_block_gradients_under_autocast():
    block = Block(32, 2, ffn_layer="swiglu", norm_layer="rmsnorm", init_values=0.1, qk_norm=True)
    x = torch.randn(6, 5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x, [RopeEmbed(16)((2, 2), 1, x.device)], None, 0.5)
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in block.parameters())
    assert isinstance(block.ls1, nn.Module)


def test_scale_init_gives_a_narrow_network_the_spread_of_a_wide_one():
    torch.manual_seed(0)
    trunk = ViT(ViTConfig(patch_size=8, embed_dim=192, depth=2, num_heads=4))
    scale_init(trunk)
    weights = dict(trunk.named_parameters())
    assert abs(weights["blocks.0.attn.qkv.weight"].std() / 0.04 - 1) < 0.05  # sqrt(768 / 192) = 2
    assert abs(weights["blocks.1.attn.proj.weight"].std() / 0.02 - 1) < 0.05  # and / sqrt(2 * 2)
    assert abs(weights["blocks.1.mlp.w3.weight"].std() / (0.01 * (768 / 512) ** 0.5) - 1) < 0.05
    assert abs(weights["feature_bottleneck.weight"].std() / 0.04 - 1) < 0.05


@pytest.mark.parametrize("tokens", [1, 37, 400])  # one chunk, one chunk, and chunks of 6 and 2 heads
def test_bf16_inference_attention_is_off_by_the_rounding_of_scores(tokens):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, tokens, 16).bfloat16()
    q = 3 * q  # attention that has learned to choose
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    largest = (q @ k.mT).abs().max().item() / 4
    with torch.no_grad():
        ours = attention(q, k, v)
    assert ours.dtype == torch.bfloat16 and ours.shape == q.shape
    assert (ours.double() - exact).norm() / exact.norm() < max(largest, 1) * 2**-9
