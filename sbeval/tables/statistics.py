"""Statistics: means with standard errors, and the one convention for intervals in verdicts and tables.

An interval is 95 %. Over several seeds it is Student's t of the seeds' values, of a difference that of the seeds'
differences; of one seed it is normal, from the standard error of its number as a mean. Standard errors of two numbers
add as if they were independent, which is conservative over the same documents or items.

Bands of figures show the range of seeds, from the lowest to the highest (`spread`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from sbeval.errors import InputError

Floats = npt.NDArray[np.float64]
# name and options of an attention method
Method = tuple[str, str]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more, the last is a little wide
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NORMAL = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value from n independent units (documents, sequences) and its standard error, None for a single unit."""

    value: float
    stderr: float | None
    n: int


def mean(values: Floats) -> Estimate:
    """Return the mean of values, one for each unit, (n,)."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def ratio(numerators: Floats, denominators: Floats) -> Estimate:
    """Return the sum of numerators over the sum of denominators, (n,) each, with the error of the linearised ratio.

    Units with denominator 0 are ignored.
    """
    counted = denominators > 0
    numerators, denominators = numerators[counted], denominators[counted]
    value = float(numerators.sum() / denominators.sum())
    return Estimate(value, mean((numerators - value * denominators) / denominators.mean()).stderr, len(numerators))


def half_width(values: Floats, stderr: float) -> float:
    """Return the half-width of the 95 % interval of the mean of values, one for each seed, (seeds,).

    stderr: standard error of the value of a single seed, unused with several; NaN gives NaN.
    """
    seeds = len(values)
    if seeds == 1:
        return NORMAL * stderr
    return STUDENT[min(seeds - 1, len(STUDENT)) - 1] * float(values.std(ddof=1)) / math.sqrt(seeds)


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, its bounds, and what they are an interval over."""

    mean: float
    low: float
    high: float
    over: str

    def text(self, write: Callable[[float], str]) -> str:
        """Return the number, and its interval in brackets unless that is within its last digit."""
        mean, low, high = (write(value).replace("-", "−") for value in (self.mean, self.low, self.high))
        return mean if low == mean == high else f"{mean} [{low}, {high}]"


def interval(numbers: pd.DataFrame, sample: str) -> Interval:
    """Return the interval of a number: columns seed, value and stderr; `sample`: what a single seed is a mean over."""
    values, errors = numbers["value"].to_numpy(dtype=float), numbers["stderr"].fillna(0.0)
    center, half = float(values.mean()), half_width(values, float(errors.iloc[0]))
    over = f"95 % over {len(values)} seeds" if len(values) > 1 else f"95 % over {sample}"
    return Interval(center, center - half, center + half, over)


def difference(of: pd.DataFrame, less: pd.DataFrame, sample: str) -> Interval:
    """Return the interval of `of` minus `less`, paired by seed, as `interval`. InputError without a common seed."""
    both = of.merge(less, on="seed", suffixes=("", "_less"))
    if both.empty:
        raise InputError("stick-breaking and RoPE have no seed in common")
    errors = (both["stderr"] ** 2 + both["stderr_less"] ** 2) ** 0.5
    return interval(both.assign(value=both["value"] - both["value_less"], stderr=errors), sample)


def below(change: Interval, bound: float) -> bool | None:
    """Return whether a whole interval is at most `bound` (True) or above (False); None where it includes both."""
    if change.high <= bound:
        return True
    return False if change.low > bound else None


def method(rows: pd.DataFrame, of: Method) -> pd.DataFrame:
    """Return the rows of one method."""
    return rows[(rows["attention"] == of[0]) & (rows["options"] == of[1])]


def by_seed(rows: pd.DataFrame, of: Method) -> pd.DataFrame:
    """Return seed, value and stderr of one method; several rows of a seed are averaged as independent."""
    mine = method(rows, of)
    mine = mine.assign(square=mine["stderr"].astype(float) ** 2)
    means = mine.groupby("seed", as_index=False).agg(
        value=("value", "mean"), square=("square", "sum"), count=("value", "size")
    )
    return means.assign(stderr=means["square"] ** 0.5 / means["count"])[["seed", "value", "stderr"]]


def logarithm(numbers: pd.DataFrame) -> pd.DataFrame:
    """Return the logarithm of values with standard errors."""
    return numbers.assign(value=numbers["value"].map(math.log), stderr=numbers["stderr"] / numbers["value"])


def percent(change: float) -> str:
    """Write a change of a logarithm as one of the number itself."""
    return f"{100 * math.expm1(change):+.0f} %"


def spread(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Average over seeds for each value of `by`: columns `by`, mean, low, high, seeds, sorted by `by`.

    `low` and `high` are the lowest and the highest seed; for one seed, the 95 % interval of its standard error.
    """
    each = rows.groupby([*by, "seed"], as_index=False)[["value", "stderr"]].mean()
    seeds = each.groupby(list(by))
    result = seeds["value"].agg(mean="mean", low="min", high="max", seeds="count")
    margin = NORMAL * seeds["stderr"].mean().fillna(0.0).where(result["seeds"] == 1, 0.0)
    result["low"] -= margin
    result["high"] += margin
    return result.reset_index()


def explain(spreads: Iterable[pd.DataFrame], shape: str, sample: str) -> str:
    """Explain in a sentence the bands or bars (`shape`) of a figure; `sample`: what a single seed is a mean over."""
    # a table can have too few sequences for any point
    rows = pd.concat([pd.DataFrame(columns=["seeds"]), *spreads])
    if rows.empty:
        return ""
    counts = sorted(int(count) for count in rows["seeds"].unique())
    if counts == [1] and not (rows["high"] > rows["low"]).any():
        return "One seed."
    single = f"95 % interval over {sample}"
    if counts[-1] == 1:
        return f"One seed; {shape}: {single}."
    several = f"{counts[-1]}" if counts[0] == counts[-1] else f"up to {counts[-1]}"
    alone = f"; for one seed, {single}" if counts[0] == 1 else ""
    return f"Mean of {several} seeds; {shape}: lowest to highest seed{alone}."
