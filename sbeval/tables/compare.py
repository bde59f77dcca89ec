"""Compare two folders of results: numbers in both, with difference and interval; and those in one alone.

Rows match when all key columns (`sbeval.tables.table`) but the seed agree, whatever their origin: another machine,
another version. Where a folder has several numbers that differ in origin alone, as many columns of origin as are needed
(backend, dtype, text, ..., at last the cell) become keys too. A column that is empty in one folder, as in tables older
than the column, is ignored.

The interval of a difference, paired by seed, is that of `sbeval.tables.statistics`.
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
from sbeval.tables.rows import Measurement
from sbeval.tables.statistics import half_width
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
NUMBERS = ("A", "B", "difference", "interval", "ratio", "beyond")


@dataclass(frozen=True, slots=True)
class Compared:
    """One family.

    both: key columns and NUMBERS: the difference B - A, the half-width of its 95 % interval (NaN without one), B / A of
    times and rates, and whether the difference exceeds the interval. only: the rows of A and of B that the other lacks,
    by key columns and seed.
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
    merged = a.merge(b, on=[*keys, "seed"], how="outer", suffixes=("_A", "_B"), indicator="where")
    # in the order of the tables, which are sorted
    merged = merged.sort_values(["index_A", "index_B"])
    only = []
    for side, where in zip("AB", ("left_only", "right_only"), strict=True):
        rows = merged[merged["where"] == where].rename(columns={f"value_{side}": "value"})
        only.append(rows[[*keys, "seed", "value"]].reset_index(drop=True))
    return Compared(name, _numbers(merged[merged["where"] == "both"], keys), (only[0], only[1]))


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
    for name in ("seed", "value", "stderr"):
        text[name] = rows[name].to_numpy()
    return text.assign(index=range(len(rows)))


def _text(cell: Any) -> str:
    if pd.isna(cell):
        return ""
    return f"{float(cell):.12g}" if isinstance(cell, int | float | np.number) else str(cell)


def _numbers(both: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    if both.empty:
        return pd.DataFrame(columns=[*keys, "seeds", *NUMBERS])
    groups = both.groupby(keys, sort=False, dropna=False)
    rows = [[*key, len(group), *_difference(group, dict(zip(keys, key, strict=True)))] for key, group in groups]
    return pd.DataFrame(rows, columns=[*keys, "seeds", *NUMBERS])


def _difference(group: pd.DataFrame, key: dict[str, Any]) -> list[Any]:
    first, second = (group[f"value_{side}"].to_numpy(dtype=float) for side in "AB")
    apart = second - first
    half = half_width(apart, math.hypot(*(float(group[f"stderr_{side}"].iloc[0]) for side in "AB")))
    a, b, difference = float(first.mean()), float(second.mean()), float(apart.mean())
    ratio = b / a if _is_rate(str(key["unit"])) and a else math.nan
    return [a, b, difference, half, ratio, bool(abs(difference) > half)]


def _is_rate(unit: str) -> bool:
    return unit.endswith("/s") or unit in ("ms", "s", "MB")


def _lines(one: Compared) -> list[list[str]]:
    """Return a line for each common number: method, metric, where, A, B, B - A, B / A, and the mark."""
    keys = [str(name) for name in one.both.columns if name not in (*NUMBERS, "seeds", *NAMED)]
    varied = [name for name in keys if one.both[name].nunique() > 1]
    lines = []
    for row in one.both.to_dict("records"):
        where = " ".join(f"{name}={row[name]}" for name in varied if row[name])
        seeds = f" {row['seeds']} seeds" if row["seeds"] > 1 else ""
        half = "" if math.isnan(row["interval"]) else f" ± {row['interval']:.2g}"
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f}"
        what = f"{row['metric']}{'' if row['unit'] == '1' else ' ' + row['unit']}"
        numbers = [f"{row['A']:.4g}", f"{row['B']:.4g}", f"{row['difference']:+.3g}{half}", ratio]
        lines.append([_method(row), what, where + seeds, *numbers, "*" if row["beyond"] else ""])
    return lines


def _counts(one: Compared) -> list[str]:
    """Return how many numbers differ, and how many one folder has alone, by method."""
    marked, bare = int(one.both["beyond"].sum()), int(one.both["interval"].isna().sum())
    without = f", {bare} without an interval" if bare else ""
    sentences = [
        f"{one.family}: {len(one.both)} numbers in both, {marked} apart by more than the interval (*){without}"
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
