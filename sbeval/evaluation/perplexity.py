"""Loss by position: one pass over documents longer than the length asked for, and what follows from it.

A window of n + 1 tokens, x_0 ... x_n, gives n losses: position i (1 <= i <= n) is the loss of x_i after the i tokens
before it. Nothing stands in front of a document (no BOS), and its first token is not scored. Log-softmax is float32, in
chunks of positions; sums are float64. Intervals are over documents, which are what was drawn at random: windows of one
document are averaged first.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.errors import InputError
from sbeval.runtime import device, distributed, oom
from sbeval.runtime.distributed import ALONE, World
from sbeval.tables import statistics
from sbeval.tables.statistics import Estimate, Floats

# tokens, of all windows together, whose logits are held at a time
CHUNK = 4096

Tokens = npt.NDArray[np.integer]


class Predictor(Protocol):
    """A model that says its logits in two steps, so that those of a long text are never held at once."""

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Hidden states (N, T, width) of tokens (N, T) int64."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., width)."""


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
        return statistics.mean(self.losses[:, first - 1 : last].mean(1))

    def perplexity(self, length: int) -> Estimate:
        """P(l) = exp of the mean loss at positions 1 ... l; the standard error by the delta method."""
        mean = self.mean(1, length)
        value = math.exp(mean.value)
        return Estimate(value, None if mean.stderr is None else value * mean.stderr, mean.n)

    def bits_per_byte(self, length: int) -> Estimate:
        """Loss at positions 1 ... l in bits per byte of their text."""
        return statistics.ratio(self.losses[:, :length].sum(1) / math.log(2), self.bytes[:, length - 1])


