"""Differences of two numbers over the same units: documents, items, prompts or examples, from the values behind rows.

Much of what a number owes to its units is common to two models and cancels in pairs. Values count as those behind a row
only if they give it: as many units as its `n`, and its value.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sbeval.tables import intervals, statistics
from sbeval.tables.documents import Values
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Floats, Joint, Scale
from sbeval.tables.values import COLUMNS

# rows that are ratios of sums, by family and metric: of what, over what (nothing: a mean), and a factor. A perplexity
# is exp of its ratio. Others are means of the values of their own name
BITS = 1 / math.log(2)
RATIOS = {
    ("length_gen", "loss"): ("nll_sum", "tokens", 1.0),
    ("length_gen", "loss_last_k"): ("nll_sum", "tokens", 1.0),
    ("length_gen", "loss_fixed_targets"): ("nll_sum", "tokens", 1.0),
    ("length_gen", "loss_fixed_targets_unrelated"): ("nll_sum_unrelated", "tokens", 1.0),
    ("length_gen", "perplexity"): ("nll_sum", "tokens", 1.0),
    ("length_gen", "bits_per_byte"): ("nll_sum", "bytes", BITS),
    ("few_shot", "gold_bits_per_byte"): ("log_probability", "answer_bytes", -BITS),
    ("few_shot", "bits_per_byte"): ("log_probability", "bytes", -BITS),
    ("few_shot", "byte_perplexity"): ("log_probability", "bytes", -1.0),
    ("few_shot", "word_perplexity"): ("log_probability", "words", -1.0),
    ("few_shot", "perplexity"): ("log_probability", "", -1.0),
    ("mqrar", "accuracy"): ("correct", "scored", 1.0),
}
# values have four decimals
NEAR = 1e-4


@dataclass(frozen=True, slots=True)
class Units:
    """A number by unit: a digest of the units' names, sums of each seed, (seeds, units), and weights, (units,), such as
    losses and tokens."""

    names: bytes
    sums: Floats
    weights: Floats

    def like(self, other: "Units") -> bool:
        """Return whether the units and their weights are the same."""
        return self.names == other.names and np.array_equal(self.weights, other.weights)


class Stored:
    """The values behind rows, read once for each cell."""

    def __init__(self, read: Values) -> None:
        self._read = read
        self._cells: dict[str, _Cell] = {}

    def known(self, rows: pd.DataFrame) -> set[str]:
        """Return the cells of a table that have values."""
        first = rows.drop_duplicates("cell").to_dict("records")
        return {str(row["cell"]) for row in first if self._cell(row).places}

    def behind(self, rows: pd.DataFrame) -> Units | None:
        """Return the units of one number, of which each seed has a row; None where they are not stored, or not the
        same for all seeds."""
        if rows.empty or not {"cell", "family"} <= set(rows.columns):
            return None
        each = [self._of(row) for row in rows.to_dict("records")]
        units = [one for one in each if one is not None and each[0] is not None and one.like(each[0])]
        if len(units) < len(each):
            return None
        return Units(units[0].names, np.concatenate([one.sums for one in units]), units[0].weights)

    def _of(self, row: Mapping[Any, Any]) -> Units | None:
        family, metric = str(row["family"]), str(row["metric"])
        name, over, factor = RATIOS.get((family, metric), (metric, "", 1.0))
        if over == "tokens" and (per := as_text(row.get("per"))):
            over = f"{per}s"
        cell = self._cell(row)
        found, others = (cell.values(metric, row) for metric in (name, over or name))
        if found is None or others is None or found[0] != others[0]:
            return None
        names, sums = found
        weights = others[1] if over else np.ones_like(sums)
        counted = weights > 0
        units = Units(names, factor * sums[None, counted], weights[counted])
        return units if _gives(units, row) else None

    def _cell(self, row: Mapping[Any, Any]) -> "_Cell":
        cell = str(row["cell"])
        if cell not in self._cells:
            self._cells[cell] = _split(self._read([cell]), row)
        return self._cells[cell]


@dataclass(frozen=True, slots=True)
class _Cell:
    """The values of a cell: names of units and values, sorted by unit, and the places of those of each metric and
    factors. A number is looked up when it is asked for, which few of them are."""

    factors: list[str]
    names: Sequence[str]
    numbers: Floats
    places: Mapping[tuple[str, ...], "np.ndarray[Any, np.dtype[np.intp]]"]
    found: dict[tuple[str, ...], tuple[bytes, Floats] | None] = field(default_factory=dict)

    def values(self, metric: str, row: Mapping[Any, Any]) -> tuple[bytes, Floats] | None:
        """Return the digest of the units, and the values, of a metric at a row's factors; None if a unit is double."""
        key = (metric, *(as_text(row[factor]) for factor in self.factors))
        if key not in self.found:
            self.found[key] = self._values(key)
        return self.found[key]

    def _values(self, key: tuple[str, ...]) -> tuple[bytes, Floats] | None:
        at = self.places.get(key)
        if at is None:
            return None
        names = [self.names[index] for index in at]
        if len(set(names)) < len(names):
            return None
        return hashlib.sha256("\n".join(names).encode()).digest(), self.numbers[at]


