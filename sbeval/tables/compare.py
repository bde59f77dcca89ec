"""Compare two folders of results: numbers in both, with difference and interval; and those in one alone.

Rows match when all key columns (`sbeval.tables.table`) but the seed agree, whatever their origin: another machine,
another version; the seeds of the two folders may differ. Where a folder has several numbers that differ in origin
alone, as many columns of origin as are needed (backend, dtype, text, ..., at last the cell) become keys too. A column
that is empty in one folder, as in tables older than the column, is ignored.

Intervals are those of `sbeval.tables.statistics`, with the seeds' standard deviation pooled over the methods of both
folders; a mark is a p value below 5 % after Holm's correction for the methods that a number was measured of.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table as Terminal

from sbeval.errors import InputError, choose
from sbeval.tables import intervals, statistics
from sbeval.tables.rows import Measurement
from sbeval.tables.statistics import Method, Sample, Scale
from sbeval.tables.table import OUTCOME, read, required

# results of a run beside its number
FOUND = ("status", "reads", "cut")
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
NUMBERS = ("A", "B", "difference", "low", "high", "p", "ratio", "beyond")
# p values below this one are marked
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Compared:
    """One family.

    both: key columns, seeds and NUMBERS: the difference B - A, its 95 % interval and its p value after Holm's
    correction (NaN without an interval), B / A of times and rates, and whether the folders differ by that p value.
    only: the rows of A and of B whose number the other lacks, by key columns and seed.
    """

    family: str
    both: pd.DataFrame
    only: tuple[pd.DataFrame, pd.DataFrame]


def compare(first: Path, second: Path) -> list[Compared]:
    """Compare every family with a table in either folder. InputError: no table, or one that cannot be read."""
    tables = [_tables(folder) for folder in (first, second)]
    names = sorted({name for folder in tables for name in folder})
    return [_family(name, *(folder.get(name) for folder in tables)) for name in names]


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise InputError(f"{folder} has no result table (such as length_gen.csv): give a --results-dir of a run")
    return {path.stem: read(path, required=COMMON) for path in paths}


def _family(name: str, first: pd.DataFrame | None, second: pd.DataFrame | None) -> Compared:
    present = first if first is not None else second
    assert present is not None
    # a missing table counts as one without rows
    tables = [present.iloc[:0] if rows is None else rows for rows in (first, second)]
    keys = _keys(*tables)
    a, b = (_comparable(rows, keys) for rows in tables)
    numbers = a[keys].merge(b[keys]).drop_duplicates()
    only = []
    for rows in (a, b):
        merged = rows.merge(numbers, on=keys, how="left", indicator="where")
        alone = merged[merged["where"] == "left_only"].sort_values("index")
        only.append(alone[[*keys, "seed", "value"]].reset_index(drop=True))
    return Compared(name, _numbers(a.merge(numbers, on=keys), b.merge(numbers, on=keys), keys), (only[0], only[1]))


def _keys(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Return the key columns: those that identify a number, as far as both tables fill them."""
    names = [
        str(name)
        for name in first.columns
        if name in second.columns and name not in (*OUTCOME, *FOUND, *ORIGIN, "seed")
        if name in COMMON or all(rows.empty or any(map(_text, rows[name])) for rows in (first, second))
    ]
    for origin in ORIGIN:
        if not any(rows.duplicated([*names, "seed"]).any() for rows in (first, second)):
            break
        names.append(origin)
    return names


def _comparable(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Write keys as text, so that 8 and 8.0, and blanks of any type, are equal in both tables."""
    text = pd.DataFrame({name: [_text(cell) for cell in rows[name]] for name in keys}, dtype="object")
    for name in ("seed", "value", "stderr", "n"):
        text[name] = rows[name].to_numpy()
    return text.assign(index=range(len(rows)))


def _text(cell: Any) -> str:
    if pd.isna(cell):
        return ""
    return f"{float(cell):.12g}" if isinstance(cell, int | float | np.number) else str(cell)


def _numbers(a: pd.DataFrame, b: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Compare the numbers that both have, in the order of A."""
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
            compared = _compared(of_a, others[at], scale, rate=_is_rate(str(key["unit"])))
            for method, (seeds, *numbers) in compared.items():
                identity = key | {"attention": method[0], "options": method[1]}
                lines.append([*(identity[name] for name in keys), seeds, *numbers])
    order = a.groupby(keys, as_index=False)["index"].min()
    found: pd.DataFrame = pd.DataFrame(lines, columns=columns).merge(order, on=keys).sort_values("index")
    return found.drop(columns="index").reset_index(drop=True)


def _compared(
    a: Mapping[Method, Sample], b: Mapping[Method, Sample], scale: Scale, *, rate: bool
) -> dict[Method, list[Any]]:
    """Return seeds and NUMBERS of each method of one number."""
    sides = {
        (f"{side} {name}", options): of[name, options] for side, of in (("A", a), ("B", b)) for name, options in of
    }
    spreads = statistics.spreads(sides)
    differences = {}
    for name, options in a:
        first, second = a[name, options], b[name, options]
        if scale is Scale.SHARE:
            differences[name, options] = statistics.minus(statistics.share(second), statistics.share(first))
        else:
            spread = (spreads[f"B {name}", options], spreads[f"A {name}", options])
            differences[name, options] = statistics.less(second, first, spread)
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
        lines[method] = [seeds, before, after, after - before, *shown, p, ratio, p < ALPHA]
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
        seeds = f" {row['seeds']} seeds" if row["seeds"] else ""
        bounds = "" if math.isnan(row["low"]) else f" [{row['low']:+.2g}, {row['high']:+.2g}]"
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f}"
        what = f"{row['metric']}{'' if row['unit'] == '1' else ' ' + row['unit']}"
        numbers = [f"{row['A']:.4g}", f"{row['B']:.4g}", f"{row['difference']:+.3g}{bounds}", ratio]
        lines.append([_method(row), what, where + seeds, *numbers, "*" if row["beyond"] else ""])
    return lines


def _counts(one: Compared) -> list[str]:
    """Return how many numbers differ, and how many one folder has alone, by method."""
    marked, bare = int(one.both["beyond"].sum()), int(one.both["low"].isna().sum())
    without = f", {bare} without an interval" if bare else ""
    sentences = [
        f"{one.family}: {len(one.both)} numbers in both, {marked} apart (*: p < {ALPHA:g}, Holm over methods){without}"
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
    return ":".join(part for part in (row["attention"], row["options"]) if part)


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
        table = [list(HEADINGS), ["---"] * len(HEADINGS), *lines] if lines else []
        parts.append(
            "\n".join([*(f"| {' | '.join(line)} |" for line in table), *([""] if table else []), *_counts(one)])
        )
    return "\n\n".join(parts)


def comma_separated(compared: list[Compared]) -> str:
    """Write all numbers as CSV; of one that only one folder has, the other's is empty."""
    frames = []
    for one in compared:
        alone = [rows.rename(columns={"value": side}) for rows, side in zip(one.only, "AB", strict=True)]
        frames += [rows.assign(family=one.family) for rows in (one.both, *alone) if len(rows)]
    rows = pd.concat(frames, ignore_index=True)
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
