"""Compare two folders of results: numbers in both, with difference and interval; and those in one alone.

Rows match when all key columns (`sbeval.tables.table`) but the seed agree, whatever their origin: another machine,
another version; the seeds of the two folders may differ. Where a folder has several numbers that differ in origin
alone, as many columns of origin as are needed (backend, dtype, text, ..., at last the cell) become keys too. A column
that is empty in one folder, as in tables older than the column, is ignored.

Intervals are those of `sbeval.tables.statistics`, with the seeds' standard deviation pooled over the methods of both
folders. Where both folders have the values behind a number, of the same units (documents, items, ...) with the same
weights, such as tokens, the difference is taken unit by unit, and its line says `in pairs`. A mark is a p value below
5 % after Holm's correction for the methods that a number was measured of.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table as Terminal

from sbeval.errors import InputError, choose
from sbeval.tables import intervals, markup, pairs, pooling, statistics, values
from sbeval.tables.pairs import Stored, Units, texts
from sbeval.tables.results import Results
from sbeval.tables.rows import Measurement, Method, spec_of
from sbeval.tables.statistics import Joint, Sample, Scale
from sbeval.tables.table import OUTCOME, read, required

# results of a run beside its number
FOUND = ("status", "reads", "cut", "ended", "chosen", "copy_gain")
# columns of origin, keys only where no other tells rows apart, in this order
ORIGIN = (
    "backend",
    "dtype",
    "corpus",
    "tokenizer",
    "train_tokens",
    "unique_tokens",
    "epochs",
    "preset",
    "device",
    "cell",
)
COMMON = required(Measurement)
METHOD = ["task", "model", "attention", "options"]
# columns with a place of their own in a line
NAMED = ("family", "attention", "options", "metric", "unit")
HEADINGS = ("attention", "metric", "where", "A", "B", "B - A", "B / A", "")
NUMBERS = ("A", "B", "difference", "low", "high", "p", "ratio", "beyond", "pairs")
# p values below this one are marked
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Compared:
    """One family.

    both: key columns, seeds and NUMBERS: the difference B - A, its 95 % interval and its p value after Holm's
    correction (NaN without an interval), B / A of times and rates, whether the folders differ by that p value, and the
    number of units of which the difference was taken in pairs, or 0.
    only: the rows of A and of B whose number the other lacks, by key columns and seed.
    """

    family: str
    both: pd.DataFrame
    only: tuple[pd.DataFrame, pd.DataFrame]


@dataclass(frozen=True, slots=True)
class Side:
    """The rows of a family in one folder, and the values behind them."""

    rows: pd.DataFrame
    stored: Stored


def compare(first: Path, second: Path) -> list[Compared]:
    """Compare every family with a table in either folder. InputError: no table, or a file that cannot be read."""
    tables = [_tables(folder) for folder in (first, second)]
    stored = [Stored(functools.partial(values.read, Results(folder))) for folder in (first, second)]
    compared = []
    for name in sorted({name for folder in tables for name in folder}):
        present = next(folder[name] for folder in tables if name in folder)
        # a missing table counts as one without rows
        a, b = (Side(of.get(name, present.iloc[:0]), each) for of, each in zip(tables, stored, strict=True))
        compared.append(_family(name, a, b))
    return compared


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise InputError(f"{folder} has no result table (such as length_gen.csv): give the results folder of a run")
    return {path.stem: read(path, required=COMMON) for path in paths}


def _family(name: str, first: Side, second: Side) -> Compared:
    keys = _keys(first.rows, second.rows)
    a, b = (_comparable(side.rows, keys) for side in (first, second))
    numbers = a[keys].merge(b[keys]).drop_duplicates()
    only = []
    for rows in (a, b):
        merged = rows.merge(numbers, on=keys, how="left", indicator="where")
        alone = merged[merged["where"] == "left_only"].sort_values("index")
        only.append(alone[[*keys, "seed", "value"]].reset_index(drop=True))
    a, b = (rows.merge(numbers, on=keys) for rows in (a, b))
    units = [_units(side, rows, keys) for side, rows in ((first, a), (second, b))]
    # of B less A
    joint = {key: both for key, of in units[1].items() if (both := pairs.joint(of, units[0].get(key)))}
    return Compared(name, _numbers(a, b, keys, joint), (only[0], only[1]))


def _units(side: Side, chosen: pd.DataFrame, keys: list[str]) -> dict[tuple[str, ...], Units]:
    """Return the units of each number that has values, by its keys."""
    with_values = side.rows["cell"].isin(side.stored.known(side.rows)).to_numpy()
    chosen = chosen[with_values[chosen["index"].to_numpy(dtype=int)]]
    if chosen.empty:
        return {}
    groups = chosen.groupby(keys)["index"]
    found = {tuple(map(str, key)): side.stored.behind(side.rows.iloc[index.to_list()]) for key, index in groups}
    return {key: units for key, units in found.items() if units is not None}


def _keys(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Return the key columns: those that identify a number, as far as both tables fill them."""
    filled = [
        str(name)
        for name in first.columns
        if name in second.columns and name not in (*OUTCOME, *FOUND, "seed")
        if name in COMMON or all(rows.empty or texts(rows[name]).any() for rows in (first, second))
    ]
    names = [name for name in filled if name not in ORIGIN]
    for origin in (name for name in ORIGIN if name in filled):
        if not any(rows.duplicated([*names, "seed"]).any() for rows in (first, second)):
            break
        names.append(origin)
    return names


