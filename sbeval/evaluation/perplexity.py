"""Loss by position, from one pass over documents longer than the evaluation length, and perplexities.

A window of n + 1 tokens, x_0 ... x_n, gives n losses: position i (1 <= i <= n) is the loss of x_i after the i tokens
before it. Documents have no BOS, and their first token is not scored. Log-softmax is float32, in chunks of positions;
sums are float64. Intervals are over documents, the units that were sampled: windows of one document are averaged first.

Losses at different positions are of different tokens. With fixed targets they are of the same ones, the last of each
window, after contexts of several lengths:

    window, n = 8      x_0 x_1 x_2 x_3 x_4 x_5 x_6 x_7 x_8
    context of 8        |----------------------| ==targets==      the last 2 losses after x_0 ... x_6 and x_0 ... x_7
    context of 4                        |------| ==targets==      the same 2 after x_4 ... x_6 and x_4 ... x_7
    8, of them 4 own    |+++++++++++++++|------| ==targets==      x_0 ... x_3 are another document's: is it the
                                                                  text that helps, or that there is more of it?
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

from sbeval.runtime import device, distributed, oom
from sbeval.runtime.distributed import ALONE, World
from sbeval.tables import statistics
from sbeval.tables.statistics import Estimate, Floats

# tokens, of all windows together, whose logits are in memory at a time
CHUNK = 4096
# the logarithm of the largest number
LARGEST = math.log(np.finfo(np.float64).max)

Tokens = npt.NDArray[np.integer]


class Predictor(Protocol):
    """A model with separate hidden states and logits, so that logits of a long text are never in memory at once."""

    @property
    def by_length(self) -> bool:
        """Whether its numbers depend on the length of a row, padding included."""

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Return hidden states (N, T, width) of tokens (N, T) int64."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return logits (..., vocabulary) of hidden states (..., width)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How forward passes run and report. batch: windows of one, halved when out of memory, which `say` reports.

    advance: called with the number of finished windows or tokens. world: of its processes each evaluates a share, and
    all return everything.
    """

    place: torch.device
    dtype: str
    batch: int = 1
    advance: Callable[[int], None] = lambda _: None
    say: Callable[[str], None] = print
    world: World = ALONE


@dataclass(frozen=True, slots=True)
class PositionLosses:
    """Losses in nats, (documents, positions) float64; column i - 1 is position i. bytes: cumulative UTF-8 bytes of the
    scored tokens, (documents, positions), NaN where they are not known."""

    losses: Floats
    bytes: Floats

    @property
    def length(self) -> int:
        return int(self.losses.shape[1])

    def mean(self, first: int, last: int) -> Estimate:
        """Return the mean loss at positions first ... last, inclusive."""
        return statistics.mean(self.losses[:, first - 1 : last].mean(1))

    def perplexity(self, length: int) -> Estimate | None:
        """Return P(l) = exp of the mean loss at positions 1 ... l: see `exponential`."""
        return exponential(self.mean(1, length))

    def bits_per_byte(self, length: int) -> Estimate | None:
        """Return the loss at positions 1 ... l in bits per byte of their text; None where its bytes are not known."""
        if np.isnan(self.bytes).any():
            return None
        return statistics.ratio(self.losses[:, :length].sum(1) / math.log(2), self.bytes[:, length - 1])


@dataclass(frozen=True, slots=True)
class Rolling:
    """Whole documents in disjoint windows: summed loss of each in nats, and its tokens, words and bytes, (n,) each.

    Words are counted as in lm-eval: the pieces between runs of white space.
    """

    losses: Floats
    tokens: Floats
    words: Floats
    bytes: Floats

    def perplexity(self, per: str) -> Estimate | None:
        """Return exp of the loss per `token`, `word` or `byte` of all documents: see `exponential`."""
        amounts = {"token": self.tokens, "word": self.words, "byte": self.bytes}[per]
        return exponential(statistics.ratio(self.losses, amounts))

    def bits_per_byte(self) -> Estimate:
        """Return the loss in bits per byte of the documents."""
        return statistics.ratio(self.losses / math.log(2), self.bytes)


def exponential(mean: Estimate) -> Estimate | None:
    """Return exp of a loss in nats, with its standard error by the delta method; None where it is not finite.

    Text without spaces has few, long words, whose perplexity is more than a number holds.
    """
    if mean.value > LARGEST:
        return None
    value = math.exp(mean.value)
    stderr = math.inf if mean.stderr is None else value * mean.stderr
    return Estimate(value, None if math.isinf(stderr) else stderr, mean.n)


def bins(length: int, per_octave: int = 4) -> list[tuple[int, int]]:
    """Return bins of positions 1 ... length, evenly spaced on a log scale: (first, last) inclusive, none empty."""
    count = math.ceil(math.log2(length) * per_octave) if length > 1 else 1
    edges = sorted({round(length ** (i / count)) for i in range(count + 1)} | {length})
    return [(1, 1)] + [(low + 1, high) for low, high in zip(edges, edges[1:], strict=False)]