def _split(values: pd.DataFrame, row: Mapping[Any, Any]) -> _Cell:
    """Split values by metric and those factors that rows have too: needles' depths have none."""
    if values.empty:
        return _Cell([], [], np.empty(0), {})
    factors = [str(name) for name in values.columns if name not in ("cell", *COLUMNS) and name in row]
    values = values.assign(**{name: texts(values[name]) for name in factors})
    if "part" in factors and not (values["part"] == "").any():
        # a group of tasks is all of their items
        whole = values.assign(unit_id=values["part"] + "/" + values["unit_id"], part="")
        values = pd.concat([values, whole])
    values = values.sort_values("unit_id", kind="stable")
    by = ["metric", *factors]
    group = values.groupby(by, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    keys = values[by].iloc[order[starts]].astype(str).itertuples(index=False, name=None)
    places = dict(zip(keys, np.split(order, starts[1:]), strict=False))
    return _Cell(factors, values["unit_id"].tolist(), values["value"].to_numpy(dtype=np.float64), places)


def as_text(cell: Any) -> str:
    """Write the entry of a table so that 8 and 8.0, and blanks of any type, are equal."""
    if cell is None or pd.isna(cell):
        return ""
    return f"{float(cell):.12g}" if isinstance(cell, int | float | np.number) else str(cell)


def texts(column: pd.Series) -> "np.ndarray[Any, np.dtype[np.object_]]":
    """Write the entries of a column as `as_text` does."""
    codes, entries = pd.factorize(column, use_na_sentinel=False)
    return np.array([as_text(entry) for entry in entries], dtype=object)[codes]


def _gives(units: Units, row: Mapping[Any, Any]) -> bool:
    if len(units.weights) != row["n"] or len(units.weights) < 2:
        return False
    log = intervals.scale_of(str(row["metric"])) is Scale.LOG
    value = math.log(row["value"]) if log else float(row["value"])
    return math.isclose(float(units.sums.sum() / units.weights.sum()), value, rel_tol=NEAR, abs_tol=NEAR)


def joint(of: Units | None, other: Units | None) -> Joint | None:
    """Return how two numbers vary together over their units; None unless these, and their weights, are the same."""
    if of is None or other is None or not of.like(other):
        return None
    return statistics.joint(of.sums, other.sums, of.weights)


def mean(parts: Sequence[Joint | None]) -> Joint | None:
    """Return how two means of numbers with units of their own vary together; None where one of them has none."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    count = len(known)
    return Joint(
        math.hypot(*(part.stderr for part in known)) / count,
        sum(part.covariance for part in known) / count**2,
        sum(part.units for part in known),
    )


def of_methods(
    rows: pd.DataFrame, reference: Method, stored: Stored, by: Sequence[str], scale: float = 1.0
) -> dict[Method, Joint]:
    """Return how the mean of each method varies together with the reference's, where all values of both are stored.

    A mean is over the numbers that `by` tells apart, which all methods have. scale: of rows, such as 100 for percent.
    """
    numbers = {
        of: {key: stored.behind(part) for key, part in mine.groupby(list(by))}
        for of, mine in ((of, intervals.method(rows, of)) for of in intervals.methods(rows))
    }
    found = {}
    for of, each in numbers.items():
        both = mean([joint(units, numbers.get(reference, {}).get(key)) for key, units in each.items()])
        if of != reference and both is not None:
            found[of] = Joint(scale * both.stderr, scale**2 * both.covariance, both.units)
    return found
