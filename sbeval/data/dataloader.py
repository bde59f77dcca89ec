"""Training batches: windows of a split's tokens in random order, the same for the same seed and step.

The stream of tokens is cut into disjoint windows of `length` inputs, whose targets are the tokens one further on:

    stream      t0 t1 t2 t3 t4 t5 t6 t7 t8        with length 4
    tokens      t0 t1 t2 t3 | t4 t5 t6 t7
    targets     t1 t2 t3 t4 | t5 t6 t7 t8

An epoch visits each window once, in a new order, and drops the rest of the stream that fills no window. So it has as
many tokens whether sequences end with their documents or not.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sbeval.config import IGNORE
from sbeval.data.corpus import Split
from sbeval.errors import InputError, choose

PACKINGS = ("documents", "stream")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Inputs and targets, each (B, L) int64; a target of IGNORE is not predicted.

    cu_seqlens: int32 (N + 1,), bounds of the sequences in the batch flattened to (B * L,); None when each row is one
    sequence.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedBatch(Batch):
    """A batch with weights: float32 (B, L), whose products with the losses of the targets have the step's as sum."""

    weights: torch.Tensor


def epoch_tokens(split: Split, length: int) -> int:
    """Return the number of tokens of an epoch: those of all windows of `length`."""
    return max(0, len(split.tokens) - 1) // length * length


class Batches:
    """The batches of a split: `batches[step]` for any step from 0 on, in any order.

    packing `stream`: a window is one sequence, across documents. `documents`: a sequence ends with its document or its
    row, and the token that ends a document has no target.
    """

    def __init__(self, split: Split, length: int, batch: int, seed: int, packing: str) -> None:
        choose("packing", packing, PACKINGS)
        if min(length, batch) < 1 or seed < 0:
            raise InputError(f"length and batch must be at least 1 and seed at least 0; got {length=} {batch=} {seed=}")
        self.windows = epoch_tokens(split, length) // length
        if self.windows < 1:
            raise InputError(
                f"corpus {split.corpus!r} ({split.role}) has {len(split.tokens)} tokens, and one window takes "
                f"{length + 1}: use --train-len {len(split.tokens) - 1} or less, or another --corpus"
            )
        self._split, self._length, self._batch, self._seed = split, length, batch, seed
        self._by_document = packing == "documents"
        # two, since a batch can end one epoch and start the next
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step; raise IndexError when it is negative."""
        if step < 0:
            raise IndexError(f"step {step} is before the first")
        return self._at([self._start(step * self._batch + row) for row in range(self._batch)])

    def spread(self, count: int) -> Batch:
        """Return `count` evenly spaced windows of the split, or all when there are fewer; the same for every seed."""
        chosen = np.linspace(0, self.windows - 1, min(count, self.windows)).round().astype(np.int64)
        return self._at([int(window) * self._length for window in chosen])

    def _at(self, starts: list[int]) -> Batch:
        """Return the windows with these starts in the stream."""
        windows = np.stack([self._split.tokens[start : start + self._length + 1] for start in starts]).astype(np.int64)
        # copies, so that neither keeps the memory of both alive
        tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        cu_seqlens = self._separate(starts, targets) if self._by_document else None
        return Batch(tokens=torch.from_numpy(tokens), targets=torch.from_numpy(targets), cu_seqlens=cu_seqlens)

    def _start(self, index: int) -> int:
        """Return the start in the stream of window `index`, counted over all epochs."""
        epoch, position = divmod(index, self.windows)
        return int(self._order(epoch)[position]) * self._length

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(self.windows)

    def _separate(self, starts: list[int], targets: npt.NDArray[np.int64]) -> torch.Tensor:
        """Set targets in another document to IGNORE, and return the bounds of the batch's sequences."""
        offsets = self._split.offsets
        bounds = [0]
        for row, start in enumerate(starts):
            # from the second input on, to the last target
            first, last = np.searchsorted(offsets, (start, start + self._length), side="right")
            inside = offsets[first:last] - start
            targets[row, inside - 1] = IGNORE
            bounds.extend(row * self._length + int(bound) for bound in inside if bound < self._length)
            bounds.append((row + 1) * self._length)
        return torch.tensor(bounds, dtype=torch.int32)
