"""The data of multi-query repeated associative recall: examples drawn by counter, labels found by the one-pass rule.

See `sbeval.tasks.mqrar` for the task. An example is a function of (task, seed, number of its row), on any device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval import counter
from sbeval.errors import InputError, choose
from sbeval.model import IGNORE

FILLERS = ("value", "padding", "any")
DISTINCT = ("keys", "queries", "values")
# streams of random numbers
KEYS, FILL, SLOTS, QUERIES, VALUES = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """The task: V, L, N and the exponent a of the slot law, and what the paper's code decides otherwise than others do.

    filler: what stands where neither prefix nor query does, the place after a query too: a `value`, so that every query
    assigns again (the paper); `padding`, token 0, so that none does (MQAR of Arora et al. 2023); or `any` token but 0.
    distinct: which of `keys`, `values` (of the prefix) and `queries` are drawn without replacement.
    key_pool: keys are 1 ... key_pool; all V/2 - 1 by default. n_back: the answer is the n-th last value of the key.
    score_prefix: whether keys that are repeated inside the prefix are scored.
    """

    vocab_size: int = 8192
    seq_len: int = 768
    kv_pairs: int = 32
    slot_power: float = 0.01
    filler: str = "value"
    distinct: tuple[str, ...] = ()
    key_pool: int | None = None
    n_back: int = 1
    score_prefix: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 4 or self.seq_len % 2:
            raise InputError(f"seq_len must be even and at least 4; got {self.seq_len}")
        if not 1 <= self.kv_pairs <= self.seq_len // 4:
            raise InputError(
                f"kv_pairs must be 1 to {self.seq_len // 4} at seq_len {self.seq_len} (4 kv_pairs <= seq_len); "
                f"got {self.kv_pairs}"
            )
        if self.vocab_size <= self.seq_len:
            raise InputError(f"vocab_size must be above seq_len {self.seq_len}; got {self.vocab_size}")
        # beyond, weights of slots overflow or vanish
        if not -10 <= self.slot_power <= 10:
            raise InputError(f"slot_power must be -10 to 10; got {self.slot_power}")
        choose("filler", self.filler, FILLERS)
        for name in self.distinct:
            choose("--distinct", name, DISTINCT)
        if self.key_pool is not None and not 1 <= self.key_pool < self.half:
            raise InputError(f"key_pool must be 1 to {self.half - 1} (the keys); got {self.key_pool}")
        if "keys" in self.distinct and self.kv_pairs > self.keys:
            raise InputError(f"{self.kv_pairs} distinct keys cannot be drawn from key_pool {self.keys}")
        if self.n_back < 1:
            raise InputError(f"n_back must be at least 1; got {self.n_back}")
        if self.n_back > self.most_values:
            raise InputError(
                f"n_back must be at most {self.most_values}, the values that a key can have; got {self.n_back}"
            )

    @property
    def half(self) -> int:
        """The first value."""
        return self.vocab_size // 2

    @property
    def keys(self) -> int:
        return self.half - 1 if self.key_pool is None else self.key_pool

    @property
    def most_values(self) -> int:
        """Values that a key can have had at most when it is asked for."""
        if self.filler == "any":
            return self.seq_len // 2
        before = 1 if "keys" in self.distinct else self.kv_pairs
        # each query but the last assigns, unless every key is asked for once
        once = {"keys", "queries"} <= set(self.distinct)
        return before if self.filler == "padding" or once else before + self.kv_pairs - 1

    @property
    def slots(self) -> int:
        return (self.seq_len - 2 * self.kv_pairs) // 2

    def scored(self, batch: int, kv_pairs: int | None = None) -> int:
        """Positions of a batch that can be scored: a bound that its rows exceed less often than once in 1e20 batches.

        kv_pairs: of a task with so many instead.

        The N queries, and keys repeated in the prefix, whose number in a batch is nearly normal around its mean and, at
        most, as wide as Poisson's.
        """
        if self.filler == "any":
            return batch * self.seq_len
        pairs = kv_pairs or self.kv_pairs
        # rounding can take it below 0
        repeats = batch * max(0.0, pairs - self.keys * (1 - (1 - 1 / self.keys) ** pairs)) * self.score_prefix
        return batch * pairs + min(batch * (pairs - 1), int(repeats + 10 * repeats**0.5) + 32)


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
    """Examples number `rows`, (B,) int64, of a seed, on the device of `rows`."""

    def draw(stream: int, count: int) -> Tensor:
        return counter.bits(counter.key(seed, stream), rows, count)

    pairs, half = task.kv_pairs, task.half
    values = task.vocab_size - half
    fill = draw(FILL, task.seq_len)
    tokens = counter.below(fill, values).add_(half)
    if "values" in task.distinct:
        tokens[:, 1 : 2 * pairs : 2] = half + draw(VALUES, values).argsort(dim=1)[:, :pairs]
    if "keys" in task.distinct:
        keys = 1 + draw(KEYS, task.keys).argsort(dim=1)[:, :pairs]
    else:
        keys = counter.below(draw(KEYS, pairs), task.keys).add_(1)
    rest = tokens[:, 2 * pairs :]
    if task.filler == "padding":
        rest.zero_()
    elif task.filler == "any":
        rest.copy_(counter.below(fill[:, 2 * pairs :], task.vocab_size - 1).add_(1))
    tokens[:, 0 : 2 * pairs : 2] = keys
    weights = tuple((j + 1) ** (task.slot_power - 1) for j in range(task.slots))
    taken = counter.chosen(draw(SLOTS, task.slots), weights, pairs)
    if "queries" in task.distinct:
        # the n-th slot that is taken, from the left, has the n-th key of a random order
        place = draw(QUERIES, pairs).argsort(dim=1).gather(1, (taken.long().cumsum(1) - 1).clamp_(min=0))
    else:
        place = counter.below(draw(QUERIES, task.slots), pairs)
    firsts = rest[:, 0::2]
    firsts.copy_(torch.where(taken, keys.gather(1, place), firsts))
    return label(task, tokens)


def label(task: Recall, tokens: Tensor) -> Examples:
    """Find the labels of token rows (B, L).

    From the left: a key that has n_back values is scored, with the n-th last of them as label; a value that directly
    follows a key becomes that key's last.
    """
    # where nothing but values or padding fills, keys stand at even positions
    stride = 1 if task.filler == "any" else 2
    here, following = tokens[:, ::stride], F.pad(tokens, (0, 1))[:, 1::stride]
    is_key = (here > 0) & (here < task.half)
    # occurrences of one key side by side, in their order; what is no key comes last
    ordered, order = here.where(is_key, task.vocab_size).sort(dim=1, stable=True)
    assigned = (following >= task.half).gather(1, order) & (ordered < task.vocab_size)
    # assignments of the row in this order, numbered from 0; how many stand before each occurrence, before its key
    before = assigned.long().cumsum(1) - assigned.long()
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    before_key = before.where(starts, 0).cummax(1).values
    known = before - before_key
    # the occurrence that made each assignment; one column more takes what is none
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
