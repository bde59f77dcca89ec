"""Data of the flip-flop language: counter-based random examples. See `sbeval.tasks.flip_flop` for the task."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbeval.data import counter_rng
from sbeval.models.decoder import IGNORE
from sbeval.tables import statistics
from sbeval.tables.statistics import Estimate
from sbeval.tables.values import Split
from sbeval.tasks.drawn import Drawn
from sbeval.tasks.synthetic import TRAIN_SEED

# tokens: the bits 0 and 1, then the instructions
WRITE, READ, SKIP = 2, 3, 4
# streams of random numbers
INSTRUCTIONS, BITS = range(2)


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch, (B, T) int64 each. targets: the bit at a read, else IGNORE; distance: instructions back to its write."""

    tokens: Tensor
    targets: Tensor
    distance: Tensor

    @property
    def cu_seqlens(self) -> None:
        """Examples are not packed."""


def generate(length: int, p_ignore: float, seed: int, rows: Tensor) -> Examples:
    """Return examples number `rows`, (B,) int64, of a seed, on the device of `rows`: the same on every device."""
    count = length // 2
    draw = counter_rng.uniform(counter_rng.bits(counter_rng.key(seed, INSTRUCTIONS), rows, count))
    bits = counter_rng.below(counter_rng.bits(counter_rng.key(seed, BITS), rows, count), 2)
    instructions = torch.where(draw < p_ignore, SKIP, torch.where(draw < (1 + p_ignore) / 2, WRITE, READ))
    instructions[:, 0], instructions[:, -1] = WRITE, READ
    number = torch.arange(count, device=rows.device).expand_as(bits)
    write = number.where(instructions == WRITE, 0).cummax(1).values
    reads = instructions == READ
    bits = bits.gather(1, write).where(reads, bits)
    nowhere = torch.full_like(bits, IGNORE)

    def interleaved(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], 2).flatten(1)

    return Examples(
        tokens=interleaved(instructions, bits),
        targets=interleaved(bits.where(reads, IGNORE), nowhere),
        distance=interleaved((number - write).where(reads, 0), torch.zeros_like(bits)),
    )


def batches(length: int, p_ignore: float, seed: int, batch: int, device: torch.device) -> Drawn[Examples]:
    """Return training batches: new examples at every step."""

    def rows(step: int) -> Tensor:
        return torch.arange(step * batch, (step + 1) * batch, device=device)

    return Drawn(rows, functools.partial(generate, length, p_ignore, TRAIN_SEED + seed))


def errors(examples: Examples, correct: Tensor) -> Iterator[tuple[Estimate, dict[str, Any]]]:
    """Yield the error rate over reads with the factors of its row, for each split of `counts`.

    Standard errors are over examples.
    """
    for wrong, count, factors in counts(examples, correct):
        yield statistics.ratio(wrong, count), {"reads": int(count.sum()), **factors}


def counts(examples: Examples, correct: Tensor) -> Iterator[Split]:
    """Yield the wrong reads and the reads of each example, and the factors of the split: all, then by distance in
    octaves. An empty split is left out.
    """
    scored = examples.targets != IGNORE
    splits: list[tuple[Tensor, dict[str, Any]]] = [(scored, {})]
    start = 1
    while start < examples.tokens.shape[1] // 2:
        inside = scored & (examples.distance >= start) & (examples.distance < 2 * start)
        splits.append((inside, {"distance_start": start, "distance_end": 2 * start}))
        start *= 2
    for where, factors in splits:
        wrong, count = ((mask & where).sum(1).double().cpu().numpy() for mask in (~correct, where))
        if count.any():
            yield wrong, count, factors
