"""ALiBi: causal softmax attention with a penalty linear in distance (Press et al., arXiv 2108.12409, section 3).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * q_i . k_j - m_h * (i - j))

The slope m_h of head h = 1 .. H is 2^(-8 h / H) when H is a power of two; otherwise the slopes of the power of two
below H come first, then every second slope of the power of two above. `scale` does not apply to the penalty.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbeval.kernels import softmax
from sbeval.models.kv_cache import Layer, through


def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    t, s, heads = q.shape[1], k.shape[1], q.shape[2]
    positions = torch.arange(s, dtype=q.dtype, device=q.device)
    distance = positions[s - t :, None] - positions
    bias = -slopes(heads, dtype=q.dtype, device=q.device)[:, None, None] * distance
    return softmax.reference(q, k, v, scale=scale, cu_seqlens=cu_seqlens, bias=bias)


def slopes(heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return m of each head, (heads,), for any number of heads."""
    below = 1 << (heads.bit_length() - 1)
    whole = torch.arange(1, below + 1, dtype=torch.float64, device=device)
    halves = torch.arange(heads - below, dtype=torch.float64, device=device) + 0.5
    return (2.0 ** (-8 / below * torch.cat((whole, halves)))).to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    m = slopes(q.shape[2], dtype=exact, device=q.device)

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return m[h] * (j - i)

    return softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, starts=starts, backend=backend, bias=bias)


def backend_name(device_type: str) -> str:
    """Name the default backend on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type, biased=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """ALiBi has no options."""


class Mixer(nn.Module):
    """ALiBi as the model uses it: see `registry.Method`."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        starts, (k, v) = through(cache, k, v)
        return attention(q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, starts=starts)
