"""Intervals of rows of result tables, by `sbeval.tables.statistics`: means of methods, and their differences."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pandas as pd

from sbeval.tables import pooling, statistics
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Interval, Joint, Sample, Scale

# seeds are drawn one by one up to this number
FEW = 3
# metrics that are shares of units, whose values vary by Scale.SHARE; `rows.SHARES` are all shares of a whole
SHARES_OF_UNITS = ("accuracy", "validation_accuracy", "error_rate", "score", "greedy", "filled")
# columns whose every value has units of its own
PARTS = ("task", "shots", "length")
# the values of the columns of a group
Key = tuple[Any, ...]
# columns of `points`; `each`: the values of the seeds
COLUMNS = ("mean", "low", "high", "seeds", "units", "each")


def scale_of(metric: str) -> Scale:
    """Return how the values of a metric vary. Scores of benchmarks are far from 0 and 1, and are pooled."""
    if metric.endswith("perplexity"):
        return Scale.LOG
    return Scale.SHARE if metric in SHARES_OF_UNITS else Scale.LINEAR


def method(rows: pd.DataFrame, of: Method) -> pd.DataFrame:
    """Return the rows of one method."""
    return rows[(rows["attention"] == of[0]) & (rows["options"] == of[1])]


def methods(rows: pd.DataFrame) -> list[Method]:
    """Return the methods of rows, in their order."""
    pairs = rows[["attention", "options"]].drop_duplicates().itertuples(index=False, name=None)
    return [(str(name), str(options)) for name, options in pairs]


def most_seeds(rows: pd.DataFrame) -> int:
    """Return the seeds of the method that has most of them."""
    return int(rows.groupby(["attention", "options"])["seed"].nunique().max())


def samples(rows: pd.DataFrame, scale: Scale = Scale.LINEAR) -> dict[Method, Sample]:
    """Return the sample of each method, from columns seed, value, stderr and n, on the scale of its interval.

    Several rows of a seed are averaged; see `grouped`.
    """
    return next(iter(grouped(rows, [], scale).values()), {})


def points(rows: pd.DataFrame, by: Sequence[str], scale: Scale = Scale.LINEAR) -> pd.DataFrame:
    """Return the mean and interval of each method for each value of `by`: attention, options, `by` and COLUMNS.

    `rows` are those of one setting: the seeds' standard deviation is pooled over its methods, for each value of `by`.
    """
    lines, of_keys = [], grouped(rows, by, scale)
    for key, found in curves(of_keys, scale).items():
        of_key = of_keys[key]
        for of, interval in found.items():
            drawn = [back(value, scale) for value in (interval.mean, interval.low, interval.high)]
            each = tuple(back(value, scale) for value in of_key[of].values.tolist())
            lines.append([*of, *key, *drawn, len(each), interval.units, each])
    columns = ["attention", "options", *by, *COLUMNS]
    return pd.DataFrame(lines, columns=columns).astype({"seeds": "int64", "units": "int64"})


def intervals(of: Mapping[Method, Sample], scale: Scale = Scale.LINEAR) -> dict[Method, Interval]:
    """Return the interval of each method of a setting, on the scale of its sample."""
    return curves({(): of}, scale)[()]


def curves(
    points: Mapping[Key, Mapping[Method, Sample]], scale: Scale = Scale.LINEAR
) -> dict[Key, dict[Method, Interval]]:
    """Return the interval of each method at each point of its curve, on the scale of its sample.

    Which methods keep a standard deviation of their own is decided once for all points, so that no band changes its
    width in the middle.
    """
    apart = pooling.outlying(points.values())
    found = {}
    for key, of in points.items():
        spreads = pooling.spreads(of, apart)
        found[key] = {
            method: statistics.share(sample) if scale is Scale.SHARE else statistics.interval(sample, spreads[method])
            for method, sample in of.items()
        }
    return found


def differences(
    of: Mapping[Method, Sample],
    reference: Method,
    scale: Scale = Scale.LINEAR,
    *,
    same_units: bool = False,
    pairs: Mapping[Method, Joint] | None = None,
    apart: Set[Method] | None = None,
) -> dict[Method, Interval]:
    """Return the interval of each method of a setting minus the reference, on the scale of the samples.

    same_units: all are measured on the same documents, whose common part cancels: with a deviation over seeds, errors
    over documents are left out. Without one, and otherwise, they add as if the documents were others.
    pairs: how methods vary together with the reference, unit by unit, where that is known. apart: see `spreads`.
    """
    pairs = pairs or {}
    others = {method: sample for method, sample in of.items() if method != reference}
    if scale is Scale.SHARE:
        return {
            method: statistics.shares_less(sample, of[reference], pairs.get(method))
            for method, sample in others.items()
        }
    spreads = pooling.spreads(of, apart)
    found = {}
    for method, sample in others.items():
        pair, spread = [sample, of[reference]], (spreads[method], spreads[reference])
        if same_units and method not in pairs and all(one.freedom for one in spread):
            pair = [dataclasses.replace(one, stderr=0.0, units=0) for one in pair]
        found[method] = statistics.less(pair[0], pair[1], spread, pairs.get(method))
    return found


def gaps(rows: pd.DataFrame, by: Sequence[str], reference: Method) -> pd.DataFrame:
    """Return the difference of each method to the reference, for each value of `by` that has both.

    Columns as of `points`, without `each`: seeds of two methods are no pairs. seeds: of the one with fewer.
    """
    lines, of_keys = [], grouped(rows, by, Scale.LINEAR)
    apart = pooling.outlying(of_keys.values())
    for key, of in of_keys.items():
        if reference in of:
            for method, found in differences(of, reference, apart=apart).items():
                lines.append([*method, *key, found.mean, found.low, found.high, min(found.seeds), found.units])
    return pd.DataFrame(lines, columns=["attention", "options", *by, *COLUMNS[:-1]])


def grouped(rows: pd.DataFrame, by: Sequence[str], scale: Scale) -> dict[tuple[Any, ...], dict[Method, Sample]]:
    """Return the sample of each method for each value of `by`, sorted by it, on the scale of its interval.

    Several rows of a seed are averaged: as independent where they differ in a column of PARTS, and otherwise as of the
    same units, as where a cell was run on two machines.
    """
    values, errors = rows["value"].to_numpy(dtype=float), rows["stderr"].fillna(0.0).to_numpy(dtype=float)
    if scale is Scale.LOG:
        values, errors = np.log(values), errors / values
    units = rows["n"] if "n" in rows else 0
    rows = rows.assign(value=values, square=errors**2, units=units)
    keys = [*by, "attention", "options"]
    parts = [name for name in PARTS if name in rows and name not in keys]
    if rows.duplicated([*keys, "seed", *parts]).any():
        rows = rows.groupby([*keys, "seed", *parts], dropna=False, as_index=False).agg(
            value=("value", "mean"), square=("square", "mean"), units=("units", "min")
        )
    seeds = rows.groupby([*keys, "seed"], dropna=False, as_index=False).agg(
        value=("value", "mean"), square=("square", "sum"), count=("value", "size"), units=("units", "sum")
    )
    seeds["square"] /= seeds["count"] ** 2
    each: dict[tuple[Any, ...], list[tuple[float, float, int]]] = {}
    for *key, _, value, square, _, count in seeds.itertuples(index=False, name=None):
        each.setdefault(tuple(key), []).append((value, square, count))
    grouped: dict[tuple[Any, ...], dict[Method, Sample]] = {}
    for (*at, name, options), rows_of in each.items():
        one, squares, counts = (list(column) for column in zip(*rows_of, strict=True))
        sample = Sample(np.array(one, dtype=float), math.sqrt(sum(squares) / len(squares)), int(min(counts)))
        grouped.setdefault(tuple(at), {})[str(name), str(options)] = sample
    return grouped


def back(value: float, scale: Scale) -> float:
    """Return the number of a value on the scale of its interval."""
    return math.exp(value) if scale is Scale.LOG else value


def percent(change: float) -> str:
    """Write a change of a logarithm as one of the number itself."""
    return f"{100 * math.expm1(change):+.0f} %"


def explain(drawn: Iterable[pd.DataFrame], shape: str, unit: str) -> str:
    """Explain in a sentence the bands or bars (`shape`) of a figure; `unit`: what one seed's value is a mean over."""
    # a table can have too few sequences for any point
    rows = pd.concat([pd.DataFrame(columns=["seeds"]), *drawn])
    if rows.empty:
        return ""
    fewest, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    if most == 1:
        wide = bool((rows["high"] > rows["low"]).any())
        return f"One seed; {shape}: 95 % interval over {unit}." if wide else "One seed."
    counts = f"{most}" if fewest == most else f"{fewest} to {most}"
    dots = "; dots: seeds" if fewest <= FEW else ""
    return f"Means of {counts} seeds; {shape}: 95 % interval over seeds and {unit}{dots}."
