"""Rows of `length_gen`, which follow from losses, and the values of each document of which they are means.

rows: metric        factors                        values of a document, same factors
loss                position_start, position_end   nll_sum, tokens
perplexity,         context_length                 nll_sum, tokens, bytes
  bits_per_byte
loss_last_k         context_length, last_k         nll_sum, tokens
loss_fixed_targets  context_length, targets        nll_sum, tokens
  ..._unrelated                                    nll_sum_unrelated, tokens
perplexity,         window, per, eval_corpus       nll_sum, tokens, words, bytes (without per)
  bits_per_byte
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sbeval.config import LATER
from sbeval.tables.rows import Measurement

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.evaluation.perplexity import PositionLosses, Rolling
    from sbeval.tables.statistics import Estimate, Floats


# columns of values
FACTORS = ("position_start", "position_end", "context_length", "last_k", "window", "targets")
# of fixed targets whose context further back than the training length is another document's
UNRELATED = "_unrelated"
PER = ("token", "word", "byte")
VALUES = ("metric", "unit_id", "value", *FACTORS, "eval_corpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: positions position_start <= i < position_end of a loss; the context length l of a figure over positions
    1 ... l; the last k of them; the tokens of a disjoint window, and the unit of a perplexity over such windows
    (`token`, `word` or `byte`); the text of these windows, if not the test documents of the corpus; the number of fixed
    targets, the last tokens of each window, which are the same whatever their context length. Of models trained here:
    peak learning rate, optimizer, tokens of a step, and schedule. status: `overfit`, or empty."""

    position_start: int | None = None
    position_end: int | None = None
    context_length: int | None = None
    last_k: int | None = None
    window: int | None = field(default=None, metadata=LATER)
    per: str | None = field(default=None, metadata=LATER)
    eval_corpus: str = field(default="", metadata=LATER)
    targets: int | None = field(default=None, metadata=LATER)
    lr: float | None = field(default=None, metadata=LATER)
    optimizer: str = field(default="", metadata=LATER)
    batch_tokens: int | None = field(default=None, metadata=LATER)
    schedule: str = field(default="", metadata=LATER)
    status: str = field(default="", metadata=LATER)


def rows(losses: "PositionLosses", train_len: int) -> list[Row]:
    """Return every figure that follows from the losses by position."""
    from sbeval.evaluation import perplexity

    out = [
        _row("loss", "nats/token", losses.mean(first, last), position_start=first, position_end=last + 1)
        for first, last in perplexity.bins(losses.length)
    ]
    for length in perplexity.lengths(train_len, losses.length):
        out += _known("perplexity", "1", losses.perplexity(length), context_length=length)
        out += _known("bits_per_byte", "bits/byte", losses.bits_per_byte(length), context_length=length)
        if length >= (k := _last_k(train_len, losses.length)):
            last = losses.mean(length - k + 1, length)
            out.append(_row("loss_last_k", "nats/token", last, context_length=length, last_k=k))
    return out


def windowed_rows(losses: "Rolling", window: int, eval_corpus: str = "") -> list[Row]:
    """Return perplexity per token, word and byte of whole documents in windows of `window` tokens, and bits/byte.

    A perplexity that is not finite has no row, such as that per word of text without spaces.
    """
    of: dict[str, Any] = {"window": window, "eval_corpus": eval_corpus}
    return [
        *(row for per in PER for row in _known("perplexity", "1", losses.perplexity(per), per=per, **of)),
        _row("bits_per_byte", "bits/byte", losses.bits_per_byte(), **of),
    ]


def target_rows(losses: "Mapping[int, Floats]", suffix: str = "") -> list[Row]:
    """Return the mean loss of fixed targets by context length. losses: (documents, targets) of each context length;
    suffix: `UNRELATED`, of those after other text than their own."""
    from sbeval.tables import statistics

    return [
        _row(
            f"loss_fixed_targets{suffix}",
            "nats/token",
            statistics.mean(each.mean(1)),
            context_length=length,
            targets=each.shape[1],
        )
        for length, each in losses.items()
    ]


def values(losses: "PositionLosses", train_len: int, documents: Sequence[str]) -> "list[pd.DataFrame]":
    """Return the sums of each document that `rows` are means of, averaged over its windows."""
    from sbeval.evaluation import perplexity

    out = []
    for first, last in perplexity.bins(losses.length):
        sums = {"nll_sum": losses.losses[:, first - 1 : last].sum(1), "tokens": last - first + 1}
        out.append(_values(documents, sums, position_start=first, position_end=last + 1))
    for length in perplexity.lengths(train_len, losses.length):
        whole = losses.losses[:, :length].sum(1)
        sums = {"nll_sum": whole, "tokens": length, "bytes": losses.bytes[:, length - 1]}
        if losses.bits_per_byte(length) is None:
            del sums["bytes"]
        out.append(_values(documents, sums, context_length=length))
        if length >= (k := _last_k(train_len, losses.length)):
            sums = {"nll_sum": losses.losses[:, length - k : length].sum(1), "tokens": k}
            out.append(_values(documents, sums, context_length=length, last_k=k))
    return out


def windowed_values(
    losses: "Rolling", window: int, documents: Sequence[str], eval_corpus: str = ""
) -> "list[pd.DataFrame]":
    """Return the sums of each document that `windowed_rows` are ratios of."""
    sums = {"nll_sum": losses.losses, "tokens": losses.tokens, "words": losses.words, "bytes": losses.bytes}
    return [_values(documents, sums, window=window, eval_corpus=eval_corpus)]


def target_values(losses: "Mapping[int, Floats]", documents: Sequence[str], suffix: str = "") -> "list[pd.DataFrame]":
    """Return the sums of each document that `target_rows` are means of."""
    return [
        _values(documents, {f"nll_sum{suffix}": each.sum(1)} | tokens, context_length=length, targets=count)
        for length, each in losses.items()
        for count in each.shape[1:]
        # those of the same targets after their own text are there
        for tokens in [{} if suffix else {"tokens": count}]
    ]


def joined(parts: "Iterable[pd.DataFrame]") -> "pd.DataFrame":
    """Return all values of a cell: `metric`, `unit_id`, `value`, and the factors of its rows, blank where none."""
    import pandas as pd

    table = pd.concat([pd.DataFrame(columns=VALUES), *parts], ignore_index=True)
    return table.astype({name: "Int64" for name in FACTORS} | {"value": "float64"}).fillna({"eval_corpus": ""})


def _last_k(train_len: int, eval_len: int) -> int:
    """Return a quarter of the training length, or of what was evaluated of models trained at much longer lengths."""
    return max(1, train_len // 4 if train_len // 4 <= eval_len else eval_len // 4)


def _known(metric: str, unit: str, estimate: "Estimate | None", **factors: Any) -> list[Row]:
    return [] if estimate is None else [_row(metric, unit, estimate, **factors)]


def _row(metric: str, unit: str, estimate: "Estimate", **factors: Any) -> Row:
    return Row(metric=metric, unit=unit, **asdict(estimate), **factors)


def _values(documents: Sequence[str], sums: "Mapping[str, Floats | int]", **factors: Any) -> "pd.DataFrame":
    """Return sums of each document in long form; one number instead of (documents,) is that of each."""
    import pandas as pd

    return pd.concat(
        pd.DataFrame({"metric": metric, "unit_id": list(documents), "value": each, **factors})
        for metric, each in sums.items()
    )