def lengths(train_len: int, eval_len: int) -> list[int]:
    """Return the context lengths to report: train_len times powers of two, from 1/8 to eval_len, and eval_len."""
    steps = range(-3, math.floor(math.log2(eval_len / train_len)) + 1)
    return sorted({max(1, int(train_len * 2.0**step)) for step in steps} | {eval_len})


@torch.inference_mode()
def window_losses(model: Predictor, windows: Tensor, dtype: str, scored: int | None = None) -> Tensor:
    """Return losses (N, n) float32 of windows (N, n + 1) int64. scored: the last positions alone, (N, scored)."""
    place = windows.device
    size = max(1, CHUNK // len(windows))
    first = 0 if scored is None else windows.shape[1] - 1 - scored
    with device.autocast(place, dtype):
        hidden = model(windows[:, :-1])[:, first:]
        parts = [
            F.cross_entropy(model.logits(rows).flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(
                targets
            )
            for rows, targets in zip(hidden.split(size, 1), windows[:, 1 + first :].split(size, 1), strict=True)
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
    """Return the log-probability in nats of each (index of a row, targets), and whether all targets are likeliest.

    The n targets follow the row's last n tokens, one each. Rows are padded on the right to `width`, by default to the
    longest row, after all scored positions; those of a model that is `by_length` run without padding, equally long ones
    together. The head runs at scored positions alone.
    """
    if model.by_length:
        width = None
        if len(set(map(len, rows))) > 1:
            return _of_each_length(model, rows, wanted, place, dtype)
    tokens = np.zeros((len(rows), width or max(map(len, rows))), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    counts = np.array([len(targets) for _, targets in wanted])
    row_of = np.repeat([index for index, _ in wanted], counts)
    ends = [len(rows[index]) for index, _ in wanted]
    columns = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = np.concatenate([np.asarray(targets, dtype=np.int64) for _, targets in wanted])
    inputs, row_at, column_at, following = (torch.from_numpy(x).to(place) for x in (tokens, row_of, columns, targets))
    log_probabilities, greedy = [], []
    with device.autocast(place, dtype):
        hidden = model(inputs)[row_at, column_at]
        for part, of_part in zip(hidden.split(CHUNK), following.split(CHUNK), strict=True):
            logits = model.logits(part).float()
            log_probabilities.append(-F.cross_entropy(logits, of_part, reduction="none"))
            greedy.append(logits.argmax(-1) == of_part)
    starts = np.cumsum(counts) - counts
    sums = np.add.reduceat(torch.cat(log_probabilities).double().cpu().numpy(), starts)
    whole = np.logical_and.reduceat(torch.cat(greedy).cpu().numpy(), starts)
    return list(zip(sums.tolist(), whole.tolist(), strict=True))


def _of_each_length(
    model: Predictor,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, Sequence[int]]],
    place: torch.device,
    dtype: str,
) -> list[tuple[float, bool]]:
    found: dict[int, tuple[float, bool]] = {}
    for length in set(map(len, rows)):
        chosen = [index for index, row in enumerate(rows) if len(row) == length]
        of_row = {index: part for part, index in enumerate(chosen)}
        asked = [number for number, (index, _) in enumerate(wanted) if index in of_row]
        if asked:
            part = [(of_row[wanted[number][0]], wanted[number][1]) for number in asked]
            results = endings(model, [rows[index] for index in chosen], part, place=place, dtype=dtype)
            found |= zip(asked, results, strict=True)
    return [found[number] for number in range(len(wanted))]


def measure(
    model: Predictor,
    windows: Sequence[tuple[int, Tokens]],
    byte_lengths: Callable[[Tokens], Tokens] | None,
    how: Execution,
) -> PositionLosses:
    """Return losses by position of (document, tokens) windows of length n + 1, averaged over each document's windows.

    byte_lengths: bytes of each token of an array, None where they are not known.
    """
    tokens = np.stack([window for _, window in windows]).astype(np.int64)
    losses = _losses(model, tokens, None, how)
    size = np.full(losses.shape, np.nan)
    if byte_lengths is not None:
        size = np.cumsum(np.stack([byte_lengths(window[1:]) for window in tokens]), 1).astype(np.float64)
    return PositionLosses(*(_by_document(values, windows) for values in (losses, size)))


def fixed_targets(
    model: Predictor,
    windows: Sequence[tuple[int, Tokens]],
    how: Execution,
    *,
    targets: int,
    context: int,
    own: int | None = None,
) -> Floats:
    """Return the losses of the last `targets` tokens of the windows of each document, (documents, targets).

    The model reads the `context` tokens of each window before its last one; see the module. With `own`, of these only
    so many nearest ones; those further back are from the window of the next other document, at the same places. It
    raises ValueError if there is none, and if some targets are further back.
    """
    tokens = np.stack([window[-context - 1 :] for _, window in windows]).astype(np.int64)
    if own is not None:
        if own < targets:
            raise ValueError(f"{own} tokens of its own have fewer than {targets} targets")
        tokens[:, : context - own] = tokens[_others([document for document, _ in windows]), : context - own]
    return _by_document(_losses(model, tokens, targets, how), windows)


def _others(documents: Sequence[int]) -> list[int]:
    """Return for each window the number of the next one, in a circle, of another document."""
    if len(set(documents)) < 2:
        raise ValueError("all windows are of one document")
    rounds = [*documents, *documents]
    ahead = ((at, documents[at], rounds[at + 1 :]) for at in range(len(documents)))
    return [
        (at + 1 + next(step for step, other in enumerate(rest) if other != mine)) % len(documents)
        for at, mine, rest in ahead
    ]


def _losses(model: Predictor, tokens: npt.NDArray[np.int64], scored: int | None, how: Execution) -> Floats:
    """Return the losses of windows (N, n + 1); see `window_losses`."""
    losses = np.zeros((len(tokens), scored or tokens.shape[1] - 1))

    def evaluate(rows: Sequence[int]) -> None:
        part = torch.from_numpy(tokens[rows]).to(how.place)
        losses[rows] = window_losses(model, part, how.dtype, scored).cpu().numpy()
        how.advance(len(rows) * how.world.size)

    oom.in_parts(range(len(tokens))[how.world.rank :: how.world.size], how.batch, evaluate, how.say)
    return distributed.summed(losses, how.world, how.place)


def _by_document(values: Floats, windows: Sequence[tuple[int, Tokens]]) -> Floats:
    """Return the mean over the windows of each document, (documents, ...), in the order of their first windows."""
    document = np.array([index for index, _ in windows])
    return np.stack([values[document == index].mean(0) for index in dict.fromkeys(document.tolist())])


def disjoint(tokens: Tokens, window: int, prefix: int) -> list[tuple[Tokens, int]]:
    """Return windows of at most `window` + 1 tokens, and how many at the end of each are scored: every token once.

    A window's first token is its only context; for the first window of a document it is `prefix`. The last window
    begins earlier, to be as long as the others, as in lm-eval. Without tokens there are no windows.
    """
    text = np.concatenate([[prefix], tokens]).astype(np.int64)
    ends = [min(start + window, len(tokens)) for start in range(0, len(tokens), window)]
    return [(text[max(0, end - window) : end + 1], (end - 1) % window + 1) for end in ends]


def rolling(
    model: Predictor,
    documents: Sequence[Tokens],
    texts: Sequence[str],
    how: Execution,
    *,
    window: int,
    prefix: Sequence[int],
) -> Rolling:
    """Return the loss of whole documents as lm-eval's `loglikelihood_rolling` defines it: see `disjoint`.

    texts: of the documents, in which words and bytes are counted. prefix: tokens before each document, the first of
    which is context alone and others are scored. Of shorter windows as many tokens are in a pass. Documents shorter
    than a window are padded at their end to one of few lengths, so that many share a pass and a shape; not those of a
    model that is `by_length`.
    """
    whole = [np.concatenate([prefix[1:], tokens]) for tokens in documents]
    parts = [(index, *part) for index, tokens in enumerate(whole) for part in disjoint(tokens, window, prefix[0])]
    losses = np.zeros(len(documents))

    def evaluate(rows: Sequence[int]) -> None:
        lengths = [len(parts[row][1]) for row in rows]
        width = max(lengths) if model.by_length else _shared(max(lengths) - 1, window) + 1
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        for line, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[line, :length] = parts[row][1]
        each = window_losses(model, torch.from_numpy(tokens).to(how.place), how.dtype).double().cpu().numpy()
        for line, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            index, _, scored = parts[row]
            losses[index] += each[line, length - 1 - scored : length - 1].sum()
        how.advance(sum(parts[row][2] for row in rows) * how.world.size)

    widths = [len(part) - 1 if model.by_length else _shared(len(part) - 1, window) for _, part, _ in parts]
    for rows in list(_of_one_length(widths, how.batch * window))[how.world.rank :: how.world.size]:
        oom.in_parts(rows, len(rows), evaluate, how.say)
    counts = ([len(x) for x in whole], [len(re.split(r"\s+", x)) for x in texts], [len(x.encode()) for x in texts])
    return Rolling(
        distributed.summed(losses, how.world, how.place), *(np.array(count, dtype=np.float64) for count in counts)
    )


def _shared(length: int, window: int) -> int:
    """Return a length that few others share, of two an octave, and at most `window`: at least `length`."""
    octave = 1 << max(6, (length - 1).bit_length())
    return min(window, octave * 3 // 4 if length <= octave * 3 // 4 else octave)


def _of_one_length(lengths: Sequence[int], tokens: int) -> Iterable[list[int]]:
    """Yield the indices of lengths, equal ones together, in groups of at most so many tokens, or of one."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    for length, rows in by_length.items():
        batch = max(1, tokens // length)
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))
