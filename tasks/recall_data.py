"""Data of multi-query repeated associative recall: counter-based examples, and their labels in one pass.

See `sbeval.tasks.mqrar` for the task. An example is a function of (task, seed, row number), on any device.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.data import counter_rng
from sbeval.data.recall import Recall
from sbeval.models.decoder import IGNORE
from sbeval.tables import statistics
from sbeval.tables.statistics import Estimate
from sbeval.tables.values import Split
from sbeval.tasks import drawn
from sbeval.tasks.synthetic import TRAIN_SEED

# streams of random numbers
KEYS, FILL, SLOTS, QUERIES, VALUES = range(5)
# a stream that no example draws from: the order of a stored set
ORDER = 1 << 20


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch of the task, (B, L) int64 each. `stale` and `distance` are 0 where there is no label."""

    tokens: Tensor
    targets: Tensor  # the label, IGNORE where there is none
    stale: Tensor  # earlier values of the key that are not the answer
    distance: Tensor  # positions back to the value that is the answer

    @property
    def cu_seqlens(self) -> None:
        """Examples are not packed."""


def generate(task: Recall, seed: int, rows: Tensor) -> Examples:
    """Return examples number `rows`, (B,) int64, of a seed, on the device of `rows`."""

    def draw(stream: int, count: int) -> Tensor:
        return counter_rng.bits(counter_rng.key(seed, stream), rows, count)

    pairs, half = task.kv_pairs, task.half
    values = task.vocab_size - half
    fill = draw(FILL, task.seq_len)
    tokens = counter_rng.below(fill, values).add_(half)
    if "values" in task.distinct:
        tokens[:, 1 : 2 * pairs : 2] = half + draw(VALUES, values).argsort(dim=1)[:, :pairs]
    if "keys" in task.distinct:
        keys = 1 + draw(KEYS, task.keys).argsort(dim=1)[:, :pairs]
    else:
        keys = counter_rng.below(draw(KEYS, pairs), task.keys).add_(1)
    rest = tokens[:, 2 * pairs :]
    if task.filler == "padding":
        rest.zero_()
    elif task.filler == "any":
        rest.copy_(counter_rng.below(fill[:, 2 * pairs :], task.vocab_size - 1).add_(1))
    tokens[:, 0 : 2 * pairs : 2] = keys
    weights = tuple((j + 1) ** (task.slot_power - 1) for j in range(task.slots))
    taken = counter_rng.chosen(draw(SLOTS, task.slots), weights, pairs)
    if "queries" in task.distinct:
        # the n-th slot that is taken, from the left, has the n-th key of a random order
        chosen = draw(QUERIES, pairs).argsort(dim=1).gather(1, (taken.long().cumsum(1) - 1).clamp_(min=0))
    else:
        chosen = counter_rng.below(draw(QUERIES, task.slots), pairs)
    firsts = rest[:, 0::2]
    firsts.copy_(torch.where(taken, keys.gather(1, chosen), firsts))
    return label(task, tokens)


def label(task: Recall, tokens: Tensor) -> Examples:
    """Return token rows (B, L) with their labels.

    From left to right: a key with at least n_back values is scored, and the n-th last of them is its label; a value
    directly after a key becomes that key's last.
    """
    # unless fillers can be keys, keys are at even positions alone
    stride = 1 if task.filler == "any" else 2
    here, following = tokens[:, ::stride], F.pad(tokens, (0, 1))[:, 1::stride]
    is_key = (here > 0) & (here < task.half)
    # occurrences of one key side by side, in their order; tokens that are not keys come last
    ordered, order = here.where(is_key, task.vocab_size).sort(dim=1, stable=True)
    assigned = (following >= task.half).gather(1, order) & (ordered < task.vocab_size)
    # number of assignments in this order before each occurrence, and before the first occurrence of its key
    before = assigned.long().cumsum(1) - assigned.long()
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    before_key = before.where(starts, 0).cummax(1).values
    known = before - before_key
    # the occurrence that made each assignment; one extra column collects the others
    made = torch.zeros_like(F.pad(order, (0, 1)))
    made.scatter_(1, before.where(assigned, order.shape[1]), order)
    answer = made.gather(1, (before - task.n_back).clamp_(min=0))
    scored = (known >= task.n_back) & (ordered < task.vocab_size)
    if not task.score_prefix:
        scored &= stride * order >= 2 * task.kv_pairs

    def spread(values: Tensor, empty: int) -> Tensor:
        out = torch.full_like(tokens, empty)
        return out.scatter_(1, stride * order, values.where(scored, empty))

    return Examples(
        tokens=tokens,
        targets=spread(following.gather(1, answer), IGNORE),
        stale=spread(known - 1, 0),
        distance=spread(stride * (order - answer) - 1, 0),
    )


class Batches(drawn.Drawn[Examples]):
    """Training batches of a seed: new examples at every step, or a stored set, shuffled in each epoch.

    stored_rows: examples of the set; 0 for new ones at every step.
    """

    def __init__(self, task: Recall, seed: int, batch: int, stored_rows: int, device: torch.device) -> None:
        self.task, self.batch, self.stored_rows, self.device = task, batch, stored_rows, device
        self.seed = TRAIN_SEED + seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        super().__init__(self.rows, functools.partial(generate, task, self.seed))

    def rows(self, step: int) -> Tensor:
        """Return the numbers of the examples of a step."""
        batch, stored = self.batch, self.stored_rows
        if not stored:
            return torch.arange(step * batch, (step + 1) * batch, device=self.device)
        epoch, start = divmod(step * batch, stored)
        rows = self._order(epoch)[start : start + batch]
        missing = batch - len(rows)
        return torch.cat([rows, self._order(epoch + 1)[:missing]]) if missing else rows

    def _shuffled(self, epoch: int) -> Tensor:
        return counter_rng.shuffled(counter_rng.key(self.seed, ORDER, epoch), self.stored_rows, self.device)


def held_out(task: Recall, seed: int, rows: int, device: torch.device) -> Examples:
    """Return the first `rows` examples of a seed."""
    return generate(task, seed, torch.arange(rows, device=device))


def accuracy(examples: Examples, correct: Tensor) -> float:
    """Return the accuracy over all scored positions."""
    return correct[examples.targets != IGNORE].float().mean().item()


def accuracies(examples: Examples, correct: Tensor) -> Iterator[tuple[Estimate, dict[str, Any]]]:
    """Yield the accuracy over scored positions with the factors of its row, for each split of `counts`.

    Standard errors are over examples, since positions of one example are dependent.
    """
    return ((statistics.ratio(right, count), factors) for right, count, factors in counts(examples, correct))


def counts(examples: Examples, correct: Tensor) -> Iterator[Split]:
    """Yield the correct and the scored positions of each example, and the factors of the split: all of them, fresh or
    stale, number of stale values, and distance. An empty split is left out.
    """
    scored = examples.targets != IGNORE
    splits: list[tuple[Tensor, dict[str, Any]]] = [
        (scored, {"split": "all"}),
        (scored & (examples.stale == 0), {"split": "fresh"}),
        (scored & (examples.stale > 0), {"split": "stale"}),
    ]
    splits += [(scored & (examples.stale == n), {"stale_values": n}) for n in range(int(examples.stale.max()) + 1)]
    start = 1
    while start < examples.tokens.shape[1]:
        inside = (examples.distance >= start) & (examples.distance < 2 * start)
        splits.append((scored & inside, {"distance_start": start, "distance_end": 2 * start}))
        start *= 2
    for where, factors in splits:
        if where.any():
            right, count = ((mask & where).sum(1).double().cpu().numpy() for mask in (correct, where))
            yield right, count, factors
