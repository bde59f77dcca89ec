"""Sizes and variants of multi-query repeated associative recall; `sbeval.tasks.recall_data` draws its examples."""

from dataclasses import dataclass

from sbeval.errors import InputError, choose

FILLERS = ("value", "padding", "any")
DISTINCT = ("keys", "queries", "values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """The task: V, L, N, the exponent a of the slot law, and the choices in which implementations differ.

    filler: tokens at positions outside the prefix and the queries, also after a query: a `value`, so that every query
    assigns again (the paper); `padding`, token 0, so that none does (MQAR of Arora et al. 2023); or `any` token but 0.
    distinct: which of `keys`, `values` (of the prefix) and `queries` are drawn without replacement.
    key_pool: keys are 1 ... key_pool; V/2 - 1 by default. n_back: the answer is the n-th last value of the key.
    score_prefix: score keys that are repeated inside the prefix.
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
        if self.vocab_size > 1 << 24:
            raise InputError(f"vocab_size must be at most {1 << 24}; got {self.vocab_size}")
        # beyond these, weights of slots overflow or vanish
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
        """Return V/2, the first value."""
        return self.vocab_size // 2

    @property
    def keys(self) -> int:
        return self.half - 1 if self.key_pool is None else self.key_pool

    @property
    def most_values(self) -> int:
        """Return the largest number of values that a key can have had before a query."""
        if self.filler == "any":
            return self.seq_len // 2
        before = 1 if "keys" in self.distinct else self.kv_pairs
        # each query but the last assigns, unless every key is queried once
        once = {"keys", "queries"} <= set(self.distinct)
        return before if self.filler == "padding" or once else before + self.kv_pairs - 1

    @property
    def slots(self) -> int:
        return (self.seq_len - 2 * self.kv_pairs) // 2

    def scored(self, batch: int, kv_pairs: int | None = None) -> int:
        """Return a bound on the scored positions of a batch, exceeded less often than once in 1e20 batches.

        Counted are the N queries and the keys repeated in the prefix, whose number in a batch is nearly normal around
        its mean, with at most the variance of a Poisson distribution. kv_pairs: replaces the task's own.
        """
        if self.filler == "any":
            return batch * self.seq_len
        pairs = kv_pairs or self.kv_pairs
        # rounding can take it below 0
        repeats = batch * max(0.0, pairs - self.keys * (1 - (1 - 1 / self.keys) ** pairs)) * self.score_prefix
        return batch * pairs + min(batch * (pairs - 1), int(repeats + 10 * repeats**0.5) + 32)
