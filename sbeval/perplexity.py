"""Loss by position: one pass over documents longer than the length asked for, and what follows from it.

A window of n + 1 tokens, x_0 ... x_n, gives n losses: position i (1 <= i <= n) is the loss of x_i after the i tokens
before it. Nothing stands in front of a document (no BOS), and its first token is not scored. Log-softmax is float32, in
chunks of positions; sums are float64. Intervals are over documents, which are what was drawn at random: windows of one
document are averaged first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval import device, estimate
from sbeval.estimate import Estimate, Floats
from sbeval.model import Decoder

# positions whose logits are held at a time
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class PositionLosses:
    """Losses in nats, (documents, positions) float64; column i - 1 is position i. Bytes that the scored tokens of each
    document stand for, (documents, positions) cumulative."""

    losses: Floats
    bytes: Floats

    @property
    def length(self) -> int:
        return int(self.losses.shape[1])

    def mean(self, first: int, last: int) -> Estimate:
        """Mean loss at positions first ... last, both included."""
        return estimate.mean(self.losses[:, first - 1 : last].mean(1))

    def perplexity(self, length: int) -> Estimate:
        """P(l) = exp of the mean loss at positions 1 ... l; the standard error by the delta method."""
        mean = self.mean(1, length)
        value = math.exp(mean.value)
        return Estimate(value, None if mean.stderr is None else value * mean.stderr, mean.n)

    def bits_per_byte(self, length: int) -> Estimate:
        """Loss at positions 1 ... l in bits per byte of their text."""
        return estimate.ratio(self.losses[:, :length].sum(1) / math.log(2), self.bytes[:, length - 1])


def bins(length: int, per_octave: int = 4) -> list[tuple[int, int]]:
    """Positions 1 ... length in bins evenly spaced on a log scale: (first, last), both included, none empty."""
    count = math.ceil(math.log2(length) * per_octave) if length > 1 else 1
    edges = sorted({round(length ** (i / count)) for i in range(count + 1)} | {length})
    return [(1, 1)] + [(low + 1, high) for low, high in zip(edges, edges[1:], strict=False)]


def lengths(train_len: int, eval_len: int) -> list[int]:
    """Context lengths to report: powers of two times train_len on both sides of it, from 1/8 of it, and eval_len."""
    steps = range(-3, math.floor(math.log2(eval_len / train_len)) + 1)
    return sorted({max(1, int(train_len * 2.0**step)) for step in steps} | {eval_len})


@torch.inference_mode()
def window_losses(model: Decoder, windows: Tensor, dtype: str) -> Tensor:
    """Losses (N, n) float32 of windows (N, n + 1) int64."""
    place = windows.device
    with device.autocast(place, dtype):
        hidden = model(windows[:, :-1])
        parts = [
            F.cross_entropy(model.logits(rows).flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(
                targets
            )
            for rows, targets in zip(hidden.split(CHUNK, 1), windows[:, 1:].split(CHUNK, 1), strict=True)
        ]
    return torch.cat(parts, 1)


def measure(
    model: Decoder,
    windows: Sequence[tuple[int, npt.NDArray[np.integer]]],
    count_bytes: Callable[[npt.NDArray[np.integer]], npt.NDArray[np.integer]],
    *,
    place: torch.device,
    dtype: str,
    batch: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> PositionLosses:
    """Losses by position of (document, tokens) windows, all of one length n + 1; windows of one document are averaged.

    count_bytes: bytes of each token of an array. batch: windows a forward pass. advance: told how many are done.
    """
    tokens = np.stack([window for _, window in windows]).astype(np.int64)
    losses = np.empty((len(windows), tokens.shape[1] - 1))
    for start in range(0, len(windows), batch):
        part = torch.from_numpy(tokens[start : start + batch]).to(place)
        losses[start : start + batch] = window_losses(model, part, dtype).cpu().numpy()
        advance(len(part))
    size = np.cumsum(np.stack([count_bytes(window[1:]) for window in tokens]), 1).astype(np.float64)
    document = np.array([index for index, _ in windows])
    groups = [document == index for index in dict.fromkeys(document.tolist())]
    return PositionLosses(*(np.stack([values[group].mean(0) for group in groups]) for values in (losses, size)))
