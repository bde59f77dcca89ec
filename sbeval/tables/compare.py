"""Two folders of results side by side: what both measured, with the difference and its interval; what one has alone.

Rows are the same when all agrees that says which number they are (`sbeval.tables.table`) but the seed, whatever they come
from: another machine, another version. Where a folder has several numbers that only their origin tells apart, so much
of it as is needed (backend, dtype, text, ..., at last the cell) counts too. A column that one folder leaves empty, as
tables from before it came do, tells nothing.

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

# what a run found, beside its number
FOUND = ("status", "reads", "cut")
# what tells rows apart only where nothing else does, in this order
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
# columns that a line has its own place for
NAMED = ("family", "attention", "options", "metric", "unit")
HEADINGS = ("attention", "metric", "where", "A", "B", "B - A", "B / A", "")
NUMBERS = ("A", "B", "difference", "interval", "ratio", "beyond")


@dataclass(frozen=True, slots=True)
class Compared:
    """One family. `both`: the columns that say which number it is, and NUMBERS: the difference B - A, the half-width
    of its 95 % interval (NaN without one), B / A of times and rates, and whether the difference exceeds the interval.
    `only` has the rows of A and of B that the other lacks, by these columns and the seed."""

    family: str
    both: pd.DataFrame
    only: tuple[pd.DataFrame, pd.DataFrame]


def compare(first: Path, second: Path) -> list[Compared]:
    """Every family that either folder has a table of. InputError: no table, or one that cannot be read."""
    tables = [_tables(folder) for folder in (first, second)]
    names = sorted({name for found in tables for name in found})
    return [_family(name, *(found.get(name) for found in tables)) for name in names]


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise InputError(f"{folder} holds no result table (such as length_gen.csv): give a --results-dir of a run")
    return {path.stem: read(path, required=COMMON) for path in paths}


def _family(name: str, first: pd.DataFrame | None, second: pd.DataFrame | None) -> Compared:
    there = first if first is not None else second
    assert there is not None
    # a table that is not there is one without rows
    tables = [there.iloc[:0] if rows is None else rows for rows in (first, second)]
    keys = _keys(*tables)
    a, b = (_comparable(rows, keys) for rows in tables)
    merged = a.merge(b, on=[*keys, "seed"], how="outer", suffixes=("_A", "_B"), indicator="where")
    # as the tables have them, whose numbers are in order
    merged = merged.sort_values(["place_A", "place_B"])
    only = []
    for side, where in zip("AB", ("left_only", "right_only"), strict=True):
        rows = merged[merged["where"] == where].rename(columns={f"value_{side}": "value"})
        only.append(rows[[*keys, "seed", "value"]].reset_index(drop=True))
    return Compared(name, _numbers(merged[merged["where"] == "both"], keys), (only[0], only[1]))


def _keys(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """The columns that say which number a row is, of those that both tables fill."""
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
    """Keys as text, so that 8 and 8.0 and nothing are the same in both tables."""
    text = pd.DataFrame({name: [_text(cell) for cell in rows[name]] for name in keys}, dtype="object")
    for name in ("seed", "value", "stderr"):
        text[name] = rows[name].to_numpy()
    return text.assign(place=range(len(rows)))


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
    """A line for each number that both have: what, where it was measured, A, B, B - A, B / A, and the mark."""
    keys = [str(name) for name in one.both.columns if name not in (*NUMBERS, "seeds", *NAMED)]
    shown = [name for name in keys if one.both[name].nunique() > 1]
    lines = []
    for row in one.both.to_dict("records"):
        where = " ".join(f"{name}={row[name]}" for name in shown if row[name])
        seeds = f" {row['seeds']} seeds" if row["seeds"] > 1 else ""
        half = "" if math.isnan(row["interval"]) else f" ± {row['interval']:.2g}"
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f}"
        what = f"{row['metric']}{'' if row['unit'] == '1' else ' ' + row['unit']}"
        numbers = [f"{row['A']:.4g}", f"{row['B']:.4g}", f"{row['difference']:+.3g}{half}", ratio]
        lines.append([_method(row), what, where + seeds, *numbers, "*" if row["beyond"] else ""])
    return lines


def _said(one: Compared) -> list[str]:
    """How many numbers differ, and what one folder has alone, by method."""
    marked, bare = int(one.both["beyond"].sum()), int(one.both["interval"].isna().sum())
    without = f", {bare} without an interval" if bare else ""
    said = [f"{one.family}: {len(one.both)} numbers in both, {marked} apart by more than the interval (*){without}"]
    for side, rows in zip("AB", one.only, strict=True):
        if len(rows):
            counts = rows.groupby(METHOD, sort=True).size().reset_index(name="count")
            parts = [
                f"{row['task']} {row['model']} {_method(row)}: {row['count']}" for row in counts.to_dict("records")
            ]
            said.append(f"{one.family}: {len(rows)} only in {side} ({'; '.join(parts)})")
    return said


def _method(row: Mapping[Any, Any]) -> str:
    return ":".join(part for part in (row["attention"], row["options"]) if part)


def terminal(compared: list[Compared]) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = []
    for one in compared:
        shown, lines = Terminal(title=one.family, box=SIMPLE, pad_edge=False), _lines(one)
        used = [place for place in range(len(HEADINGS)) if any(line[place] for line in lines)]
        for place in used:
            words = place < 3
            shown.add_column(HEADINGS[place], overflow="fold", no_wrap=not words, justify="left" if words else "right")
        for line in lines:
            shown.add_row(*(line[place] for place in used), style="bold" if line[-1] else "")
        parts += [*([shown] if lines else []), *_said(one)]
    return Group(*parts)


def markdown(compared: list[Compared]) -> str:
    parts = []
    for one in compared:
        lines = _lines(one)
        table = [list(HEADINGS), ["---"] * len(HEADINGS), *lines] if lines else []
        parts.append("\n".join([*(f"| {' | '.join(line)} |" for line in table), *([""] if table else []), *_said(one)]))
    return "\n\n".join(parts)


def comma_separated(compared: list[Compared]) -> str:
    """Every number, those that one folder has alone too: there the other's is empty."""
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
    """The comparison as `style` has it; InputError names the styles."""
    return FORMATS[choose("format", style, FORMATS)](compare(first, second))
