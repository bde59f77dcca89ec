"""Check that results are what runs wrote: a merge, a spreadsheet or a damaged disk may have been in between.

A run file has the digests of its cell's rows and files, and of itself. Results of versions without digests are not
checked.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sbeval.errors import InputError
from sbeval.tables import csv_text, provenance, table
from sbeval.tables.digests import row_digests
from sbeval.tables.results import Results
from sbeval.tables.run_files import is_written

# lines of a table, and tables, that a message names
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """A cell whose rows are not what its run wrote. wrong: numbers of rows that it did not write, of `rows` in all;
    missing: how many that it wrote are not there; reason: why its run file cannot tell, otherwise empty."""

    cell: str
    rows: int
    wrong: tuple[int, ...] = ()
    missing: int = 0
    reason: str = ""


def differences(text: pd.DataFrame, results: Results) -> Iterator[Difference]:
    """Yield the cells whose rows, as text by their number, are not what their runs wrote.

    Cells without a run file, or whose run file has no digests, are not checked.
    """
    found: dict[str, dict[int, str]] = {}
    for number, cell, digest in zip(text.index, text["cell"], row_digests(text), strict=True):
        found.setdefault(cell, {})[number] = digest
    for cell, rows in found.items():
        if not results.run_file(cell).exists():
            continue
        try:
            written = provenance.read_run(results.run_file(cell)).get("rows")
        except InputError as error:
            yield Difference(cell, len(rows), reason=str(error))
            continue
        if written is None:
            continue
        missing = Counter(written)
        missing.subtract(rows.values())
        wrong = tuple(number for number, digest in rows.items() if missing[digest] < 0)
        if wrong or missing.total():
            yield Difference(cell, len(rows), wrong, sum(count for count in missing.values() if count > 0))


def rows(path: Path) -> Iterator[str]:
    """Yield a line on each cell of a table whose rows are not what its run wrote."""
    for file, text in table.pieces(path, ["cell"]):
        found = list(differences(text, Results(path.parent)))
        lines = csv_text.lines(file) if any(each.wrong for each in found) else []
        for each in found:
            yield each.reason or f"{file}: {each.cell}: {_said(each, [lines[number] for number in each.wrong])}"


def _said(each: Difference, lines: list[int]) -> str:
    parts = []
    if lines:
        some = ", ".join(map(str, lines[:SHOWN])) + (", ..." if len(lines) > SHOWN else "")
        parts.append(f"{len(lines)} of {each.rows} rows are not what its run wrote (line {some})")
    if (missing := each.missing - len(lines)) > 0:
        parts.append(f"{missing} row{'s' * (missing > 1)} that its run wrote {'are' if missing > 1 else 'is'} missing")
    return " and ".join(parts)


def notes(tables: Iterable[Path]) -> list[str]:
    """Return lines on rows that are not what runs wrote, a few of each table, for who draws or compares them."""
    out = []
    for path in tables:
        lines = list(rows(path))
        out += lines[:SHOWN]
        if len(lines) > SHOWN:
            more = f"{len(lines) - SHOWN} more cells"
            out.append(f"{path}: {more}, which sbeval check --results-dir {path.parent} lists")
    return out


@dataclass(slots=True)
class Checked:
    """Counts of what was checked; unknown: cells from before run files had digests."""

    tables: int = 0
    rows: int = 0
    cells: int = 0
    files: int = 0
    unknown: int = 0


def folder(results: Results, checked: Checked) -> Iterator[str]:
    """Yield a line on whatever in a results folder is not what a run wrote, and count in `checked`.

    Tables, parts, run files, values and curves; checkpoints and answers are checked when they are read. Raise
    InputError if there is no such folder.
    """
    if not results.folder.is_dir():
        raise InputError(f"there is no folder {results.folder}: give the --results-dir of a run")
    found: set[str] = set()
    for path in sorted(results.folder.glob("*.csv")):
        checked.tables += 1
        try:
            cells = table.text(path, ["cell"])["cell"]
            checked.rows += len(cells)
            found.update(cells)
            yield from rows(path)
        except InputError as error:
            yield str(error)
    runs = {path.stem for path in results.runs.glob("*.json")}
    yield from (f"{results.run_file(cell)} is missing, which rows of a table name" for cell in sorted(found - runs))
    for cell in sorted(runs):
        yield from _run(results, cell, cell in found, checked)
    for kind in (results.values, results.curves):
        strangers = {path.stem for path in kind("").parent.glob("*.parquet")} - runs
        yield from (f"{kind(cell)} has no run file" for cell in sorted(strangers))
    if not (checked.tables or runs or checked.files):
        raise InputError(f"there is no result table in {results.folder}: give the --results-dir of a run")


def _run(results: Results, cell: str, has_rows: bool, checked: Checked) -> Iterator[str]:
    checked.cells += 1
    path = results.run_file(cell)
    try:
        record = provenance.read_run(path)
    except InputError as error:
        # of cells with rows, `rows` says it
        if not has_rows:
            yield str(error)
        return
    checked.unknown += "rows" not in record
    if record.get("rows") and not has_rows:
        count = len(record["rows"])
        yield f"{path}: {count} row{'s' * (count > 1)} that its run wrote {'are' if count > 1 else 'is'} in no table"
    for file in (results.values(cell), results.curves(cell)):
        try:
            checked.files += is_written(results, cell, file)
        except InputError as error:
            yield str(error)
