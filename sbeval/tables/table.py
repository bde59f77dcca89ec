"""Result tables: tidy CSV files in long form, one number in a row, that concurrent runs and torn files cannot damage.

The columns are the fields of three dataclasses in this order (see `sbeval.tables.rows`): `Identity`, the family's own
subclass of `Measurement`, whose added fields are the family's factors, `Provenance`. The file does not have the types
of factors: when read, one is a number if all its cells are numbers or empty; `numbers` checks those that must be.
"""

import csv
import hashlib
import io
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd

from sbeval.errors import InputError
from sbeval.runtime.files import locked, replacing
from sbeval.tables.rows import Identity, Measurement, Provenance, later

INT = re.compile(r"[+-]?[0-9]{1,18}")
FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
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


def write(path: Path, new: pd.DataFrame) -> None:
    """Replace the rows of the cells in `new`, keep all others unchanged, sort, and replace the file atomically.

    Safe against concurrent writers (a lock beside the table) and against being killed. A table that cannot be read
    raises InputError as in `read`, before anything is changed.
    """
    assert len(new) and (new["cell"] != "").all(), "every row names the cell that it comes from"
    assert new["value"].map(math.isfinite).all(), "no data is an absent row, not NaN"
    keys = [name for name in new.columns if name not in OUTCOME]
    twice = new[new.duplicated(keys)]
    assert twice.empty, f"two rows for one number: {twice.iloc[0].to_dict()}"
    text = _text(new)
    with locked(path):
        if path.exists():
            old = _load(path, required=required(Measurement))
            others = old[~old["cell"].isin(set(text["cell"]))]
            text = pd.concat([text, others], ignore_index=True).fillna("")
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(text.columns)
            table.writerows(_sorted(text).to_numpy())


def digests(rows: pd.DataFrame) -> list[str]:
    """Return the digest of each row, in the order of digests, for a run file. Blank cells and the columns' order do not
    count: a table with a column more has the same rows."""
    return sorted(row_digests(_text(rows)))


def row_digests(text: pd.DataFrame) -> list[str]:
    """Return the digest of each row of cells as they are written, ten hexadecimal digits."""
    names = sorted(str(name) for name in text.columns)
    rows = zip(*(text[name].tolist() for name in names), strict=True)
    joined = ("\n".join(f"{name}={cell}" for name, cell in zip(names, row, strict=True) if cell) for row in rows)
    return [hashlib.sha256(row.encode()).hexdigest()[:10] for row in joined]


def read(path: Path, required: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table. Integers are int64 (Int64 where cells may be empty), floats exact, empty text stays empty text.

    Raise InputError when the file is missing, lacks a required column, has a ragged or half-written line, or something
    other than a number in a numeric column.
    """
    text = _load(path, required)
    return _typed(text, _guess(text))


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


def _text(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows as they are written."""
    return pd.DataFrame({name: [_cell(value) for value in rows[name]] for name in rows.columns}, dtype=str)


def _load(path: Path, required: Iterable[str]) -> pd.DataFrame:
    """Read the cells as text and check the shape of the file and its common columns."""
    header, rows, lines = _parse(path)
    if not set(columns(Measurement)) & set(header):
        raise InputError(f"{path} is not a table of sbeval: it has none of its columns")
    if missing := [name for name in required if name not in header]:
        names = ", ".join(name if name.isprintable() else repr(name) for name in header)
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; it has: {names}")
    text = pd.DataFrame(rows, columns=header, dtype=str)
    for name, kind in _guess(text).items():
        for line, cell in zip(lines, text[name], strict=True):
            if not _reads(cell, kind):
                noun = "whole number" if kind.number is int else "number"
                raise InputError(f"{path}:{line}: {cell!r} in column {name!r} is not a {noun}; fix or remove that line")
    return text


def _parse(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Split a CSV file into its header, its rows and the line on which each begins."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no table {path}; the command that measures it writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not content.strip():
        raise InputError(f"{path} is empty, without even a header; remove it")
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        header = next(reader)
        line = reader.line_num + 1
        for row in reader:
            if len(row) != len(header):
                raise csv.Error(f"{len(row)} cells where the header has {len(header)}")
            rows.append(row)
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: {error}; fix or remove that line") from None
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{path}:1: column {', '.join(map(repr, sorted(twice)))} is duplicated; rename or remove one")
    # a value cut short can still have all its commas
    if not content.endswith("\n"):
        raise InputError(
            f"{path}:{lines[-1] if lines else 1}: the last line is not ended, it may be half written; fix or remove it"
        )
    return header, rows, lines


def _guess(text: pd.DataFrame) -> dict[str, Kind]:
    """Return the kind of each column: declared for a common column, for a factor that of all its cells."""
    declared = _kinds(Measurement)
    return {str(name): declared.get(str(name)) or _factor(text[name]) for name in text.columns}


def _factor(cells: Iterable[str]) -> Kind:
    filled = [cell for cell in cells if cell]
    if not filled or not all(FLOAT.fullmatch(cell) for cell in filled):
        return Kind(None, True)
    return Kind(int if all(INT.fullmatch(cell) for cell in filled) else float, True)


def _reads(cell: str, kind: Kind) -> bool:
    if kind.number is None or (kind.blank and not cell):
        return True
    return bool((INT if kind.number is int else FLOAT).fullmatch(cell))


def _typed(text: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    return pd.DataFrame({name: _column(text[name], kinds[str(name)]) for name in text.columns})


def _column(cells: "pd.Series[str]", kind: Kind) -> "pd.Series[Any]":
    if kind.number is None:
        return cells
    if kind.number is float:
        return pd.Series([float(cell) if cell else math.nan for cell in cells], dtype="float64", index=cells.index)
    values = [int(cell) if cell else None for cell in cells]
    return pd.Series(values, dtype="Int64" if None in values else "int64", index=cells.index)


def _sorted(text: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by all columns that identify a number, so that a table's diff shows only what changed."""
    keys = [str(name) for name in text.columns if name not in OUTCOME]
    order = _typed(text, _guess(text)).sort_values(keys, na_position="first").index
    return text.loc[order]
