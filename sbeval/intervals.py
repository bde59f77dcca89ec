"""Numbers with intervals, from the rows of result tables: the same intervals that figures draw.

Over several seeds from the lowest to the highest; for one seed 95 % over what its number is a mean of. Errors of two
numbers add as if they were independent, which over the same documents or items is cautious.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from sbeval.errors import InputError
from sbeval.plots import style


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, between what it lies, and what that is the spread of."""

    mean: float
    low: float
    high: float
    over: str

    def text(self, write: Callable[[float], str]) -> str:
        """The number, and its interval in brackets unless that is within its last digit."""
        mean, low, high = (write(value).replace("-", "−") for value in (self.mean, self.low, self.high))
        return mean if low == mean == high else f"{mean} [{low}, {high}]"


def below(change: Interval, bound: float) -> bool | None:
    """Whether all of an interval is at most `bound`; None where it holds both."""
    if change.high <= bound:
        return True
    return False if change.low > bound else None


def method(rows: pd.DataFrame, of: style.Method) -> pd.DataFrame:
    """Seed, value and stderr of one method's rows; of several rows of a seed their mean, as of independent ones."""
    mine = style.method(rows, of)
    mine = mine.assign(square=mine["stderr"].astype(float) ** 2)
    means = mine.groupby("seed", as_index=False).agg(
        value=("value", "mean"), square=("square", "sum"), count=("value", "size")
    )
    return means.assign(stderr=means["square"] ** 0.5 / means["count"])[["seed", "value", "stderr"]]


def logarithm(numbers: pd.DataFrame) -> pd.DataFrame:
    """The logarithm of values with standard errors."""
    return numbers.assign(value=numbers["value"].map(math.log), stderr=numbers["stderr"] / numbers["value"])


def difference(of: pd.DataFrame, less: pd.DataFrame, sample: str) -> Interval:
    """`of` less `less`, seed by seed; `sample` is what one seed is a mean over. InputError without a seed of both."""
    both = of.merge(less, on="seed", suffixes=("", "_less"))
    if both.empty:
        raise InputError("stick-breaking and RoPE have no seed in common")
    errors = (both["stderr"] ** 2 + both["stderr_less"] ** 2) ** 0.5
    return interval(both.assign(value=both["value"] - both["value_less"], stderr=errors), sample)


def interval(numbers: pd.DataFrame, sample: str) -> Interval:
    """The interval of a number with a value a seed."""
    one = style.spread(numbers.assign(x=0), ["x"]).iloc[0]
    over = f"{one['seeds']:.0f} seeds" if one["seeds"] > 1 else f"95 % over {sample}"
    return Interval(float(one["mean"]), float(one["low"]), float(one["high"]), over)


def percent(change: float) -> str:
    """A change of a logarithm, as one of the number itself."""
    return f"{100 * math.expm1(change):+.0f} %"
