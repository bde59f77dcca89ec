"""Losses of single documents, from the values behind rows of `length_gen`: differences of methods paired by text."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from sbeval.tables import intervals, statistics
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Floats, Interval, Spread

# reads the values of cells: column `cell`, then those of `sbeval.tables.values`
Values = Callable[[Iterable[str]], pd.DataFrame]
# factors that tell the values of one number apart
FACTORS = ("position_start", "position_end", "context_length", "last_k", "window", "targets", "eval_corpus")


def nothing(cells: Iterable[str]) -> pd.DataFrame:
    """Return no values: those of results from before they were stored."""
    return pd.DataFrame(columns=["cell", "metric", "unit_id", "value"])


def only(values: pd.DataFrame, *factors: str) -> pd.DataFrame:
    """Return the values of the numbers that have no other factors than these."""
    for name in FACTORS:
        if name in values and name not in factors:
            values = values[values[name].isna() | (values[name] == "")]
    return values


def sums(values: pd.DataFrame, metric: str, **factors: object) -> pd.DataFrame:
    """Return the sum of a metric by cell (down) and document (across), of the number with exactly these factors."""
    chosen = only(values[values["metric"] == metric], *factors)
    for name, value in factors.items():
        if name in chosen:
            chosen = chosen[chosen[name] == value]
    return chosen.pivot_table("value", "cell", "unit_id", aggfunc="sum").dropna(axis=1)


def difference(
    of: pd.DataFrame, other: pd.DataFrame, tokens: pd.DataFrame, spread: tuple[Spread, Spread]
) -> Interval | None:
    """Return the interval of the loss of one method minus another's, in nats/token, over seeds and pairs of documents.

    of, other: sums of losses, a row for each seed. tokens: of any cell. None where they share fewer than two documents,
    or the same document has different tokens.
    """
    shared = [name for name in of.columns if name in other.columns and name in tokens.columns]
    if len(shared) < 2 or of.empty or other.empty or (tokens[shared].nunique() > 1).any():
        return None
    first, second, counts = (_array(frame[shared]) for frame in (of, other, tokens))
    return statistics.bootstrap(first, second, counts[0], spread)


def _array(frame: pd.DataFrame) -> Floats:
    return np.asarray(frame.to_numpy(), dtype=np.float64)


def cells_of(rows: pd.DataFrame, method: Method) -> list[str]:
    """Return the cells of a method."""
    return list(dict.fromkeys(intervals.method(rows, method)["cell"]))
