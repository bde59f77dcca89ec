"""Forgetting attention: gates of each head lower the logits of all earlier keys (Lin et al., arXiv 2503.02130).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * q_i . k_j + sum_{l=j+1..i} log f_l)
    f_l = sigmoid(w_h . x_l + b_h)     section 3; x is the layer's normalised input

Without positional encoding, as the paper's FoX with the Llama architecture; `rotary=true` rotates as in `rope`. The
gates' biases are initialised to 0, the default of the authors' code.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    log_f: (B, S, H)    logarithms of the gates of all S positions, none positive
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T

With c_i = sum_{l <= i} log f_l the bias is c_i - c_j. Sums are computed in float64 and stored as an integer part and a
remainder, both float32, so that differences are as exact far from the start as near it. No gradient goes through the
bias: that of c_i in row i is 0, since softmax ignores a shift of all its logits, and that of c_j is minus the sum of
column j of the logits' gradient. An extra dimension, 1 in every query and 0 in every key, adds nothing to a logit, and
the gradient of those zeros is that very sum; any fused kernel computes it with the gradients of k, and nothing adds in
random order. Over a sequence these gradients add up to 0, but each is rounded to the dtype of k, and a gate has the sum
over all later positions: what they are off is taken from them, or a gate would gather the errors of all later sequences
of its row. Heads of the largest size, 256, have no room for the dimension: the bias then has the gradient, which a GPU
sums in random order.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sbeval.errors import InputError
from sbeval.kernels import check, rope, softmax
from sbeval.models.kv_cache import Layer, through


def reference(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    total = log_f.transpose(1, 2).cumsum(-1)
    bias = total[..., k.shape[1] - q.shape[1] :, None] - total[..., None, :]
    return softmax.reference(q, k, v, scale=scale, cu_seqlens=cu_seqlens, bias=bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    check.inputs(q, k, v, cu_seqlens)
    size, heads = q.shape[3], q.shape[2]
    if log_f.shape != (*k.shape[:2], heads):
        raise InputError(f"log_f must be of shape {(*k.shape[:2], heads)}; its shape is {tuple(log_f.shape)}")
    scale = size**-0.5 if scale is None else scale
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    # (H, B, S): a GPU sums along the last dimension in parallel, along others one position after another
    total = log_f.double().permute(2, 0, 1).cumsum(-1)
    if torch.is_grad_enabled() and log_f.requires_grad and size < check.MAX_HEAD_SIZE:
        apply: Any = _Level.apply
        q, k, v = _routed(q, k, v, cast(Tensor, apply(total, cu_seqlens)), scale)
        total = total.detach()
    # flat: position p of batch entry b in head h is at (h * B + b) * S + p
    whole = total.detach().round()
    (batch, s), whole, rest = k.shape[:2], whole.flatten().to(exact), (total - whole).flatten().to(exact)
    # the gradient of the query's own sum is 0
    at_query = rest.detach()

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = (h * batch + b) * s
        return (whole[row + i] - whole[row + j]) + (at_query[row + i] - rest[row + j])

    out = softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, starts=starts, backend=backend, bias=bias)
    return out[..., :size]


def _routed(q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Add a dimension to q, k and v that adds 0 to every logit and through which the gradient of c_j flows.

    total: c, (H, B, S).
    """
    # every query head has its own c, so key-value heads can't be shared
    k, v = softmax.heads(k, v, q.shape[2])
    zero = ((total.detach() - total) / scale).permute(1, 2, 0).to(k.dtype)[..., None]
    return F.pad(q, (0, 1), value=1.0), torch.cat((k, zero), -1), F.pad(v, (0, 1))


class _Level(torch.autograd.Function):
    """c (H, B, S) as it is, with a gradient that adds up to 0 over each sequence.

    What the sum is off is taken from each position in proportion to its square, as errors of rounding are to be
    expected; so a position without a gradient keeps none.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return total.view_as(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        squares = grad.square()
        off, size = (_sums(x, cu_seqlens) for x in (grad, squares))
        # of sequences with next to no gradient the sums have errors of those before
        share = (squares / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
        return grad - share * off, None


def _sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sum over the sequence of each position of x (H, B, S), to be broadcast to its shape."""
    if cu_seqlens is None:
        return x.sum(-1, keepdim=True)
    bounds = cu_seqlens.long()
    sums = F.pad(x.cumsum(-1), (1, 0))[..., bounds].diff()
    place = torch.arange(x.shape[-1], device=x.device)
    return sums[..., torch.searchsorted(bounds, place, right=True) - 1]


def backend_name(device_type: str) -> str:
    """Name the default backend on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type, biased=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """rotary: apply RoPE, of base theta."""

    rotary: bool = False
    theta: float = 10000.0

    def __post_init__(self) -> None:
        rope.Options(theta=self.theta)


class Mixer(nn.Module):
    """Forgetting attention as the model uses it: see `registry.Method`. It computes its gates from x."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        if options.rotary:
            rope.check_size(head_dim)
        self.scale = scale
        self.options = options
        # the model initialises the weights of linear layers
        self.gate = nn.Linear(width, heads)
        nn.init.zeros_(self.gate.bias)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        if x.shape[1] != k.shape[1]:
            raise InputError(f"gates need x of all {k.shape[1]} keys; it has {x.shape[1]} positions")
        log_f = self.log_gates(x)
        if self.options.rotary:
            rotation = rope.Options(theta=self.options.theta)
            first, past = (None, 0) if cache is None else (cache.starts, cache.past)
            q, k = rope.rotated(q, k, cu_seqlens, rotation, starts=first, past=past)
        starts, (k, v, log_f) = through(cache, k, v, log_f)
        return attention(q, k, v, log_f, scale=self.scale, cu_seqlens=cu_seqlens, starts=starts)

    def log_gates(self, x: Tensor) -> Tensor:
        """Return the logarithms of the gates (B, S, H) of all positions of x (B, S, width)."""
        gates = F.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        return F.logsigmoid(gates if gates.dtype == torch.float64 else gates.float())
