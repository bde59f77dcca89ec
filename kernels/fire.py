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

On a GPU this is a Triton kernel of its own, `fire_triton.py`. Elsewhere output and the gradients of q, k and v come
from the path that all biases run through, and a second backward pass makes the gradient of the logits again, some rows
at a time, sums it over the batch and differentiates the bias.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbeval.errors import InputError, choose
from sbeval.kernels import check, softmax
from sbeval.models.kv_cache import Layer, through

# c, m, w1, b1, w2
Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

BACKENDS = ("torch", "triton")
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
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors.

    backend: `triton` (GPU), `torch` (anywhere) or None, the faster; what `starts` bounds runs as any method's.
    """
    check.inputs(q, k, v, cu_seqlens)
    if weights[4].shape[0] != q.shape[2]:
        raise InputError(f"weights are of {weights[4].shape[0]} heads; q has {q.shape[2]}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if starts is None and pick_backend(q, backend) == "triton":
        return _fused(q, k, v, weights, scale, threshold, cu_seqlens)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    c, m, w1, b1, w2 = (x.detach().to(exact) for x in weights)
    bottom = _bottoms(k.shape[1], c, m, threshold, cu_seqlens)

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # rows of a cache count positions from their own starts, and each has its own bias, (B, T, S)
        at = i if starts is None else (i - starts[b])[:, 0]
        return _mlp(_psi((i - j).clamp(min=0).to(exact), c) / bottom[at], w1, b1, w2)

    out = softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, starts=starts, backend="torch", bias=bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in weights):
        out = _learned(out, q.detach(), k.detach(), v.detach(), scale, threshold, cu_seqlens, weights)
    return out


def pick_backend(q: Tensor, backend: str | None) -> str:
    """What will run for queries like `q`: by default `triton` on a GPU in 16 or 32 bits, `torch` otherwise."""
    supported = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if backend is None:
        return "triton" if supported else "torch"
    if choose("backend of fire", backend, BACKENDS) == "triton" and not supported:
        raise InputError(f"backend 'triton' needs float16, bfloat16 or float32 on a GPU; q is {q.dtype} on {q.device}")
    return backend


def _bottoms(length: int, c: Tensor, m: Tensor, threshold: float, cu_seqlens: Tensor | None) -> Tensor:
    """Return psi(max(i, L)) of each position, counted in its sequence: (length,)."""
    place = torch.arange(length, device=c.device) - softmax.starts(length, cu_seqlens, c.device)
    return _psi(torch.maximum(place.to(c.dtype), (m * threshold).abs()), c) + EPSILON


def _fused(
    q: Tensor, k: Tensor, v: Tensor, weights: Weights, scale: float, threshold: float, cu_seqlens: Tensor | None
) -> Tensor:
    """Attend by the Triton kernel, which has gradients of the bottoms, through which those of c and m come."""
    c, m, w1, b1, w2 = (x.float() for x in weights)
    bottom = _bottoms(k.shape[1], c, m, threshold, cu_seqlens)[k.shape[1] - q.shape[1] :]
    out, *_ = _operator(q, k, v, c.abs(), bottom, w1, b1, w2, cu_seqlens, scale)
    return cast(Tensor, out)


@torch.library.custom_op("sbeval::fire", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    bottom: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and for the gradient what each softmax divides by and how the bias is laid out."""
    from sbeval.kernels import fire_triton

    with torch.cuda.device_of(q):
        return fire_triton.forward(q, k, v, c, bottom, w1, b1, w2, cu_seqlens, scale)


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    bottom: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sbeval.kernels import fire_triton

    lse = bottom.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    table = bottom.new_empty(fire_triton.table_shape(w2))
    order = torch.empty(w1.shape, dtype=torch.int64, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse, table, order


@torch.library.custom_op("sbeval::fire_backward", mutates_args=())
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    bottom: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    order: Tensor,
    dout: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, c, bottom, w1, b1 and w2."""
    from sbeval.kernels import fire_triton

    return fire_triton.backward(q, k, v, c, bottom, w1, b1, w2, out, lse, table, order, dout, cu_seqlens, scale)


@_backward_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    bottom: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    order: Tensor,
    dout: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rest = [torch.empty_like(x) for x in (c, bottom, w1, b1, w2)]
    return dq, dk, dv, rest[0], rest[1], rest[2], rest[3], rest[4]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _differentiate(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    return *_backward_operator(*tensors, dout, cu_seqlens, ctx.scale), None, None


_operator.register_autograd(_differentiate, setup_context=_save)


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
    return "triton" if device_type == "cuda" else "torch"


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
