"""Training batches: windows of a split's tokens, at random but the same for the same seed and step.

The stream of tokens is cut into disjoint windows of `length` inputs, whose targets are the tokens one further on:

    stream      t0 t1 t2 t3 t4 t5 t6 t7 t8        with length 4
    tokens      t0 t1 t2 t3 | t4 t5 t6 t7
    targets     t1 t2 t3 t4 | t5 t6 t7 t8

An epoch visits each window once, in an order of its own; what is left at the end of the stream is not seen. So it
takes as many tokens whether sequences end with their documents or not.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sbeval.data.corpus import Split
from sbeval.errors import InputError, choose

# targets that count for nothing: cross_entropy's ignore_index
NOTHING = -100
PACKINGS = ("documents", "stream")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Inputs and targets, each (B, L) int64; a target of -100 is not to be predicted.

    `cu_seqlens` is (N + 1,) int32, where each sequence starts in the batch flattened to (B * L,), and where the last
    one ends; None when each row is one sequence.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None


def epoch_tokens(split: Split, length: int) -> int:
    """Tokens of a split that an epoch trains on: all windows of `length` together."""
    return max(0, len(split.tokens) - 1) // length * length


class Batches:
    """The batches of a split: `batches[step]` for any step from 0 on, whatever was asked for before.

    packing `stream`: a window is one sequence, across documents. `documents`: a sequence ends with its document (or its
    row), and nothing is to be predicted from the token that closes a document.
    """

    def __init__(self, split: Split, length: int, batch: int, seed: int, packing: str) -> None:
        choose("packing", packing, PACKINGS)
        if min(length, batch) < 1 or seed < 0:
            raise InputError(
                f"batches need length and batch of at least 1 and a seed of at least 0: {length=} {batch=} {seed=}"
            )
        self.windows = epoch_tokens(split, length) // length
        if self.windows < 1:
            raise InputError(
                f"corpus {split.corpus!r} ({split.role}) has {len(split.tokens)} tokens, and one window takes "
                f"{length + 1}: use --train-len {len(split.tokens) - 1} or less, or another --corpus"
            )
        self._split, self._length, self._batch, self._seed = split, length, batch, seed
        self._by_document = packing == "documents"
        # two, for a batch can end one epoch and start the next
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step; IndexError when it is negative."""
        if step < 0:
            raise IndexError(f"step {step} is before the first")
        return self._at([self._start(step * self._batch + row) for row in range(self._batch)])

    def spread(self, count: int) -> Batch:
        """Return `count` windows of even distance over the split, or all that there are: the same for every seed."""
        chosen = np.linspace(0, self.windows - 1, min(count, self.windows)).round().astype(np.int64)
        return self._at([int(window) * self._length for window in chosen])

    def _at(self, starts: list[int]) -> Batch:
        """Return the windows that start there in the stream."""
        windows = np.stack([self._split.tokens[start : start + self._length + 1] for start in starts]).astype(np.int64)
        # copies: both are of their own, and neither keeps the other alive
        tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        cu_seqlens = self._separate(starts, targets) if self._by_document else None
        return Batch(tokens=torch.from_numpy(tokens), targets=torch.from_numpy(targets), cu_seqlens=cu_seqlens)

    def _start(self, index: int) -> int:
        """Return where the window starts in the stream that comes after `index` others."""
        epoch, place = divmod(index, self.windows)
        return int(self._order(epoch)[place]) * self._length

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(self.windows)

    def _separate(self, starts: list[int], targets: npt.NDArray[np.int64]) -> torch.Tensor:
        """Take the targets out that are another document's, and return where the sequences of the batch start."""
        offsets = self._split.offsets
        bounds = [0]
        for row, start in enumerate(starts):
            # from the second input on, to the last target
            first, last = np.searchsorted(offsets, (start, start + self._length), side="right")
            inside = offsets[first:last] - start
            targets[row, inside - 1] = NOTHING
            bounds.extend(row * self._length + int(bound) for bound in inside if bound < self._length)
            bounds.append((row + 1) * self._length)
        return torch.tensor(bounds, dtype=torch.int32)
