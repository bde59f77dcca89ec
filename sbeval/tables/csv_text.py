"""CSV files of text cells, read strictly and fast.

pyarrow reads a well-formed file in a fraction of the time of Python's `csv`, but forgives what is no CSV. What it might
read in another way than `csv` is left to `csv`, which also says on which line a file is wrong.
"""

import csv
import io
from pathlib import Path

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.csv  # type: ignore[import-untyped]  # likewise

from sbeval import registry
from sbeval.errors import InputError


def read(path: Path) -> pd.DataFrame:
    """Return the cells of a CSV file with a header.

    Raise InputError, with file and line, when it is missing or empty, or has a ragged or half-written line.
    """
    content = _content(path)
    header, rows = _fast(content) or _checked(path, content)[:2]
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{path}:1: column {', '.join(map(repr, sorted(twice)))} is duplicated; rename or remove one")
    return pd.DataFrame(rows, columns=header, dtype=str) if isinstance(rows, list) else rows.set_axis(header, axis=1)


def lines(path: Path) -> list[int]:
    """Return the line on which each row begins."""
    return _checked(path, _content(path))[2]


def write(path: Path, text: pd.DataFrame) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(text.columns)
        table.writerows(text.to_numpy())


def absent(path: Path) -> InputError:
    """Return the error where there is no table, which names the command that writes it."""
    command = f"{'' if path.stem in registry.TASKS else 'bench '}{path.stem.replace('_', '-')}"
    return InputError(f"no table {path}; sbeval {command} writes it, or give another --results-dir")


def nothing(results_dir: Path) -> InputError:
    """Return the error where no figure's table is in a results folder."""
    if others := ", ".join(sorted(path.name for path in results_dir.glob("*.csv"))):
        return InputError(
            f"no figure known here is drawn from {others} in {results_dir}; install the package of its task"
        )
    return InputError(f"there is no result table in {results_dir}; sbeval length-gen --preset quick makes one")


def _content(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise absent(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not content.strip():
        raise InputError(f"{path} is empty, without even a header; remove it")
    return content


def _fast(content: str) -> tuple[list[str], pd.DataFrame] | None:
    """Return header and rows of a file that pyarrow reads as `csv` does; None of any other."""
    # pyarrow takes other line ends, and a blank line at the end for a row
    if not content.endswith("\n") or content.startswith("\n") or any(each in content for each in ("\n\n", "\r", "\0")):
        return None
    if not _quoted_whole_cells(content):
        return None
    header = next(csv.reader(io.StringIO(content, newline="")))
    names = [str(index) for index in range(len(header))]
    try:
        table = pa.csv.read_csv(
            pa.py_buffer(content.encode()),
            pa.csv.ReadOptions(column_names=names, block_size=1 << 22),
            pa.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid:
        # `csv` says on which line
        return None
    return header, table.slice(1).to_pandas().reset_index(drop=True)


def _quoted_whole_cells(content: str) -> bool:
    """Return whether each quote begins or ends a cell, or is doubled within one."""
    parts = content.split('"')
    # an empty part is a doubled quote
    outside = parts[::2]
    after = all(part[0] in ",\n" for part in outside[1:] if part)
    return len(parts) % 2 == 1 and after and all(part[-1] in ",\n" for part in outside[:-1] if part)


def _checked(path: Path, content: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Return header, rows and the line on which each begins."""
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
    # a value cut short can still have all its commas
    if not content.endswith("\n"):
        raise InputError(
            f"{path}:{lines[-1] if lines else 1}: the last line is not ended, it may be half written; fix or remove it"
        )
    return header, rows, lines
