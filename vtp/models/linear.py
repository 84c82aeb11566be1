"""x weight^T + bias by the fastest kernel that a processor has for it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

CONVOLVED = (torch.float32, torch.bfloat16)  # what oneDNN has fast kernels for
CONVOLVED_WIDTH = 256  # narrower inputs lose more by the detour than they win


def linear(x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Tensor | None) -> Float[Tensor, "*b o"]:
    """x weight^T + bias.

    Without gradients a CPU does it as a 1 x 1 convolution of channels-last pixels: oneDNN's kernel for that is a sixth
    faster than the product behind F.linear in float32 (MKL's, on a processor not of Intel's make), and in bfloat16 does
    not write the bias first. With gradients, in float32 on AMD's processors, it takes oneDNN's product.
    """
    if (
        x.device.type != "cpu"
        or x.dtype not in CONVOLVED
        or x.shape[-1] < CONVOLVED_WIDTH
        or torch.compiler.is_compiling()
        or not _is_plain(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _LinearAMD.apply(x, weight, bias) if _for_amd(x, weight, bias) else F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, i, n, 1]
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _LinearAMD(torch.autograd.Function):
    """F.linear in float32, with oneDNN's product for outputs and inputs' gradients.

    Alone that is 8% (AVX2) to 20% (AVX-512) faster: MKL, behind F.linear, keeps its best kernels for Intel's
    processors. For weights' gradients it is still the faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        # oneDNN's product has no gradient of its own, and knows no vmap.
        product = F.linear if torch.is_grad_enabled() or _functorch_is_at_work() else _onednn_product
        return (
            product(grad, weight.t(), None) if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes are those of a layer; what else F.linear takes or refuses, it may do itself."""
    fits = weight.shape[1:] == x.shape[-1:] and len(weight) > 0 and x.numel() > 0
    return fits and (bias is None or bias.shape == weight.shape[:1])


def _for_amd(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _mkl_on_amd()
        and bool(torch.backends.mkldnn.enabled)
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not _functorch_is_at_work()
        and forward_ad._current_level < 0  # nobody asks for derivatives by forward passes
    )


def _functorch_is_at_work() -> bool:
    return torch._C._are_functorch_transforms_active()


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it would read other values without a word
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _onednn_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


if torch.backends.mkldnn.is_available():  # torch counts only what is behind F.linear
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_onednn_flops)


@functools.cache
def _mkl_on_amd() -> bool:
    cpus = Path("/proc/cpuinfo")
    onednn, mkl = torch.backends.mkldnn.is_available(), torch.backends.mkl.is_available()
    return onednn and mkl and cpus.is_file() and "AuthenticAMD" in cpus.read_text()
