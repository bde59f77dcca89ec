"""FIRE: causal softmax attention with a learned function of scaled distance as bias (Li et al., arXiv 2310.04418).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * q_i . k_j + b_h(i, j))
    b_h(i, j) = MLP_h(u)    u = psi(i - j) / psi(max(i, L))    psi(x) = log(|c| x + 1)    section 3, definition of FIRE
    MLP_h(u) = sum_{m=1..K} w2_hm relu(w1_m u + b1_m)

K is 32. Learned are c, the MLP and m in L = |m L_0|. They start at c = 0.1, m = 1 and L_0 = 512, and u has 1e-6 added
to its denominator, as in the listing in the paper's appendix. Positions i count from 0 in their sequence.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    weights: c, m, w1, b1, w2, of shapes (), (), (K,), (K,), (H, K)
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T

Departure: the MLP has no bias after its last layer. It would be the same for all logits of a row: softmax ignores it.

Output and the gradients of q, k and v come from the kernel that all biases run through. All logits share the few
weights, and adding their gradients up one by one would be slow and in random order. So the backward pass makes the
gradient of the logits again, some rows at a time, in plain torch, sums it over the batch and differentiates the bias.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbeval.cache import Layer, through
from sbeval.errors import InputError
from sbeval.kernels import check, softmax

# c, m, w1, b1, w2
Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

HIDDEN = 32
EPSILON = 1e-6
# elements of the largest tensor that the backward pass makes for the weights
ELEMENTS = 1 << 26


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    threshold: float = 512.0,
) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D). threshold: L_0."""
    t, s = q.shape[1], k.shape[1]
    place = torch.arange(s, device=q.device)
    first = softmax.starts(s, cu_seqlens, q.device)
    c, m, w1, b1, w2 = (x.to(q.dtype) for x in weights)
    distance = (place[s - t :, None] - place).clamp(min=0)
    top = (1 + c.abs() * distance).log()
    bottom = (1 + c.abs() * torch.maximum(place - first, (m * threshold).abs())).log()[s - t :, None] + EPSILON
    hidden = ((top / bottom)[..., None] * w1 + b1).relu()
    bias = torch.einsum("tsm,hm->hts", hidden, w2)
    return softmax.reference(q, k, v, scale=scale, cu_seqlens=cu_seqlens, bias=bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
    threshold: float = 512.0,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    check.inputs(q, k, v, cu_seqlens)
    if weights[4].shape[0] != q.shape[2]:
        raise InputError(f"weights are of {weights[4].shape[0]} heads; q has {q.shape[2]}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    s, count = k.shape[1], weights[2].numel()
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    c, m, w1, b1, w2 = (x.detach().to(exact) for x in weights)
    first = softmax.starts(s, cu_seqlens, q.device)
    place = torch.arange(s, device=q.device)
    bottom = _psi(torch.maximum((place - first).to(exact), (m * threshold).abs()), c) + EPSILON
    # by head, so that a logit's weights are found by its head alone
    w1_flat, b1_flat, w2_flat = w1.repeat(len(w2)), b1.repeat(len(w2)), w2.flatten()

    def top(i: Tensor, j: Tensor) -> Tensor:
        # computed, since a table would be read for every pair, and a GPU's tiles of that do not fit shared memory
        return _psi((i - j).clamp(min=0).to(exact), c)

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if starts is not None:
            # (B, T, S) of a cache, whose rows count positions from their own starts
            at = (i - starts[b])[:, 0]
            return _mlp(top(i, j) / bottom[at], w1, b1, w2)
        u = top(i, j) / bottom[i]
        if h.ndim:
            # many logits at a time, on the CPU
            return _mlp(u, w1, b1, w2)
        total = torch.zeros_like(u)
        for unit in range(count):
            at = h * count + unit
            total = total + w2_flat[at] * (w1_flat[at] * u + b1_flat[at]).relu()
        return total

    out = softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, starts=starts, backend=backend, bias=bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in weights):
        out = _learned(out, q.detach(), k.detach(), v.detach(), scale, threshold, cu_seqlens, weights)
    return out


def _psi(x: Tensor, c: Tensor) -> Tensor:
    return torch.log1p(c.abs() * x)


def _mlp(u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Return the MLP of each head at u, (..., rows, keys): (..., H, rows, keys)."""
    return torch.einsum("...tsm,hm->...hts", (u[..., None] * w1 + b1).relu(), w2)


# its backward pass differentiates, which cannot be compiled
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own has no types
def _learned(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    threshold: float,
    cu_seqlens: Tensor | None,
    weights: Weights,
) -> Tensor:
    """Return `out`, with a gradient for the weights."""
    apply: Any = _Learned.apply
    return cast(Tensor, apply(out, q, k, v, scale, threshold, cu_seqlens, *weights))


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        threshold: float,
        cu_seqlens: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_seqlens, *weights)
        ctx.scale, ctx.threshold = scale, threshold
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, *weights = ctx.saved_tensors
        # what autocast rounds in the forward pass it must not round here
        with torch.autocast(q.device.type, enabled=False):
            grads = _gradients(grad, q, k, v, ctx.scale, ctx.threshold, cu_seqlens, weights)
        return grad, None, None, None, None, None, None, *grads


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    threshold: float,
    cu_seqlens: Tensor | None,
    weights: list[Tensor],
) -> list[Tensor]:
    """Return the gradient of each weight for the output's gradient `grad`."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    leaves = [x.detach().to(exact).requires_grad_() for x in weights]
    c, m, w1, b1, w2 = leaves
    sums = [torch.zeros_like(x) for x in leaves]
    past, wide = k.shape[1] - q.shape[1], max(w1.numel(), q.shape[0] * q.shape[2])
    for first, stop in [(0, k.shape[1])] if cu_seqlens is None else pairwise(cu_seqlens.tolist()):
        for start, end in _chunks(max(first, past), stop, first, wide):
            rows, keys = slice(start - past, end - past), slice(first, end)
            i = torch.arange(start, end, device=q.device)[:, None] - first
            j = torch.arange(end - first, device=q.device)
            with torch.enable_grad():
                bottom = _psi(torch.maximum(i.to(exact), (m * threshold).abs()), c) + EPSILON
                bias = _mlp(_psi((i - j).clamp(min=0).to(exact), c) / bottom, w1, b1, w2)
            queries, above = q[:, rows].to(exact), grad[:, rows].to(exact)
            seen = bias.detach().masked_fill(j > i, -torch.inf)
            upstream = _logits_gradient(queries, k[:, keys].to(exact), v[:, keys].to(exact), above, scale, seen).sum(0)
            for total, part in zip(sums, torch.autograd.grad(bias, leaves, upstream), strict=True):
                total += part
    return [total.to(x.dtype) for total, x in zip(sums, weights, strict=True)]


def _chunks(start: int, stop: int, first: int, wide: int) -> Iterator[tuple[int, int]]:
    """Cut rows so that rows x keys x `wide` stays within ELEMENTS, the keys of a row being those from `first`."""
    rows = max(1, min(softmax.CHUNK, ELEMENTS // (wide * max(1, stop - first))))
    for i in range(start, stop, rows):
        yield i, min(i + rows, stop)


def _logits_gradient(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Return the gradient of the logits, (B, H, rows, keys). bias: (H, rows, keys), -inf where a key is not seen."""
    q, grad = (x.unflatten(2, (k.shape[2], -1)) for x in (q, grad))
    logits = torch.einsum("btgnd,bsgd->bgnts", q, k).flatten(1, 2).mul_(scale).add_(bias)
    share = logits.softmax(-1)
    gain = torch.einsum("btgnd,bsgd->bgnts", grad, v).flatten(1, 2)
    return share * (gain - (share * gain).sum(-1, keepdim=True))


def backend_name(device_type: str) -> str:
    """Name what runs on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type, biased=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """threshold: L_0, the position, in tokens, up to which the bias starts out as a function of distance alone."""

    threshold: float = 512.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise InputError(f"threshold must be positive and finite; it is {self.threshold}")


class Mixer(nn.Module):
    """FIRE as the model uses it: see `registry.Method`. Every layer learns its own bias."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.threshold = options.threshold
        self.c = nn.Parameter(torch.tensor(0.1))
        self.m = nn.Parameter(torch.tensor(1.0))
        # drawn as torch's linear layers of one input, and of HIDDEN inputs
        self.w1 = nn.Parameter(torch.empty(HIDDEN).uniform_(-1, 1))
        self.b1 = nn.Parameter(torch.empty(HIDDEN).uniform_(-1, 1))
        self.w2 = nn.Parameter(torch.empty(heads, HIDDEN).uniform_(-1, 1) / math.sqrt(HIDDEN))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        starts, (k, v) = through(cache, k, v)
        weights = self.c, self.m, self.w1, self.b1, self.w2
        return attention(
            q, k, v, weights, scale=self.scale, cu_seqlens=cu_seqlens, starts=starts, threshold=self.threshold
        )
