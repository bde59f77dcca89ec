"""Diagnostics of retrieval: does a model copy what it has read, from how far, and with which heads?

No fine-tuning and no format of answers, so that they can be followed over training. R is a row of random tokens, P and
Q are passages of 64 tokens of unseen text, F the text that follows P:

    copy_gain          R R        loss on the first copy minus loss on the second, n tokens after it
    passage_gain       P F P      loss on the last P of Q F P minus that of P F P, P being repeated after d tokens
    prefix_matching    R R        weight on the token behind the last occurrence of the query's token (induction heads)
    in_context_score   text       loss around token 500 minus loss around token 50: negative where context helps

The last two are those of Olsson et al. 2022 (arXiv 2209.11895), the scores averaged over 17 positions each to be less
noisy. Reach, over queries in the second half of rows of text, is

    weight_beyond      1 minus the weight on the k keys before the query (and on its own, unless that gets the remainder
                       of stick-breaking: then it is the stick that is left after k keys)
    mean_distance      mean of the weights' distances in tokens; own position, and with it the remainder: 0
    gate_half_life     tokens after which the product of a head's mean gate is 1/2 (forgetting attention)

Weights are read off the mixers by one-hot values (see `sbeval.models.attention_weights`), without code per method.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sbeval.data.corpus import Split
from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Predictor
from sbeval.models.attention_weights import mixed_weights, mixer_inputs
from sbeval.models.config import ModelConfig, flops_per_token, parse_attention
from sbeval.models.decoder import Decoder
from sbeval.runtime import oom
from sbeval.tables import statistics

PASSAGE = 64
# tokens between the copies of random rows, and between those of passages
COPIES = tuple(64 << 2 * power for power in range(5))
DISTANCES = tuple(128 << power for power in range(10))
# keys after which weights are summed
NEAR = (16, 64, 512)
# middles of the two stretches of the in-context score, and positions on each side of them
EARLY, LATE, AROUND = 50, 500, 8
# tokens of a row of text whose reach is measured
REACH = 1024
# the share of the cost of training that all diagnoses may cost, by FLOPs; training is compiled, they are not
SHARE = 0.01
# tokens in a forward pass
TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}

Rows = npt.NDArray[np.int64]
# q, k, v and x of a mixer; metric, unit and distance of a reading
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Name = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One number: a mean over n rows of tokens. Layers and heads count from 1; distance is n, d or k of the module."""

    metric: str
    unit: str
    value: float
    stderr: float | None
    n: int
    layer: int | None = None
    head: int | None = None
    distance: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: the longest distance, and a divisor of the numbers of rows."""

    longest: int
    divisor: int = 1

    def rows(self, tokens: int, length: int, least: int) -> int:
        """Return how many rows of `length` tokens there are of `tokens` in all."""
        return max(least, tokens // length // self.divisor)

    @property
    def copies(self) -> dict[int, int]:
        """Return the number of rows of each length of random tokens."""
        return {n: self.rows(1 << 13, 2 * n, 2) for n in COPIES if n <= self.longest}

    @property
    def passages(self) -> dict[int, int]:
        """Return the number of passages for each distance."""
        return {d: min(16, self.rows(1 << 14, d + 2 * PASSAGE, 4)) for d in DISTANCES if d <= self.longest}

    def flops(self, shape: ModelConfig, train_len: int) -> float:
        """Return the approximate cost of one diagnosis."""
        lengths = [(2 * n, rows) for n, rows in self.copies.items()]
        lengths += [(d + 2 * PASSAGE, 2 * rows) for d, rows in self.passages.items()]
        lengths.append((LATE + AROUND, self.rows(1 << 15, LATE, 16)))
        total = sum(flops_per_token(shape, length) * length * rows for length, rows in lengths)
        for length, rows in (2 * COPIES[0], 4), (_reach(train_len), 2):
            # each reading runs the mixers alone
            mixers = flops_per_token(shape, length) - flops_per_token(shape, 0)
            total += (flops_per_token(shape, length) + mixers * -(-length // shape.d_head)) * length * rows
        return total


def plan(shape: ModelConfig, train_len: int, train_tokens: int, times: int) -> tuple[int, Size]:
    """Return how often a training is diagnosed, at most `times`, and with how much, within SHARE of its cost.

    It is diagnosed once at least.
    """
    budget = SHARE * 3 * flops_per_token(shape, train_len) * train_tokens
    sizes = [Size(distance) for distance in reversed(DISTANCES) if distance >= 4096]
    sizes += [Size(distance, divisor) for divisor in (2, 4) for distance in (4096, 2048, 1024, 512)]
    sizes += [Size(DISTANCES[0], 8)]
    for size in sizes:
        if times * size.flops(shape, train_len) <= budget:
            return times, size
    return max(1, int(budget / sizes[-1].flops(shape, train_len))), sizes[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The rows of tokens that are read: the same for every method and at every time.

    copies: (rows, 2 n) by n. passages: by distance, (2 rows, d + 2 PASSAGE), all P F P, then all Q F P. prefix: copies
    for prefix matching. context and reach: text. Where the text has no long enough documents, a probe is absent.
    """

    copies: dict[int, Rows]
    passages: dict[int, Rows]
    prefix: Rows | None = None
    context: Rows | None = None
    reach: Rows | None = None


