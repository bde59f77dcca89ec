"""Held-out loss during training: how often it is computed, and on how much text."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.config import IGNORE

# validation steps of a training run, and the most tokens of each
STEPS, TOKENS = 25, 1 << 16
# the share of the cost of training that all validation steps may cost; a forward pass is a third of a training step
SHARE, FORWARD = 0.025, 1 / 3


def plan(tokens: int, length: int) -> tuple[int, int]:
    """Return the number of validation steps, and of windows of `length` in each, of a training run on `tokens`.

    There is at least one step of one window.
    """
    budget = tokens * SHARE / FORWARD
    steps = max(1, min(STEPS, int(budget // length)))
    return steps, max(1, int(min(TOKENS, budget / steps) // length))


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch: tokens and targets (B, T) int64, cu_seqlens int32 or None."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None

    def filled(self, multiple: int) -> "Rows":
        """Return the batch padded to a multiple of `multiple` rows with rows in which nothing is scored."""
        rows, length = self.tokens.shape
        more = -rows % multiple
        ends = torch.arange(rows + 1, rows + more + 1, dtype=torch.int32) * length
        return Rows(
            tokens=F.pad(self.tokens, (0, 0, 0, more)),
            targets=F.pad(self.targets, (0, 0, 0, more), value=IGNORE),
            cu_seqlens=None if self.cu_seqlens is None else torch.cat([self.cu_seqlens, ends]),
        )
