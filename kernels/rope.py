"""RoPE: causal softmax attention over queries and keys rotated by their position (Su et al., arXiv 2104.09864, eq. 34).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * (R_i q_i) . (R_j k_j))

R_p turns the plane of the dimensions m and m + D/2 by the angle p * theta^(-2m/D), m = 0 .. D/2 - 1.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size (even)
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T
    p: the position in its sequence, from 0; k comes unrotated, from a cache too

Departures: the paper pairs the dimensions 2m and 2m + 1; here m pairs with m + D/2, as in GPT-NeoX and Llama, which is
the same up to an order of dimensions that the projections learn. Rotation happens in float32 (float64 for float64
inputs), its angles in float64, so that late positions are turned as exactly as early ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbeval.errors import InputError
from sbeval.kernels import check, softmax


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None = None, theta: float = 10000.0
) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    s, half = k.shape[1], q.shape[3] // 2
    positions = torch.arange(s, device=q.device)
    if cu_seqlens is not None:
        positions -= cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    angles = positions[:, None, None] * theta ** (-torch.arange(half, dtype=q.dtype, device=q.device) / half)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(x: Tensor) -> Tensor:
        y = torch.complex(x[..., :half], x[..., half:]) * turn[s - x.shape[1] :]
        return torch.cat((y.real, y.imag), dim=-1)

    return softmax.reference(rotated(q), rotated(k), v, scale=scale, cu_seqlens=cu_seqlens)


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the angle per position of each plane, float64 (head_dim / 2,), from 1 downwards."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / -head_dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn x, (B, T, H, D), by `angles`, float64 (T, D / 2), in the halves' pairing; keeps the dtype of x."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (f(angles).to(exact)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.to(exact).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    theta: float = 10000.0,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    check.inputs(q, k, v, cu_seqlens)
    t, s, size = q.shape[1], k.shape[1], q.shape[3]
    if size % 2:
        raise InputError(f"q has heads of size {size}; RoPE turns pairs of dimensions and needs an even size")
    positions = torch.arange(s, device=q.device) - softmax.starts(s, cu_seqlens, q.device)
    angles = positions[:, None] * frequencies(size, theta, q.device)
    q, k = rotate(q, angles[s - t :]), rotate(k, angles)
    return softmax.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, backend=backend)


def backend_name(device_type: str) -> str:
    """Name what runs on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """theta: the base of the geometric frequencies; the slowest plane turns by about 1 / theta a position."""

    theta: float = 10000.0

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise InputError(f"theta must be positive and finite; it is {self.theta}")


class Mixer(nn.Module):
    """RoPE as the model uses it: see `registry.Method`."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.theta = options.theta

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return attention(q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, theta=self.theta)
