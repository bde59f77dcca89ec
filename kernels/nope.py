"""NoPE: causal softmax attention with no positional encoding (Kazemnejad et al., arXiv 2305.19466).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * q_i . k_j)

The model learns positions from the causal mask alone.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T
"""

from dataclasses import dataclass

from torch import Tensor, nn

from sbeval.kernels import softmax
from sbeval.models.kv_cache import Layer, through


def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    return softmax.reference(q, k, v, scale=scale, cu_seqlens=cu_seqlens)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    return softmax.attention(
        q, k, v, scale=scale, cu_seqlens=cu_seqlens, longest=longest, starts=starts, backend=backend
    )


def backend_name(device_type: str) -> str:
    """Name the default backend on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """NoPE has no options."""


class Mixer(nn.Module):
    """NoPE as the model uses it: see `registry.Method`."""

    # of softmax.BACKENDS, for who compares them
    backend: str | None = None

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Layer | None = None,
        longest: int | None = None,
    ) -> Tensor:
        starts, (k, v) = through(cache, k, v)
        return attention(
            q,
            k,
            v,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            longest=longest,
            starts=starts,
            backend=self.backend,
        )