def probes(text: Split, vocab_size: int, eos: int, size: Size, train_len: int, above: int = 0) -> Probes:
    """Draw the probes. above: only those of longer distances, and without those that have no distance."""
    generator = np.random.default_rng(0)
    copies = {n: _copies(generator, n, rows, vocab_size, eos) for n, rows in size.copies.items()}
    passages = {}
    for distance, rows in size.passages.items():
        if (found := _windows(text, PASSAGE + distance, rows + 1)) is not None and len(found) > 1:
            first, rest = found[:-1, :PASSAGE], found[:-1, PASSAGE:]
            # another passage in the first's place
            other = np.roll(found[:, :PASSAGE], 1, 0)[:-1]
            passages[distance] = np.concatenate([np.concatenate([start, rest, first], 1) for start in (first, other)])
    if above:
        far = [{key: rows for key, rows in by.items() if key > above} for by in (copies, passages)]
        return Probes(copies=far[0], passages=far[1])
    return Probes(
        copies=copies,
        passages=passages,
        prefix=copies[COPIES[0]][:4],
        context=_windows(text, LATE + AROUND + 1, size.rows(1 << 15, LATE, 16), middle=True),
        reach=_windows(text, _reach(train_len), 2, middle=True),
    )


def _copies(generator: np.random.Generator, n: int, rows: int, vocab_size: int, eos: int) -> Rows:
    tokens = generator.integers(0, vocab_size - 1, (rows, n))
    # all tokens but the separator
    tokens += tokens >= eos
    return np.concatenate([tokens, tokens], 1)


def copy_gain(model: Predictor, n: int, vocab_size: int, eos: int, place: torch.device, dtype: str) -> Reading:
    """Return the gain from copying n random tokens, of a model in evaluation mode."""
    rows = Size(n).rows(1 << 13, 2 * n, 2)
    copies = {n: _copies(np.random.default_rng(0), n, rows, vocab_size, eos)}
    (reading,) = gains(model, Probes(copies=copies, passages={}), place, dtype)
    return reading


def _reach(train_len: int) -> int:
    return min(REACH, train_len)


def _windows(text: Split, length: int, rows: int, *, middle: bool = False) -> Rows | None:
    """Return windows of `length` tokens, evenly spread over all documents; None where these are too short.

    middle: not from their beginning where they are long enough.
    """
    starts = []
    for document in np.flatnonzero(text.lengths >= length):
        last = int(text.lengths[document]) - length
        starts += [(int(document), start) for start in range(min(length, last) if middle else 0, last + 1, length)]
    if not starts:
        return None
    chosen = [starts[index] for index in np.linspace(0, len(starts) - 1, min(rows, len(starts))).round().astype(int)]
    return np.stack([text.document(document)[start : start + length] for document, start in chosen]).astype(np.int64)


def measure(
    model: Predictor, given: Probes, place: torch.device, dtype: str, say: Callable[[str], None] = print
) -> list[Reading]:
    """Return all readings of a model in evaluation mode; those by head of our decoder alone."""
    out = gains(model, given, place, dtype, say)
    if isinstance(model, Decoder):
        out += heads(model, given, place, dtype, say)
    return out


