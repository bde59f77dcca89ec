"""Causal softmax attention with a temperature.

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * q_i . k_j / temperature)

q: (B, T, H, D); k, v: (B, S, G, D); cu_seqlens: int32 (N + 1,)
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sbeval.kernels import softmax
from sbeval.models.kv_cache import Layer, through


def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, temperature: float, **more: Any) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    return softmax.reference(q, k, v, scale=scale / temperature, **more)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, temperature: float, **more: Any) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D)."""
    return softmax.attention(q, k, v, scale=scale / temperature, **more)


def backend_name(device_type: str) -> str:
    """Name what runs on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the method."""

    temperature: float = 1.0


class Mixer(nn.Module):
    """The method as the model uses it: see `registry.Method`."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale, self.temperature = scale, options.temperature

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        starts, (k, v) = through(cache, k, v)
        return attention(q, k, v, scale=self.scale, temperature=self.temperature, cu_seqlens=cu_seqlens, starts=starts)