@dataclass(frozen=True, slots=True)
class Rolling:
    """Whole documents in disjoint windows: the summed loss of each in nats, and its tokens, words and bytes, (n,) each.

    Words are counted as lm-eval counts them: the pieces between runs of white space.
    """

    losses: Floats
    tokens: Floats
    words: Floats
    bytes: Floats

    def perplexity(self, per: str) -> Estimate:
        """exp of the loss per `token`, `word` or `byte` of all documents; the standard error by the delta method."""
        amounts = {"token": self.tokens, "word": self.words, "byte": self.bytes}[per]
        mean = statistics.ratio(self.losses, amounts)
        if mean.value > math.log(np.finfo(np.float64).max):
            raise InputError(f"the loss per {per} is {mean.value:.0f} nats: its exponential is no finite number")
        value = math.exp(mean.value)
        return Estimate(value, None if mean.stderr is None else value * mean.stderr, mean.n)

    def bits_per_byte(self) -> Estimate:
        """The loss in bits per byte of the documents."""
        return statistics.ratio(self.losses / math.log(2), self.bytes)


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
def window_losses(model: Predictor, windows: Tensor, dtype: str) -> Tensor:
    """Losses (N, n) float32 of windows (N, n + 1) int64."""
    place = windows.device
    size = max(1, CHUNK // len(windows))
    with device.autocast(place, dtype):
        hidden = model(windows[:, :-1])
        parts = [
            F.cross_entropy(model.logits(rows).flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(
                targets
            )
            for rows, targets in zip(hidden.split(size, 1), windows[:, 1:].split(size, 1), strict=True)
        ]
    return torch.cat(parts, 1)


@torch.inference_mode()
def endings(
    model: Predictor,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, Sequence[int]]],
    *,
    place: torch.device,
    dtype: str,
    width: int | None = None,
) -> list[tuple[float, bool]]:
    """For each (index of a row, targets) the log-probability in nats of the targets, and whether all are the likeliest.

    The targets are what follows the row's last tokens, one each. Rows are padded to `width` at their end, by default to
    the longest, where nothing that is scored can see it. The head runs at scored positions alone.
    """
    tokens = np.zeros((len(rows), width or max(map(len, rows))), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    counts = np.array([len(targets) for _, targets in wanted])
    row_of = np.repeat([index for index, _ in wanted], counts)
    ends = [len(rows[index]) for index, _ in wanted]
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = np.concatenate([np.asarray(targets, dtype=np.int64) for _, targets in wanted])
    there, row_at, column_at, following = (torch.from_numpy(x).to(place) for x in (tokens, row_of, places, targets))
    chances, likeliest = [], []
    with device.autocast(place, dtype):
        hidden = model(there)[row_at, column_at]
        for part, of_part in zip(hidden.split(CHUNK), following.split(CHUNK), strict=True):
            logits = model.logits(part).float()
            chances.append(-F.cross_entropy(logits, of_part, reduction="none"))
            likeliest.append(logits.argmax(-1) == of_part)
    starts = np.cumsum(counts) - counts
    sums = np.add.reduceat(torch.cat(chances).double().cpu().numpy(), starts)
    whole = np.logical_and.reduceat(torch.cat(likeliest).cpu().numpy(), starts)
    return list(zip(sums.tolist(), whole.tolist(), strict=True))


def measure(
    model: Predictor,
    windows: Sequence[tuple[int, Tokens]],
    byte_lengths: Callable[[Tokens], Tokens],
    *,
    place: torch.device,
    dtype: str,
    batch: int = 1,
    advance: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = print,
    world: World = ALONE,
) -> PositionLosses:
    """Losses by position of (document, tokens) windows, all of one length n + 1; windows of one document are averaged.

    byte_lengths: bytes of each token of an array. batch: windows a forward pass, fewer where memory ends, which `say`
    is told. advance: told how many are done. Of several processes each takes a share of the windows, and all get all
    losses.
    """
    tokens = np.stack([window for _, window in windows]).astype(np.int64)
    losses = np.zeros((len(windows), tokens.shape[1] - 1))

    def read(rows: Sequence[int]) -> None:
        losses[rows] = window_losses(model, torch.from_numpy(tokens[rows]).to(place), dtype).cpu().numpy()
        advance(len(rows) * world.size)

    oom.in_parts(range(len(windows))[world.rank :: world.size], batch, read, say)
    losses = distributed.summed(losses, world, place)
    size = np.cumsum(np.stack([byte_lengths(window[1:]) for window in tokens]), 1).astype(np.float64)
    document = np.array([index for index, _ in windows])
    groups = [document == index for index in dict.fromkeys(document.tolist())]
    return PositionLosses(*(np.stack([values[group].mean(0) for group in groups]) for values in (losses, size)))


def disjoint(tokens: Tokens, window: int, prefix: int) -> list[tuple[Tokens, int]]:
    """Windows of at most `window` + 1 tokens, and how many at the end of each are scored: every token once.

    A window's first token is all that it sees of what came before; for the first of a document it is `prefix`. The
    last reaches back to be as long as the others, as lm-eval's does. Of no tokens there are none.
    """
    text = np.concatenate([[prefix], tokens]).astype(np.int64)
    ends = [min(start + window, len(tokens)) for start in range(0, len(tokens), window)]
    return [(text[max(0, end - window) : end + 1], (end - 1) % window + 1) for end in ends]


def rolling(
    model: Predictor,
    documents: Sequence[Tokens],
    decode: Callable[[Tokens], str],
    *,
    window: int,
    prefix: int,
    place: torch.device,
    dtype: str,
    batch: int = 1,
    advance: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = print,
    world: World = ALONE,
) -> Rolling:
    """Loss of whole documents as lm-eval's `loglikelihood_rolling` has it: see `disjoint`.

    decode: the text of tokens, of which words and bytes are counted. advance: told how many tokens are done.
    """
    parts = [(index, *part) for index, tokens in enumerate(documents) for part in disjoint(tokens, window, prefix)]
    losses = np.zeros(len(documents))

    def read(rows: Sequence[int]) -> None:
        tokens = torch.from_numpy(np.stack([parts[row][1] for row in rows])).to(place)
        each = window_losses(model, tokens, dtype).double().cpu().numpy()
        found = [line[-parts[row][2] :].sum() for row, line in zip(rows, each, strict=True)]
        np.add.at(losses, [parts[row][0] for row in rows], found)
        advance(sum(parts[row][2] for row in rows) * world.size)

    for rows in list(_of_one_length(parts, batch))[world.rank :: world.size]:
        oom.in_parts(rows, batch, read, say)
    texts = [decode(tokens) for tokens in documents]
    counts = ([len(x) for x in documents], [len(re.split(r"\s+", x)) for x in texts], [len(x.encode()) for x in texts])
    return Rolling(distributed.summed(losses, world, place), *(np.array(count, dtype=np.float64) for count in counts))


def _of_one_length(parts: Sequence[tuple[int, Tokens, int]], batch: int) -> Iterable[list[int]]:
    """Indices of the parts in groups of at most `batch` that are equally long."""
    by_length: dict[int, list[int]] = {}
    for row, (_, part, _) in enumerate(parts):
        by_length.setdefault(len(part), []).append(row)
    for rows in by_length.values():
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))