def gains(
    model: Predictor, given: Probes, place: torch.device, dtype: str, say: Callable[[str], None] = print
) -> list[Reading]:
    """Return the readings of a whole model, which are differences of losses."""

    def losses(tokens: Rows, scored: int | None = None) -> npt.NDArray[np.float64]:
        out = np.zeros((len(tokens), scored or tokens.shape[1] - 1))

        def evaluate(rows: Sequence[int]) -> None:
            part = torch.from_numpy(tokens[rows]).to(place)
            out[rows] = perplexity.window_losses(model, part, dtype, scored).double().cpu().numpy()

        oom.in_parts(range(len(tokens)), max(1, TOKENS[place.type] // tokens.shape[1]), evaluate, say)
        return out

    out = []
    for n, tokens in given.copies.items():
        each = losses(tokens)
        # the first token of a copy can't be known
        out.append(_reading("copy_gain", "nats/token", each[:, : n - 1].mean(1) - each[:, n:].mean(1), distance=n))
    for distance, tokens in given.passages.items():
        same, other = np.split(losses(tokens, PASSAGE - 1).mean(1), 2)
        out.append(_reading("passage_gain", "nats/token", other - same, distance=distance))
    if given.context is not None:
        each = losses(given.context)
        early, late = (each[:, middle - AROUND - 1 : middle + AROUND].mean(1) for middle in (EARLY, LATE))
        out.append(_reading("in_context_score", "nats/token", late - early))
    return out


def heads(
    model: Decoder, given: Probes, place: torch.device, dtype: str, say: Callable[[str], None] = print
) -> list[Reading]:
    """Return the readings of every head."""
    stick = parse_attention(model.config.attention)[0] == "stick_breaking"

    def matching(mixer: nn.Module, inputs: Inputs) -> dict[Name, Tensor]:
        weights = mixed_weights(mixer, *inputs)
        return {("prefix_matching", "1", weights.shape[-1] // 2): prefix_matching(weights)}

    def reaching(mixer: nn.Module, inputs: Inputs) -> dict[Name, Tensor]:
        weights, life = mixed_weights(mixer, *inputs), half_life(mixer, inputs[3])
        near = [k for k in NEAR if 2 * k <= weights.shape[-1]]
        found: dict[Name, Tensor] = {
            ("weight_beyond", "1", k): weight_beyond(weights, k, own=not stick) for k in near
        } | {("mean_distance", "tokens", None): mean_distance(weights)}
        return found if life is None else found | {("gate_half_life", "tokens", None): life}

    out: list[Reading] = []
    for tokens, read in ((given.prefix, matching), (given.reach, reaching)):
        if tokens is not None:
            out += _by_layer(model, tokens, read, place, dtype, say)
    return out


def _by_layer(
    model: Decoder,
    tokens: Rows,
    read: Callable[[nn.Module, Inputs], dict[Name, Tensor]],
    place: torch.device,
    dtype: str,
    say: Callable[[str], None],
) -> Iterator[Reading]:
    """Yield what `read` gives of each layer, (B, H) by name, over all rows; they are halved when out of memory."""
    parts: list[list[dict[Name, Tensor]]] = []

    def evaluate(rows: Sequence[int]) -> None:
        part = torch.from_numpy(tokens[rows]).to(place)
        parts.append([read(mixer, inputs) for mixer, inputs in mixer_inputs(model, part, dtype)])

    oom.in_parts(range(len(tokens)), len(tokens), evaluate, say)
    for layer, same in enumerate(zip(*parts, strict=True), 1):
        for metric, unit, distance in same[0]:
            values = torch.cat([part[metric, unit, distance] for part in same])
            for head, each in enumerate(values.double().T.cpu().numpy(), 1):
                yield _reading(metric, unit, each, layer=layer, head=head, distance=distance)


def prefix_matching(weights: Tensor) -> Tensor:
    """Return the mean weight (B, H) of a second copy's tokens on those behind the same tokens of the first.

    weights: (B, H, 2 n, 2 n). The last token of the second copy does not count: the same token of the first is followed
    by the second copy.
    """
    n = weights.shape[-1] // 2
    return weights.diagonal(1 - n, -2, -1)[..., 1:-1].mean(-1)


def weight_beyond(weights: Tensor, keys: int, *, own: bool) -> Tensor:
    """Return 1 minus the weight (B, H) on the `keys` keys before a query, and on its own where `own`.

    The mean over queries of the second half of (B, H, T, T), all of which have so many keys.
    """
    half = weights.shape[-1] // 2
    near = torch.ones_like(weights[0, 0]).tril(0 if own else -1).triu(-keys)
    return 1 - (weights * near).sum(-1)[..., half:].mean(-1)


def mean_distance(weights: Tensor) -> Tensor:
    """Return the mean distance (B, H) in tokens from queries of the second half of (B, H, T, T) to their keys."""
    position = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    distance = (position[:, None] - position).clamp(min=0)
    return (weights * distance).sum(-1)[..., weights.shape[-1] // 2 :].mean(-1)


def half_life(mixer: nn.Module, x: Tensor) -> Tensor | None:
    """Return ln 2 over the mean decay (B, H) of a mixer with gates, None for one without. x: (B, T, width)."""
    log_gates: Callable[[Tensor], Tensor] | None = getattr(mixer, "log_gates", None)
    if log_gates is None:
        return None
    with torch.inference_mode():
        return math.log(2) / -log_gates(x).mean(1)


def _reading(metric: str, unit: str, values: npt.NDArray[np.float64], **factors: Any) -> Reading:
    return Reading(metric=metric, unit=unit, **dataclasses.asdict(statistics.mean(values)), **factors)
