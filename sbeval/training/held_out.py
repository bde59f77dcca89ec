"""Held-out text while a model trains: how much of it is looked at, and how often."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.models.decoder import IGNORE

# looks at held-out text in a training, and tokens of each at most
LOOKS, TOKENS = 25, 1 << 16
# what all looks may cost, of what training costs; a forward pass is a third of a step
SHARE, FORWARD = 0.025, 1 / 3


def plan(tokens: int, length: int) -> tuple[int, int]:
    """Looks, and windows of `length` for each, in a training on so many tokens; at least one of one window."""
    budget = tokens * SHARE / FORWARD
    looks = max(1, min(LOOKS, int(budget // length)))
    return looks, max(1, int(min(TOKENS, budget / looks) // length))


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch: tokens and targets (B, T) int64, cu_seqlens int32 or None."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None

    def filled(self, multiple: int) -> "Rows":
        """The same with rows in which nothing is scored, up to a multiple of so many."""
        rows, length = self.tokens.shape
        more = -rows % multiple
        ends = torch.arange(rows + 1, rows + more + 1, dtype=torch.int32) * length
        return Rows(
            tokens=F.pad(self.tokens, (0, 0, 0, more)),
            targets=F.pad(self.targets, (0, 0, 0, more), value=IGNORE),
            cu_seqlens=None if self.cu_seqlens is None else torch.cat([self.cu_seqlens, ends]),
        )
