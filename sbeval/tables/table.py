"""Result tables: tidy CSV files in long form, one number in a row, that concurrent runs and torn files cannot damage.

The columns are the fields of three dataclasses in this order (see `sbeval.tables.rows`): `Identity`, the family's own
subclass of `Measurement`, whose added fields are the family's factors, `Provenance`. The file does not have the types
of factors: when read, one is a number if all its cells are numbers or empty; `numbers` checks those that must be.
"""

import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd

from sbeval.errors import InputError
from sbeval.runtime.files import locked, remove_left, replacing, storing
from sbeval.tables import csv_text
from sbeval.tables.rows import SHARES, Identity, Measurement, Provenance, later

INT = re.compile(r"[+-]?[0-9]{1,18}")
FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# by which sums of float32 shares exceed 1
ROUNDING = 1e-5
# columns that do not identify a number: they differ when the same cell is run again
OUTCOME = ("value", "stderr", "n", "commit", "torch", "triton", "utc")


@dataclass(frozen=True, slots=True)
class Kind:
    """Type of a column's cells: `number` is int, float or None (text); `blank`: whether a number may be absent."""

    number: type[int] | type[float] | None
    blank: bool


def columns(row_type: type[Measurement]) -> tuple[str, ...]:
    """Return the names of the columns of a family's table, in their order."""
    return tuple(_kinds(row_type))


def required(row_type: type[Measurement]) -> tuple[str, ...]:
    """Return the names of the columns without which a family's table cannot be read: all but those added later."""
    absent = later(Identity, row_type, Provenance)
    return tuple(name for name in columns(row_type) if name not in absent)


def frame(identity: Identity, measurements: Iterable[Measurement], provenance: Provenance) -> pd.DataFrame:
    """Build the rows of one cell, whose measurements are of one class. Values are finite: no data is an absent row."""
    rows = list(measurements)
    assert rows and len({type(row) for row in rows}) == 1, "a cell has rows, and they are of one class"
    assert all(math.isfinite(row.value) for row in rows), "no data is an absent row, not NaN"
    kinds = _kinds(type(rows[0]))
    cells = [
        [_cell(getattr(part, name), kinds[name]) for part in (identity, row, provenance) for name in _names(part)]
        for row in rows
    ]
    return _typed(pd.DataFrame(cells, columns=list(kinds), dtype=str), kinds)


def as_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows as they are written."""
    return pd.DataFrame({name: [_cell(value) for value in rows[name]] for name in rows.columns}, dtype=str)


def keep(path: Path, new: pd.DataFrame) -> None:
    """Store the rows of one cell in time that does not depend on the table: as a part of it, which `assemble` adds.

    The first rows of a table are the table. Safe against concurrent writers (a lock beside the table) and against being
    killed.
    """
    text = _checked(new)
    (cell,) = set(text["cell"])
    with locked(path):
        part, first = _parts(path) / f"{cell}.csv", not path.exists()
        _replace(path if first else part, text)
        if first:
            # left where somebody removed the table
            part.unlink(missing_ok=True)


def assemble(path: Path) -> None:
    """Add the parts to the table; see `write`."""
    if _parts(path).exists():
        with locked(path):
            _merge(path, None)


def write(path: Path, new: pd.DataFrame) -> None:
    """Replace the rows of the cells in `new`, keep all others unchanged, add parts, sort, replace the file atomically.

    Safe against concurrent writers (a lock beside the table) and against being killed. A table that cannot be read
    raises InputError as in `read`, before anything is changed.
    """
    text = _checked(new)
    with locked(path):
        _merge(path, text)


def _merge(path: Path, new: pd.DataFrame | None) -> None:
    """Write `new`, the parts and the table as the table; of the rows of a cell, the first of these."""
    files = sorted(_parts(path).glob("*.csv"))
    frames = [] if new is None else [new]
    frames += [_load(file, required(Measurement)) for file in files if new is None or file.stem not in set(new["cell"])]
    if path.exists():
        old = _load(path, required(Measurement))
        frames.append(old[~old["cell"].isin({cell for frame in frames for cell in frame["cell"]})])
    if frames:
        _replace(path, pd.concat(frames, ignore_index=True).fillna(""))
    for file in files:
        file.unlink()
    if _parts(path).exists():
        # what a killed process left; a file of another program stays
        remove_left(_parts(path))
        with suppress(OSError):
            _parts(path).rmdir()


def _parts(path: Path) -> Path:
    return path.parent / "parts" / path.stem


def _replace(path: Path, text: pd.DataFrame) -> None:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        csv_text.write(temporary, _sorted(text))


def _checked(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows as they are written, which a table may hold."""
    assert len(rows) and (rows["cell"] != "").all(), "every row names the cell that it comes from"
    assert rows["value"].map(math.isfinite).all(), "no data is an absent row, not NaN"
    keys = [name for name in rows.columns if name not in OUTCOME]
    twice = rows[rows.duplicated(keys)]
    assert twice.empty, f"two rows for one number: {twice.iloc[0].to_dict()}"
    return as_text(rows)


