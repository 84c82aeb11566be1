"""Transformer parts shared by the trunk, the pixel decoder and the text tower.

Every layer draws its own initial weights once, in `reset_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vtp.models.linear import linear
from vtp.models.rope import rotate

Rope = tuple[Tensor, Tensor]  # cosine and signed sine, see vtp.models.rope
Groups = tuple[tuple[int, int], ...]  # sequences of one length each: how many, of how many tokens

# The gradient of the CPU's fused attention is up to 10 times slower than batched products on sequences this short.
SHORT_SEQUENCE = 128
SCORES = 2**20  # of attention at a time: 2 MB in bfloat16, which a cache holds


def pack(groups: Sequence[Float[Tensor, "_ _ d"]]) -> Float[Tensor, "n d"]:
    """The tokens of all groups behind one another, so that linears see them at once."""
    rows = [x.flatten(0, 1) for x in groups]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpack(x: Float[Tensor, "n d"], groups: Groups) -> list[Float[Tensor, "_ _ d"]]:
    """The groups again, as views."""
    parts = x.split([count * length for count, length in groups])
    return [part.unflatten(0, shape) for part, shape in zip(parts, groups, strict=True)]


class Linear(nn.Linear):
    """nn.Linear that starts with normal weights of the given standard deviation and zero bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return linear(x, self.weight, self.bias)