def _comparable(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Write keys as text, so that 8 and 8.0, and blanks of any type, are equal in both tables."""
    text = pd.DataFrame({name: texts(rows[name]) for name in keys}, dtype="object")
    for name in ("seed", "value", "stderr", "n"):
        text[name] = rows[name].to_numpy()
    return text.assign(index=range(len(rows)))


def _numbers(a: pd.DataFrame, b: pd.DataFrame, keys: list[str], joint: Mapping[tuple[str, ...], Joint]) -> pd.DataFrame:
    """Compare the numbers that both have, in the order of A. joint: of those in pairs, by keys."""
    columns = [*keys, "seeds", *NUMBERS]
    if a.empty:
        return pd.DataFrame(columns=columns)
    by = [name for name in keys if name not in ("attention", "options")]
    lines = []
    for metric, rows in a.groupby("metric", sort=False):
        scale = intervals.scale_of(str(metric))
        others = intervals.grouped(b[b["metric"] == metric], by, scale)
        for at, of_a in intervals.grouped(rows, by, scale).items():
            key = dict(zip(by, at, strict=True))
            identities = {of: key | {"attention": of[0], "options": of[1]} for of in of_a}
            named = {of: tuple(identity[name] for name in keys) for of, identity in identities.items()}
            both = {of: joint[name] for of, name in named.items() if name in joint}
            compared = _compared(of_a, others[at], scale, both, rate=_is_rate(str(key["unit"])))
            lines += [[*named[method], *numbers] for method, numbers in compared.items()]
    order = a.groupby(keys, as_index=False)["index"].min()
    found: pd.DataFrame = pd.DataFrame(lines, columns=columns).merge(order, on=keys).sort_values("index")
    return found.drop(columns="index").reset_index(drop=True)


def _compared(
    a: Mapping[Method, Sample],
    b: Mapping[Method, Sample],
    scale: Scale,
    joint: Mapping[Method, Joint],
    *,
    rate: bool,
) -> dict[Method, list[Any]]:
    """Return seeds and NUMBERS of each method of one number."""
    sides = {
        (f"{side} {name}", options): of[name, options] for side, of in (("A", a), ("B", b)) for name, options in of
    }
    spreads = pooling.spreads(sides)
    differences = {}
    for method in a:
        name, options = method
        if scale is Scale.SHARE:
            differences[method] = statistics.shares_less(b[method], a[method], joint.get(method))
        else:
            spread = (spreads[f"B {name}", options], spreads[f"A {name}", options])
            differences[method] = statistics.less(b[method], a[method], spread, joint.get(method))
    p_values = {method: p for method, found in differences.items() if not math.isnan(p := found.apart(0.0))}
    adjusted = dict(zip(p_values, statistics.holm(list(p_values.values())), strict=True))
    lines = {}
    for method, found in differences.items():
        before, after = (intervals.back(of[method].mean, scale) for of in (a, b))
        # a factor of A, as a difference to it
        ends = [before * math.expm1(end) if scale is Scale.LOG else end for end in (found.low, found.high)]
        p = adjusted.get(method, math.nan)
        ratio = after / before if rate and before else math.nan
        seeds = "" if max(found.seeds) == 1 else " and ".join(map(str, dict.fromkeys(reversed(found.seeds))))
        shown = ends if method in adjusted else [math.nan, math.nan]
        units = found.units if found.paired else 0
        lines[method] = [seeds, before, after, after - before, *shown, p, ratio, p < ALPHA, units]
    return lines


def _is_rate(unit: str) -> bool:
    return unit.endswith("/s") or unit in ("ms", "s", "MB")


def _lines(one: Compared) -> list[list[str]]:
    """Return a line for each common number: method, metric, where, A, B, B - A, B / A, and the mark."""
    keys = [str(name) for name in one.both.columns if name not in (*NUMBERS, "seeds", *NAMED)]
    varied = [name for name in keys if one.both[name].nunique() > 1]
    lines = []
    for row in one.both.to_dict("records"):
        where = " ".join(f"{name}={row[name]}" for name in varied if row[name])
        seeds = f"{row['seeds']} seeds" if row["seeds"] else ""
        units = f"{row['pairs']:,} in pairs" if row["pairs"] else ""
        bounds = "" if math.isnan(row["low"]) else f" [{row['low']:+.2g}, {row['high']:+.2g}]"
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f}"
        what = f"{row['metric']}{'' if row['unit'] == '1' else ' ' + row['unit']}"
        numbers = [f"{row['A']:.4g}", f"{row['B']:.4g}", f"{row['difference']:+.3g}{bounds}", ratio]
        lines.append(
            [_method(row), what, " ".join(filter(None, [where, seeds, units])), *numbers, "*" if row["beyond"] else ""]
        )
    return lines


def _counts(one: Compared) -> list[str]:
    """Return how many numbers differ, and how many one folder has alone, by method."""
    marked, bare = int(one.both["beyond"].sum()), int(one.both["low"].isna().sum())
    paired = int((one.both["pairs"] > 0).sum())
    taken = f", {paired} in pairs of the same units" if paired else ""
    taken += f", {bare} without an interval" if bare else ""
    sentences = [
        f"{one.family}: {len(one.both)} numbers in both, {marked} apart (*: p < {ALPHA:g}, Holm over methods){taken}"
    ]
    for side, rows in zip("AB", one.only, strict=True):
        if len(rows):
            counts = rows.groupby(METHOD, sort=True).size().reset_index(name="count")
            parts = [
                f"{row['task']} {row['model']} {_method(row)}: {row['count']}" for row in counts.to_dict("records")
            ]
            sentences.append(f"{one.family}: {len(rows)} only in {side} ({'; '.join(parts)})")
    return sentences


def _method(row: Mapping[Any, Any]) -> str:
    return spec_of(row["attention"], row["options"])


def terminal(compared: list[Compared]) -> RenderableType:
    """Lay the comparison out for a terminal."""
    parts: list[RenderableType] = []
    for one in compared:
        table, lines = Terminal(title=one.family, box=SIMPLE, pad_edge=False), _lines(one)
        used = [index for index in range(len(HEADINGS)) if any(line[index] for line in lines)]
        for index in used:
            words = index < 3
            table.add_column(HEADINGS[index], overflow="fold", no_wrap=not words, justify="left" if words else "right")
        for line in lines:
            table.add_row(*(line[index] for index in used), style="bold" if line[-1] else "")
        parts += [*([table] if lines else []), *_counts(one)]
    return Group(*parts)


def markdown(compared: list[Compared]) -> str:
    parts = []
    for one in compared:
        lines = _lines(one)
        parts.append("\n".join([*([markup.table(HEADINGS, lines), ""] if lines else []), *_counts(one)]))
    return "\n\n".join(parts)


def comma_separated(compared: list[Compared]) -> str:
    """Write all numbers as CSV; of one that only one folder has, the other's is empty."""
    frames = []
    for one in compared:
        alone = [rows.rename(columns={"value": side}) for rows, side in zip(one.only, "AB", strict=True)]
        frames += [rows.assign(family=one.family) for rows in (one.both, *alone) if len(rows)]
    rows = pd.concat(frames or [one.both for one in compared], ignore_index=True)
    order = [name for name in rows.columns if name not in (*NUMBERS, "seeds")]
    return rows[[*order, *(name for name in ("seeds", *NUMBERS) if name in rows)]].to_csv(index=False).rstrip("\n")


FORMATS: dict[str, Callable[[list[Compared]], RenderableType]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
}


def render(first: Path, second: Path, style: str) -> RenderableType:
    """Render the comparison in the format `style`; InputError lists the formats."""
    return FORMATS[choose("format", style, FORMATS)](compare(first, second))
