"""Sliding window: causal softmax attention with RoPE over the last W positions (Beltagy et al., arXiv 2004.05150).

    o_i = sum_j a_ij v_j        a_ij = softmax over j = max(0, i - W + 1) .. i of  scale * (R_i q_i) . (R_j k_j)

W = `window` counts the query's own position. Queries and keys are rotated as in `rope`, by positions in the whole
sequence, as in the softmax baselines of arXiv 2410.17980, figure 5; `rotary=false` does not rotate.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T

Time is linear in length too: keys before the window are skipped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbeval.errors import InputError
from sbeval.kernels import check, rope, softmax
from sbeval.models.kv_cache import Layer, through


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """window: keys that a query sees, itself included. rotary: apply RoPE, of base theta."""

    window: int = 512
    rotary: bool = True
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window must be at least 1, the query's own position; it is {self.window}")
        rope.Options(theta=self.theta)


DEFAULT = Options()


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None = None, options: Options = DEFAULT
) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    t, s = q.shape[1], k.shape[1]
    outside = torch.zeros(t, s, dtype=q.dtype, device=q.device)
    outside.masked_fill_(torch.ones_like(outside).tril(s - t - options.window).bool(), -torch.inf)
    if options.rotary:
        q, k = rope.rotated(q, k, cu_seqlens, rope.Options(theta=options.theta))
    return softmax.reference(q, k, v, scale=scale, cu_seqlens=cu_seqlens, bias=outside)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    options: Options = DEFAULT,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    check.inputs(q, k, v, cu_seqlens)
    if options.rotary:
        q, k = rope.rotated(q, k, cu_seqlens, rope.Options(theta=options.theta))
    return softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, backend=backend, window=options.window)


def backend_name(device_type: str) -> str:
    """Name the default backend on a device of this type, `cpu` or `cuda`, for sequences longer than the window."""
    return softmax.backend_name(device_type, biased=True)


class Mixer(nn.Module):
    """Attention in a window as the model uses it: see `registry.Method`."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        if options.rotary:
            rope.check_size(head_dim)
        self.scale = scale
        self.options = options

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        if cache is None:
            return attention(q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, options=self.options)
        if self.options.rotary:
            rotation = rope.Options(theta=self.options.theta)
            q, k = rope.rotated(q, k, cu_seqlens, rotation, starts=cache.starts, past=cache.past)
        starts, (k, v) = through(cache, k, v)
        return softmax.attention(
            q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, starts=starts, window=self.options.window
        )