class _RMSNormCPU(torch.autograd.Function):
    """RMSNorm with its gradient in closed form; autograd's takes 3 times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        product = grad * y
        along = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return (grad * weight).addcmul_(y, along).mul_(scale), product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        if x.dtype != self.weight.dtype:  # a bfloat16 x and a float32 weight give float32
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        if (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and x.requires_grad
            and not torch.compiler.is_compiling()
        ):
            return _RMSNormCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(dim, hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        gate, up = F.silu(self.w1(x)), self.w2(x)
        return self.w3(gate * up if torch.is_grad_enabled() else gate.mul_(up))  # in place: 3 MB less to write


def swiglu_hidden(dim: int, mlp_ratio: float, align: int) -> int:
    """Two thirds of the MLP's hidden width, rounded up to a multiple of `align`: the parameters of both are equal."""
    return -(-int(int(dim * mlp_ratio) * 2 / 3) // align) * align


def make_norm(name: str, dim: int) -> nn.Module:
    """layernorm (eps 1e-6), layernormbf16 (LayerNorm, eps 1e-5) or rmsnorm (eps 1e-5)."""
    if name == "rmsnorm":
        return RMSNorm(dim)
    return nn.LayerNorm(dim, eps={"layernorm": 1e-6, "layernormbf16": 1e-5}[name])


def make_ffn(name: str, dim: int, mlp_ratio: float) -> nn.Module:
    """mlp, or swiglu with the multiple of its hidden width (8 when not named)."""
    if name == "mlp":
        return Mlp(dim, int(dim * mlp_ratio))
    return SwiGLU(dim, swiglu_hidden(dim, mlp_ratio, align=int(name.removeprefix("swiglu") or 8)))


def _attention_bf16(
    q: Float[Tensor, "b heads t h"], k: Float[Tensor, "b heads t h"], v: Float[Tensor, "b heads t h"]
) -> Float[Tensor, "b heads t h"]:
    # Twice as fast as the fused kernel, for it keeps scores in bfloat16, a cache full at a time. Their rounding adds
    # 1 to 15% to the error that bfloat16 makes in a whole encoder.
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    heads = max(1, SCORES // q.shape[-2] ** 2)
    chunks = (x.flatten(0, 1).split(heads) for x in (q, k, v, out))
    for queries, keys, values, y in zip(*chunks, strict=True):
        scores = torch.baddbmm(q.new_empty(()), queries, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        torch.bmm(torch.softmax(scores, -1, out=scores), values, out=y)
    return out


def attention(
    q: Float[Tensor, "b heads t h"],
    k: Float[Tensor, "b heads t h"],
    v: Float[Tensor, "b heads t h"],
    *,
    causal: bool = False,
) -> Float[Tensor, "b heads t h"]:
    """softmax(q k^T / sqrt(h)) v; `causal`: a token sees itself and those before it.

    Where a gradient is asked for, the kernel is the one whose gradient is fast; else the published one, bit for bit,
    but for bfloat16 on a CPU.
    """
    tokens = q.shape[-2]
    in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if in_bf16 and not (torch.is_grad_enabled() or causal or torch.compiler.is_compiling()):
        return _attention_bf16(q, k, v)
    if not q.requires_grad or q.device.type != "cpu" or tokens > SHORT_SEQUENCE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with torch.autocast("cpu", enabled=False):  # scores in float32, as inside the fused kernel
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT  # [b, heads, t, t]
        if causal:
            scores = scores + torch.full((tokens, tokens), -torch.inf).triu_(1)
        return (scores.softmax(-1) @ v.float()).to(v.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n d"], groups: Groups, ropes: Sequence[Rope]) -> Float[Tensor, "n d"]:
        """Within each sequence of each group; a group has its own rotations."""
        parts = unpack(self.qkv(x), groups)
        return self.proj(pack([self._attend(qkv, rope) for qkv, rope in zip(parts, ropes, strict=True)]))

    def _attend(self, qkv: Float[Tensor, "b t qkv"], rope: Rope) -> Float[Tensor, "b t d"]:
        qk, v = qkv.unflatten(-1, (3 * self.num_heads, -1)).split([2 * self.num_heads, self.num_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.chunk(2, dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2).to(v.dtype)  # float32 under autocast
        qk = rotate(qk, *(table[:, None] for table in rope))  # [b, t, 2 heads, h]
        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))  # [b, heads, t, h]
        return attention(q, k, v).transpose(1, 2).flatten(2)


def residual(
    x: Float[Tensor, "n d"], groups: Groups, branch: Callable[[Tensor, Groups], Tensor], drop: float = 0.0
) -> Float[Tensor, "n d"]:
    """x + branch(x); stochastic depth (Huang et al. 2016) computes the branch for some sequences of each group only.

    The kept max(int(b (1 - drop)), 1) of b are scaled by b / kept, so that the expectation is that of the full branch.
    """
    if drop == 0.0:
        return x + branch(x, groups)
    parts = unpack(x, groups)
    rows = [torch.randperm(count, device=x.device)[: max(int(count * (1 - drop)), 1)] for count, _ in groups]
    kept = tuple((len(chosen), length) for chosen, (_, length) in zip(rows, groups, strict=True))
    update = branch(pack([part.index_select(0, chosen) for part, chosen in zip(parts, rows, strict=True)]), kept)
    updates = unpack(update.to(x.dtype), kept)  # under autocast the branch has a lower precision than x
    changes = zip(parts, rows, updates, strict=True)
    return pack([part.index_add(0, chosen, y, alpha=len(part) / len(chosen)) for part, chosen, y in changes])


class Recomputable(nn.Module):
    """A block whose activations can be dropped, and computed again in the backward pass (gradient checkpointing).

    Both attributes are set from outside, under the names that transformers gives them. Recomputing is within `forward`,
    so that a compiler sees it, and hooks that gather a sharded block's weights do not run again.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # checkpoint(function, *args), as in torch.utils.checkpoint

    def forward(self, *args: Any) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.compute, *args)
        return self.compute(*args)

    def compute(self, *args: Any) -> Tensor:
        raise NotImplementedError


class Block(Recomputable):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        ffn_layer: str,
        norm_layer: str,
        init_values: float | None,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm_layer, dim)
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = make_norm(norm_layer, dim)
        self.mlp = make_ffn(ffn_layer, dim, mlp_ratio)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def attend(self, x: Float[Tensor, "n d"], groups: Groups, ropes: Sequence[Rope]) -> Float[Tensor, "n d"]:
        """The attention branch, without the sum."""
        return self.ls1(self.attn(self.norm1(x), groups, ropes))

    def feed(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The feed-forward branch, without the sum."""
        return self.ls2(self.mlp(self.norm2(x)))

    def compute(
        self,
        x: Float[Tensor, "*b d"],
        ropes: Sequence[Rope],
        groups: Groups | None = None,
        drop_path: float = 0.0,
        rows: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "... d"]:
        """Sequences of one length [b t d], or groups of them packed [n d]: all tokens, or of all n those at `rows`."""
        if groups is None:
            packed = self.compute(x.flatten(0, 1), ropes, ((x.shape[0], x.shape[1]),), drop_path, rows)
            return packed.unflatten(0, x.shape[:2]) if rows is None else packed
        x = residual(x, groups, partial(self.attend, ropes=ropes), drop_path)
        if rows is not None and drop_path == 0.0:
            x = x[rows]
            return x + self.feed(x)
        x = residual(x, groups, lambda x, _: self.feed(x), drop_path)  # stochastic depth drops whole images
        return x if rows is None else x[rows]


@torch.no_grad()
def scale_init(module: nn.Module) -> None:
    """Rescale the fresh linears of a narrow network by fan-in: std 0.02 sqrt(768 / fan-in).

    Outputs of residual branches are divided by sqrt(2 depth) besides (GPT-2; OpenCLIP's text tower). The published
    constant suits wide networks; at width 128 it leaves attention all but uniform for hundreds of steps.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.weight *= (768 / layer.in_features) ** 0.5
        elif isinstance(layer, nn.ModuleList):
            for name, part in layer.named_modules():
                if isinstance(part, Linear) and name.endswith(("attn.proj", "mlp.w3", "mlp.fc2")):
                    part.weight /= (2 * len(layer)) ** 0.5
