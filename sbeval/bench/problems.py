"""Problems of the kernel benchmarks: their sizes, their inputs, and the work that they are."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sbeval.config import LATER

# half the distance from 1 to the next float32: the kernel's own default
EPSILON = 2.0**-24


# without slots, which only one base of a row may have
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a problem, and columns of its rows: `queries` of `keys` positions."""

    step: str  # forward, forward_backward, decode; train, evaluate
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Sizes):
    """One kernel benchmark. `bounds`: cumulative lengths of packed sequences. `logit_mean`: of inputs drawn around it,
    at the default scale; standard normal ones when None."""

    bounds: tuple[int, ...] = ()
    epsilon: float = 0.0
    logit_mean: float | None = field(default=None, metadata=LATER)

    @property
    def flops(self) -> float:
        lengths = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        pairs = sum(n * n / 2 for n in lengths) if lengths else self.queries * (self.keys - self.queries / 2)
        return 4 * self.batch * self.heads * self.head_dim * pairs * (3.5 if self.step == "forward_backward" else 1)

    @property
    def factors(self) -> dict[str, Any]:
        """Columns of the problem in a row."""
        sizes = dataclasses.asdict(self)
        bounds = sizes.pop("bounds")
        return sizes | {"sequences": max(1, len(bounds) - 1)}

    @property
    def title(self) -> str:
        group = "" if self.heads == self.kv_heads else f"/{self.kv_heads}"
        packed = f" in {len(self.bounds) - 1} documents" if self.bounds else ""
        skips = f" epsilon {self.epsilon:.0e}" if self.epsilon else ""
        skips += "" if self.logit_mean is None else ", sticks that last"
        return f"{self.batch}x{self.keys} {self.heads}{group}x{self.head_dim}{packed}{skips}"

    @property
    def cache_bytes(self) -> float:
        """Bytes that decoding reads: keys and values in 16 bits."""
        return 4.0 * self.batch * self.keys * self.kv_heads * self.head_dim

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        return torch.tensor(self.bounds, dtype=torch.int32, device=device) if self.bounds else None

    def draw(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)]
        q, k, v = (torch.randn(self.batch, n, heads, self.head_dim, device=device, dtype=dtype) for n, heads in shapes)
        if self.logit_mean is not None:
            # one coordinate of its own makes the mean
            q[..., 0], k[..., 0] = self.logit_mean * self.head_dim**0.5, 1.0
        return q, k, v


def problems(
    lengths: Sequence[int], head_dims: Sequence[int], heads: int, caches: Sequence[int] = (16384, 65536)
) -> list[Problem]:
    """Return dense problems at 16,384 tokens a batch or one sequence, with epsilon 0 and with the default where nothing
    can be skipped, since other code runs then; grouped heads; packed documents; a problem that skips; decoding."""
    found = []
    for dim in head_dims:
        for length in lengths:
            batch = max(1, 16384 // length)
            sizes: dict[str, Any] = {"batch": batch, "queries": length, "keys": length, "heads": heads, "head_dim": dim}
            for step in ("forward", "forward_backward"):
                found.append(Problem(step=step, kv_heads=heads, **sizes))
                # each key takes about one in `length` of the stick: the oldest still find some
                lasting = -math.log(length)
                found.append(Problem(step=step, kv_heads=heads, epsilon=EPSILON, logit_mean=lasting, **sizes))
        longest: dict[str, Any] = {
            "batch": 1,
            "queries": lengths[-1],
            "keys": lengths[-1],
            "heads": heads,
            "head_dim": dim,
        }
        for step in ("forward", "forward_backward"):
            found.append(Problem(step=step, kv_heads=max(1, heads // 4), **longest))
            found.append(Problem(step=step, kv_heads=heads, bounds=_documents(lengths[-1]), **longest))
            found.append(Problem(step=step, kv_heads=heads, epsilon=EPSILON, **longest))
        for batch in (1, 32):
            for keys in caches:
                cache: dict[str, Any] = {"batch": batch, "queries": 1, "keys": keys, "heads": heads, "head_dim": dim}
                found.append(Problem(step="decode", kv_heads=max(1, heads // 4), **cache))
    return found


def _documents(length: int) -> tuple[int, ...]:
    """Return bounds of documents that fill a row; lengths are log-normal, half of them between 500 and 4000 tokens."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < length:
        drawn = math.exp(7.25 + 1.04 * float(torch.randn((), generator=generator)))
        bounds.append(min(length, bounds[-1] + max(1, round(drawn))))
    return tuple(bounds)