def read(path: Path, required: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table and its parts. Integers are int64 (Int64 where cells may be empty), floats exact, empty text stays
    empty text.

    Raise InputError when the file is missing, lacks a required column, has a ragged or half-written line, something
    other than a number in a numeric column, or a number that no run writes (see `_impossible`).
    """
    return typed(text(path, required))


def typed(text: pd.DataFrame) -> pd.DataFrame:
    """Return rows that `text` read with the types of `read`."""
    return _typed(text, _guess(text))


def text(path: Path, required: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table and its parts as text; see `read`."""
    return pd.concat([rows for _, rows in pieces(path, required)], ignore_index=True).fillna("")


def pieces(path: Path, required: Iterable[str] = ()) -> list[tuple[Path, pd.DataFrame]]:
    """Read the parts and the table as text: of each its file, and its rows, by their number in it; see `read`.

    Rows of the table are left out whose cell has a part, which is newer.
    """
    # parts first: one that a run adds to the table between the two is in the table
    parts = [(file, part) for file in sorted(_parts(path).glob("*.csv")) if (part := _part(file)) is not None]
    if not parts:
        return [(path, _load(path, required))]
    table = _load(path, {*required, "cell"})
    return [*parts, (path, table[~table["cell"].isin({cell for _, part in parts for cell in part["cell"]})])]


def _part(file: Path) -> pd.DataFrame | None:
    """Return the rows of a part; None where a run added it to the table meanwhile."""
    try:
        return _load(file, ())
    except InputError:
        if file.exists():
            raise
        return None


def numbers(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Return the table with the named columns as int64 where all are whole, else float64.

    An empty cell, or one that is not a number, is an InputError.
    """
    table = table.copy()
    for name in names:
        floats = pd.to_numeric(table[name], errors="coerce").astype("float64")
        if (wrong := floats.isna()).any():
            given = table.loc[wrong, name].iloc[0]
            raise InputError(f"column {name!r} holds {'' if pd.isna(given) else given!r}, which is not a number")
        table[name] = floats if (floats % 1).any() else floats.astype("int64")
    return table


def _names(part: Any) -> list[str]:
    return [entry.name for entry in fields(part)]


def _kinds(row_type: type[Measurement]) -> dict[str, Kind]:
    hints = {name: hint for part in (Identity, row_type, Provenance) for name, hint in _hints(part).items()}
    return {name: _kind(hint) for name, hint in hints.items()}


def _hints(part: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(part)
    return {name: hints[name] for name in _names(part)}


def _kind(hint: Any) -> Kind:
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    number = next((option for option in (float, int) if option in options), None)
    return Kind(number, types.NoneType in options)


def _cell(value: Any, kind: Kind | None = None) -> str:
    """Write one value so that it reads back exactly; an absent one is empty."""
    if isinstance(value, str):
        assert not set("\r\0") & set(value), f"{value!r} cannot be read back"
        return value
    if value is None or pd.isna(value):
        return ""
    if kind and kind.number:
        number = kind.number(value)
    else:
        # numpy's scalars have another repr
        number = value.item() if hasattr(value, "item") else value
    assert math.isfinite(number), f"{number} cannot be read back"
    return repr(number)


def _load(path: Path, required: Iterable[str]) -> pd.DataFrame:
    """Read the cells of one file as text and check its common columns."""
    text = csv_text.read(path)
    header = [str(name) for name in text.columns]
    if not set(columns(Measurement)) & set(header):
        raise InputError(f"{path} is not a table of sbeval: it has none of its columns")
    if missing := [name for name in required if name not in header]:
        names = ", ".join(name if name.isprintable() else repr(name) for name in header)
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; it has: {names}")
    declared = {name: kind for name, kind in _kinds(Measurement).items() if name in header}
    for name, kind in declared.items():
        wrong = {cell for cell in text[name].unique() if not _reads(cell, kind)}
        if wrong:
            noun = "whole number" if kind.number is int else "number"
            raise _wrong(path, text, name, text[name].isin(wrong), f"is not a {noun}")
    for name, wrong_rows, why in _impossible(_typed(text[[*declared]], declared)):
        if wrong_rows.any():
            raise _wrong(path, text, name, wrong_rows, why)
    return text


def _impossible(rows: pd.DataFrame) -> Iterator[tuple[str, "pd.Series[bool]", str]]:
    """Yield (column, which rows, why) of numbers that no run writes."""
    if "stderr" in rows:
        yield "stderr", rows["stderr"] < 0, "is a negative standard error"
    if "n" in rows:
        yield "n", rows["n"] < 1, "is not a number of units, of which there is at least one"
    if {"metric", "value"} <= set(rows.columns):
        outside = (rows["value"] < 0) | (rows["value"] > 1 + ROUNDING)
        yield "value", rows["metric"].isin(SHARES) & outside, "is not a share, which is 0 to 1"
        perplexities = {metric for metric in rows["metric"].unique() if metric.endswith("perplexity")}
        yield "value", rows["metric"].isin(perplexities) & (rows["value"] <= 0), "is not a perplexity, which is above 0"


def _wrong(path: Path, text: pd.DataFrame, name: str, where: "pd.Series[bool]", why: str) -> InputError:
    """Return the error for the first of the rows `where`."""
    index = int(where.to_numpy().argmax())
    line = csv_text.lines(path)[index]
    return InputError(f"{path}:{line}: {text[name].iloc[index]!r} in column {name!r} {why}; fix or remove that line")


def _guess(text: pd.DataFrame) -> dict[str, Kind]:
    """Return the kind of each column: declared for a common column, for a factor that of all its cells."""
    declared = _kinds(Measurement)
    return {str(name): declared.get(str(name)) or _factor(text[name]) for name in text.columns}


def _factor(cells: "pd.Series[str]") -> Kind:
    filled = [cell for cell in pd.unique(cells) if cell]
    if not filled or not all(_finite(cell) for cell in filled):
        return Kind(None, True)
    return Kind(int if all(INT.fullmatch(cell) for cell in filled) else float, True)


def _reads(cell: str, kind: Kind) -> bool:
    if kind.number is None or (kind.blank and not cell):
        return True
    return bool(INT.fullmatch(cell)) if kind.number is int else _finite(cell)


def _finite(cell: str) -> bool:
    """Return whether a cell is a number that a float holds."""
    return bool(FLOAT.fullmatch(cell)) and math.isfinite(float(cell))


def _typed(text: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    return pd.DataFrame({name: _column(text[name], kinds[str(name)]) for name in text.columns})


def _column(cells: "pd.Series[str]", kind: Kind) -> "pd.Series[Any]":
    if kind.number is None:
        return cells
    # most columns have few different numbers
    codes, different = pd.factorize(cells)
    if kind.number is float:
        floats = np.array([float(cell) if cell else math.nan for cell in different], dtype=np.float64)
        return pd.Series(floats[codes], index=cells.index)
    blank = np.array([not cell for cell in different], dtype=bool)[codes]
    whole = np.array([int(cell) if cell else 0 for cell in different], dtype=np.int64)[codes]
    return pd.Series(pd.arrays.IntegerArray(whole, blank) if blank.any() else whole, index=cells.index)


def _sorted(text: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by all columns that identify a number, so that a table's diff shows only what changed."""
    keys = [str(name) for name in text.columns if name not in OUTCOME]
    order = _typed(text, _guess(text)).sort_values(keys, na_position="first").index
    return text.loc[order]
